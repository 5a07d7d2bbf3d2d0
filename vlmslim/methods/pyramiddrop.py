"""PyramidDrop: "Accelerating Your LVLMs via Pyramid Visual Redundancy Reduction" (CVPR 2025, arXiv 2410.17247)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmslim.compressor import Keep, LayerInput, check_choices, check_keep, resolve_keep
from vlmslim.methods._layers import LayerDrops, check_layers


@dataclass
class PyramidDrop(LayerDrops):
    """Before each of several decoder layers, keep the tokens that the last prompt token is about to attend to most.

    The score is the softmax attention that the layer itself is about to pay, by its own norm, queries and keys at the
    positions that tokens have by then, averaged over heads. Of an image's n tokens that entered the language model,
    the j-th drop leaves int(n x ratio^j). After each drop, later layers count positions anew, and so does decoding.

    mode="released" follows the release (commit 6444f30) with these faults: only the first image of a prompt is ranked,
    and later ones stay whole; a small image may lose all its tokens. mode="corrected", the default, ranks each image by
    itself and leaves at least one token of it. In both modes the last token of the prompt asks, also after several
    images (in the release an earlier one does), scores are in fp32 (in fp16, as released, tokens tie), ties go to the
    lower index, decoders with grouped keys work, and only one row of attention is computed. As in the release, newline
    tokens compete like others. The variant for training is left out.

    The released layers see at least 144 of 576 tokens on average, whatever the ratio. So papers that print PyramidDrop
    at 128 or 64 ran another schedule, which they do not state.

    keep            : visual tokens that the last drop leaves per image, a count or a share, in even ratios from drop to
                      drop; None for `ratio`
    mode            : "corrected" or "released"
    ratio           : what each drop leaves of the tokens before it (lambda); the paper uses 0.5. A list says what each
                      drop leaves of the n, as in the release: (0.5, 0.25, 0.125)
    layer           : decoder layers, ascending: numbers from 1, or shares of the depth; 8, 16 and 24 in the release
    layer_positions : "renumbered" (as released), or "original": later drops then keep other tokens
    """

    keep: Keep | None = None
    mode: str = "corrected"
    ratio: float | Sequence[float] = 0.5
    layer: Sequence[int | float] = (0.25, 0.5, 0.75)
    layer_positions: str = "renumbered"

    budget_options: ClassVar = ("keep",)

    def __post_init__(self) -> None:
        self.layer, self.first_only = tuple(self.layer), self.mode == "released"
        self.layers = self.layer
        check_choices(self, mode=("corrected", "released"), layer_positions=("renumbered", "original"))
        if self.keep is not None:
            check_keep(self.keep)
        if isinstance(self.ratio, int | float):
            self.shares = tuple(self.ratio ** (j + 1) for j in range(len(self.layer)))
        else:
            self.ratio = self.shares = tuple(self.ratio)
        check_layers(self.layer, self.shares, "ratio")
        if not all(0 < share <= 1 for share in self.shares):
            raise ValueError(f"ratio={self.ratio}: a share lies in (0, 1]; the paper uses 0.5")

    def counts(self, n: int) -> list[int]:
        """Return how many of n tokens each drop leaves."""
        if self.keep is None:
            least = int(self.mode == "corrected")
            return [max(least, int(n * share)) for share in self.shares]
        k, drops = resolve_keep(self.keep, n), len(self.layer)
        return [max(k, int(n * (k / n) ** (j / drops) + 1e-9)) for j in range(1, drops + 1)]

    def after(self, n: int, there: int, drop: int) -> int:
        """Return what this drop leaves."""
        return min(there, self.counts(n)[drop])

    def retain(self, tokens: LayerInput) -> Tensor:
        """Rank by the attention that the last token is about to pay."""
        drop = self.layers.index(tokens.layer)
        score = tokens.coming_attention(tokens.last[:, None]).mean(1)[:, 0]  # (B, S)
        keep = tokens.top(score, lambda n: self.counts(n)[drop])
        return keep | (tokens.image > 1) if self.first_only else keep
