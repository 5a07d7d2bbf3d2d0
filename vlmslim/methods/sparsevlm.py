"""SparseVLM: "Visual Token Sparsification for Efficient VLM Inference" (ICML 2025, arXiv 2410.04417)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import Keep, LayerInput, Retained, check_choices, check_keep, check_layer, resolve_keep
from vlmslim.methods._layers import LayerDrops, PlacedImage, attention_of_text, check_layers, placed_images
from vlmslim.ops.density_peaks import density_peaks
from vlmslim.ops.ranking import full_precision

#: Decoder layers of each version, as shares of 32, and what stays before each of them, of 576, in its row "64".
LAYERS = {"1.0": (3 / 32, 7 / 32, 1 / 2, 5 / 8), "1.5": (3 / 32, 7 / 32, 1 / 2), "2.0": (3 / 32, 7 / 32, 1 / 2)}
COUNTS = {"1.5": (0.1146, 0.0521, 0.0295), "2.0": (0.1146, 0.059, 0.0347)}


@dataclass
class SparseVLM(LayerDrops):
    """Before several decoder layers, keep the tokens that the visual words of the question attend to.

    Raters are the text tokens after an image whose product with its tokens, under a softmax over the text, is above
    the mean (section 3.1 of the paper). A token's score is the attention that raters pay to it in the layer before,
    averaged over raters and heads. Version 1.x then recycles: of the tokens that go, the best 30 % are clustered by
    density peaks, and one mean for every ten of them stays.

    The release has three versions under one name. "1.0" (commit 91fb6d9) keeps min(rank x scale + bias, v - 1) of the v
    tokens there are, where rank is that of the raters' attention, and all v if it is v. "1.5" (the numbers of ICML)
    keeps fixed counts. Both recycle, and count positions anew. "2.0" (commit 9e1f649, "SparseVLM+") keeps fixed counts,
    recycles nothing and leaves positions; it divides attention by what rotary positions give equal vectors (gravity),
    and reads the heads that look most at the image. It is the default.

    mode="released" follows the release with these faults: only the first image of a prompt is pruned; at least one
    token of it always goes; a low rank may keep none; recycled tokens stand after the kept ones, out of their places;
    random noise decides between equal densities (here drawn from `seed` and pixels); gravity divides also where it is
    negative, from a distance of 1707 on with LLaVA-1.5's positions. mode="corrected", the default, prunes every image
    by itself, puts a recycled token at the place of its cluster's centre, needs no noise, and leaves gravity out where
    it is not positive. In both modes scores are in fp32, and ties go to the lower index. Without ids of the prompt, or
    if no word is above the mean, all text after the image rates; without such text, the prompt's last token does.

    The printed budgets count what layers send, not what they read: "64" is 82 tokens per layer.

    keep            : visual tokens that stay last per image, a count or a share, recycled ones not counted; `counts`
                      shrink in proportion. None for `counts`
    mode            : "corrected" or "released"
    version         : "1.0", "1.5" or "2.0"
    counts          : for each layer, visual tokens that stay, counts or shares; None for those of the row "64". Of 576,
                      "192" is 300, 200, 118 and "128" is 238, 108, 60 in version 2.0, and in version 1.5 300, 200, 110
                      and 303, 110, 36
    layer           : decoder layers, ascending, numbers or shares of the depth; None for those of the version
    scale           : of the rank in version 1.0: 13.5 with bias 0 for "192", 9 with 6 for "128", 0.8 with 0 for "64"
    bias            : see `scale`
    heads           : part of the heads that version 2.0 reads; 14 of 32 as released
    recycle         : keep means of dropped tokens; None is yes in version 1.x
    layer_positions : "renumbered" or "original"; "auto" is what the version does
    seed            : of the noise of mode="released"
    """

    budget_options: ClassVar = ("keep",)
    spread: ClassVar = True

    keep: Keep | None = None
    mode: str = "corrected"
    version: str = "2.0"
    counts: Sequence[Keep] | None = None
    layer: Sequence[int | float] | None = None
    scale: float = 13.5
    bias: float = 0.0
    heads: float = 14 / 32
    recycle: bool | None = None
    layer_positions: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        positions = ("auto", "renumbered", "original")
        check_choices(self, mode=("corrected", "released"), version=("1.0", "1.5", "2.0"), layer_positions=positions)
        old, self.first_only = self.version != "2.0", self.mode == "released"
        self.layer = self.layers = tuple(LAYERS[self.version] if self.layer is None else self.layer)
        self.recycle = old if self.recycle is None else self.recycle
        if self.layer_positions == "auto":
            self.layer_positions = "renumbered" if old else "original"
        if not 0 < self.heads <= 1:
            raise ValueError(f"heads={self.heads}: a part of the heads lies in (0, 1]; the release reads 14 of 32")
        if self.version == "1.0":
            self.reads_back = "the rank of attention decides how many tokens stay"
            if self.keep is not None or self.counts is not None:
                raise ValueError("version='1.0' decides by rank how many tokens stay: give scale and bias, not keep")
            for layer in self.layer:
                check_layer(layer)
        else:
            self.counts = tuple(COUNTS[self.version] if self.counts is None else self.counts)
            check_layers(self.layer, self.counts, "counts")
            for count in self.counts:
                check_keep(count, "counts")
            if self.keep is not None:
                check_keep(self.keep)

    def setup(self, model: Any) -> None:
        """Turn shares of the depth into layers, and find the input embeddings."""
        super().setup(model)
        self.embedding = model.get_input_embeddings()

    def kept(self, n: int) -> list[int]:
        """Return how many of an image's n tokens each drop keeps, recycled ones not counted."""
        counts = [min(n, count) if isinstance(count, int) else resolve_keep(count, n) for count in self.counts or ()]
        if self.keep is not None:
            k, last = resolve_keep(self.keep, n), counts[-1]
            counts = [min(n, max(k, round(k * count / last))) for count in counts]
        return counts

    def staying(self, n: int, there: int, drop: int) -> int:
        """Return how many tokens of an image a drop keeps, recycled ones not counted; the arguments are `after`'s."""
        return min(self.kept(n)[drop], there - (self.mode == "released"))

    def after(self, n: int, there: int, drop: int) -> int:
        """Return how many tokens of an image a drop leaves, recycled ones included; all may stay in version 1.0."""
        if self.version == "1.0":
            return there
        k = self.staying(n, there, drop)
        return k + clusters(there - k)[1] * bool(self.recycle)

    def requested(self, n: int) -> int | None:
        """Return what the last drop leaves; None in version 1.0."""
        return None if self.version == "1.0" else super().requested(n)

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return the counts of this layer, unless the rank decides."""
        return None if self.version == "1.0" else super().known_counts(tokens)

    def retain(self, tokens: LayerInput) -> Tensor | Retained:
        """Keep what the raters look at, and means of what they look at next."""
        keep, hidden = tokens.mask.clone(), tokens.hidden.clone()
        into = torch.arange(keep.shape[1], device=keep.device).repeat(len(keep), 1)
        tokens.score = torch.zeros_like(keep, dtype=torch.float32)
        drop = self.layers.index(tokens.layer)
        images = [image for image in placed_images(tokens) if image.number == 1 or not self.first_only]
        for image, paid in zip(images, attention_of_text(tokens, images, heads=True), strict=True):
            row, place = image.row, image.place
            rates = self.raters(image).to(paid.device)
            score = self.scored(tokens, image, paid, rates)
            tokens.score[row, place] = score.to(tokens.score)
            if self.version == "1.0":
                k = self.by_rank(paid[:, rates].mean(0))
            else:
                k = self.staying(image.entered, len(place), drop)
            order = place[score.argsort(descending=True, stable=True)]
            stay, gone = order[:k].sort().values, order[k:]
            keep[row, gone] = False
            if self.recycle and len(gone):
                of, amount = clusters(len(gone))
                best, noise = gone[:of], image.image.uniform(self.seed, of) if self.mode == "released" else None
                means, centres, group = density_peaks(tokens.hidden[row, best], amount, noise)
                stay = torch.cat([stay, best[centres]])
                at = stay.sort().values if self.mode == "released" else stay
                keep[row, at] = True
                hidden[row, at] = torch.cat([tokens.hidden[row, stay[:k]], means.to(hidden)])
                into[row, stay[:k]] = at[:k]
                into[row, best] = at[k:][group]
        if not self.recycle:
            return keep
        tokens.into = into.cpu
        return Retained(keep, hidden)

    def raters(self, image: PlacedImage) -> Tensor:
        """Tell which words of the text after an image rate its tokens, (t,) bool; all if the prompt has no ids."""
        t, features = len(image.text), image.image.features
        if image.image.prompt is None or not t:
            return torch.ones(max(1, t), dtype=torch.bool, device=features.device)
        words = self.embedding(image.image.prompt[-t:].to(image.text.device, non_blocking=True))
        return visual_words(features, words.to(features.device))

    def scored(self, tokens: LayerInput, image: PlacedImage, paid: Tensor, rates: Tensor) -> Tensor:
        """Score the tokens of an image, (v,), by what text pays to them, (heads, t, v), and which of it rates, (t,)."""
        if self.version != "2.0":
            return guided_score(paid, rates)
        text = image.text if len(image.text) else tokens.last[image.row, None]
        gravity = rotary_gravity(tokens, image.row, text, image.place)
        if self.mode == "corrected":
            gravity = torch.where(((gravity > 0) | ~rates[:, None]).all(), gravity, 1)
        return guided_score(paid / gravity, rates, max(1, round(self.heads * len(paid))))

    def by_rank(self, paid: Tensor) -> int:
        """Return how many tokens stay in version 1.0 by the rank of what raters pay to them, (raters, v)."""
        rank, v, least = int(torch.linalg.matrix_rank(paid)), paid.shape[1], int(self.mode == "corrected")
        return v if rank == v else max(least, min(int(rank * self.scale + self.bias), v - 1))


def clusters(dropped: int) -> tuple[int, int]:
    """Return how many of the dropped tokens are recycled, and into how many."""
    of = int(0.3 * dropped) + 1 if dropped else 0
    return of, of // 10 + 1 if dropped else 0


@full_precision
def visual_words(x: Tensor, words: Tensor) -> Tensor:
    """Find the words (t, d) that an image's tokens (n, d) are nearest to: (t,) bool, all if none stands out."""
    share = (x @ words.float().T).softmax(1).mean(0)
    found = share > share.mean()
    return found | ~found.any()


