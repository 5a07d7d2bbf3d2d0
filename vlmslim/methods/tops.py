"""TOPS: "First-Principles Visual Token Pruning via Constructing Token Optimal Preservation Sets" (arXiv 2606.27161)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlmslim.compressor import Compressor, ImageTokens, Keep, LayerInput, check_choices
from vlmslim.methods._layers import LayerDrops, attention_of_text, check_layers, placed_images
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection
from vlmslim.ops.greedy import Balanced, cosine_matrix, greedy
from vlmslim.ops.ranking import full_precision


@dataclass
class TOPSEntrance(ScoredSelection):
    """Stage 1: from the most attended token on, add the token of highest relevance, diversity and coverage together.

    Relevance is the attention that a patch gets in the vision tower. Each frame of a video is searched by itself. The
    options are those of `TOPS`.
    """

    pool = "frame"

    keep: Keep = 0.222
    alpha: float = 0.5
    coverage: float = 0.5
    normalise: str = "mean"
    score: str = "auto"
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self)
        check_weights(self)

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return features and attention."""
        return image.features, self.scores(image)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Search all tokens of an image or frame together."""
        return preserve(self.compared(read[0])[0], read[1], k, self.alpha, self.coverage, self.normalise)


@dataclass
class TOPSLayers(LayerDrops):
    """Stage 2: before some decoder layers, keep parts of the tokens of each image, by the text that rates them.

    Raters are the text tokens after the image that pay it at least the mean attention of such tokens. Relevance is what
    they pay to a token, averaged over raters and heads. The rule is that of stage 1, on hidden states. An image without
    text after it is rated by the prompt's last token. The options are those of `TOPS`.
    """

    budget_options: ClassVar = ()

    layer: Sequence[int | float] = (0.375, 0.75)
    parts: Sequence[float] = (0.5, 0.125)
    alpha: float = 0.5
    coverage: float = 0.5
    normalise: str = "mean"
    raters: str = "above_mean"
    attention: str = "previous"
    layer_positions: str = "original"

    def __post_init__(self) -> None:
        self.layer = self.layers = tuple(self.layer)
        self.parts = tuple(self.parts)
        check_weights(self)
        check_choices(self, raters=("above_mean", "all", "last"), attention=("previous", "coming"))
        check_choices(self, layer_positions=("original", "renumbered"))
        check_layers(self.layer, self.parts, "parts")
        if not all(0 < part <= 1 for part in self.parts):
            raise ValueError(f"parts={self.parts}: a part of the tokens lies in (0, 1]")

    def after(self, n: int, there: int, drop: int) -> int:
        """Return the part of this layer, at least one token."""
        return min(there, max(1, round(n * self.parts[drop])))

    def retain(self, tokens: LayerInput) -> Tensor:
        """Search the tokens of every image."""
        drop, keep, images = self.layers.index(tokens.layer), tokens.mask.clone(), placed_images(tokens)
        attention = attention_of_text(tokens, images, coming=self.attention == "coming")
        for image, paid in zip(images, attention, strict=True):
            row, place = image.row, image.place
            k = self.after(image.entered, len(place), drop)
            if k < len(place):
                states, score = tokens.hidden[row, place], text_relevance(paid, self.raters)
                order = preserve(states[None], score[None], k, self.alpha, self.coverage, self.normalise)[0]
                keep[row, place] = False
                keep[row, place[order]] = True
        return keep


@dataclass
class TOPS(TOPSEntrance):
    """Keep the tokens of highest relevance, diversity and coverage, in three steps from the entrance to late layers.

    One greedy rule (algorithms 1 and 2 of the paper) serves all. From the most relevant token on, it adds the token of
    highest r / mean(r) + alpha x d / mean(d) + coverage x c / mean(c), where r is relevance, d the cosine distance to
    the nearest kept token, c the gain in coverage of tokens not kept yet, and means are over those. `TOPSEntrance`
    applies it to projected tokens with attention from CLS, `TOPSLayers` to hidden states with attention from text.

    This is a reading: no code is released. The paper gives T tokens as the budget of a run with 2 T at the entrance, T
    from layer 12 of 32 on and T / 4 from layer 24 on; `keep` is the first of these, so that 128 reproduces its rows
    for 64. Where the paper is silent: relevance is renewed with the other means at every step; attention is that of
    tower layer -2, and of the decoder layer before the drop; a text token rates if its attention reaches the mean;
    images are searched one by one, and at the entrance the frames of a video too; ties go to the lower index.

    keep            : visual tokens that enter the language model per image, a count or a share; 2 T of the paper
    alpha           : weight of diversity; 0.5 in the paper
    coverage        : weight of coverage (lambda); in layers, the paper tunes it between 0.4 and 1 by model and budget
    normalise       : divide by the "mean" (algorithms 1 and 2), with that of relevance "fixed" at first, or "minmax"
                      (section 4.1)
    score           : attention from CLS ("cls"), mean attention received ("received"), or "auto": "cls" if the tower
                      has CLS
    newline         : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions       : rotary positions: "auto", "original" or "renumbered" (as in the paper) at the entrance
    layer           : decoder layers of stage 2, numbers or shares of the depth; empty leaves stage 2 out
    parts           : for each of them, the part of the entered tokens that stays
    raters          : text that rates: "above_mean", "all", or the "last" token
    attention       : of that text, in the layer "previous" to the drop, or what it is about to pay in the "coming" one
    layer_positions : rotary positions from a drop between layers on: "original", or "renumbered" (as in the paper)
    """

    layer: Sequence[int | float] = (0.375, 0.75)
    parts: Sequence[float] = (0.5, 0.125)
    raters: str = "above_mean"
    attention: str = "previous"
    layer_positions: str = "original"

    def __post_init__(self) -> None:
        self.layer, self.parts = tuple(self.layer), tuple(self.parts)
        self.stages()  # each stage checks its options

    def stages(self) -> list[Compressor]:
        """Return the stages, or only the first if everything is to be kept, or if no layer is given."""
        first = TOPSEntrance.stage_of(self)
        if not self.layer or (isinstance(self.keep, float) and self.keep == 1):
            return [first]
        return [first, TOPSLayers.stage_of(self)]


def check_weights(options: Any) -> None:
    """Refuse weights and normalisations that mean nothing."""
    check_choices(options, normalise=("mean", "fixed", "minmax"))
    for name in ("alpha", "coverage"):
        if getattr(options, name) < 0:
            raise ValueError(f"{name}={getattr(options, name)}: give a weight from 0 on; the paper uses 0.5")


@full_precision
def text_relevance(paid: Tensor, raters: str = "above_mean") -> Tensor:
    """Average the attention that text tokens pay to the tokens of an image, (q, n), over those that rate: (n,)."""
    if raters == "last":
        return paid[-1]
    mass = paid.sum(1)
    mean = mass.mean().clamp(max=mass.max())  # the mean of equal numbers may be rounded up
    rates = (mass >= mean) | (raters == "all")
    return (paid * rates[:, None]).sum(0) / rates.sum()


@full_precision
def preserve(
    x: Tensor, relevance: Tensor, k: int, alpha: float = 0.5, coverage: float = 0.5, normalise: str = "mean"
) -> Tensor:
    """Select tokens greedily by relevance, diversity and coverage.

    Args:
        x: (b, n, d) tokens, compared by cosine.
        relevance: (b, n), not negative.
        k: number of picks, 1 <= k <= n.
        alpha: weight of diversity.
        coverage: weight of coverage.
        normalise: "mean", "fixed" or "minmax".

    Returns:
        (b, k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    return greedy(Balanced(relevance.float(), cosine_matrix(x), alpha, coverage, normalise), k)