def rotary_gravity(tokens: LayerInput, row: int, text: Tensor, place: Tensor) -> Tensor:
    """Compute what rotary positions alone give words and visual tokens, (t, v); 1 where nothing turns.

    Sums are in fp64, because attention is divided by the result, and the result may be close to 0.
    """
    if tokens.rotary is None:
        return torch.ones(len(text), len(place), device=place.device)
    width = tokens.keys.shape[-1]
    cos, sin = (x[row if len(x) > 1 else 0].to(text.device).double() for x in tokens.rotary)
    turned = cos[text] @ cos[place].T + sin[text] @ sin[place].T  # a vector of ones against another
    return ((turned + width - cos.shape[-1]) / width**0.5).float()


@full_precision
def guided_score(paid: Tensor, rates: Tensor, heads: int | None = None) -> Tensor:
    """Average what raters pay to visual tokens.

    Args:
        paid: (heads, t, v) attention of text.
        rates: (t,) bool, True at the raters.
        heads: number of heads that count, those which look most at the image; None for all.

    Returns:
        (v,).
    """
    paid = paid.masked_fill(~rates[:, None], 0)
    if heads is not None:
        paid = paid[paid.sum((1, 2)).argsort(descending=True, stable=True)[:heads]]
    return paid.sum((0, 1)) / (len(paid) * rates.sum())
