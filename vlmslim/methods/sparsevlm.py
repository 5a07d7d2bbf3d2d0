"""SparseVLM: "Visual Token Sparsification for Efficient VLM Inference" (ICML 2025, arXiv 2410.04417)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import (
    Compressor,
    ImageTokens,
    Keep,
    LayerInput,
    Retained,
    check_choices,
    check_keep,
    check_layer,
    resolve_keep,
)
from vlmslim.methods._layers import ascending, seen_by_layers
from vlmslim.ops.attention import attention_rows
from vlmslim.ops.ranking import full_precision

#: Decoder layers of each version, as shares of 32, and what stays before each of them, of 576, in its row "64".
LAYERS = {"1.0": (3 / 32, 7 / 32, 1 / 2, 5 / 8), "1.5": (3 / 32, 7 / 32, 1 / 2), "2.0": (3 / 32, 7 / 32, 1 / 2)}
COUNTS = {"1.5": (0.1146, 0.0521, 0.0295), "2.0": (0.1146, 0.059, 0.0347)}


@dataclass
class SparseVLM(Compressor):
    """Before several decoder layers, keep the tokens that the visual words of the question attend to.

    Raters are the text tokens after an image whose product with its tokens, under a softmax over the text, is above
    the mean (section 3.1 of the paper). A token's score is the attention that raters pay to it in the layer before,
    averaged over raters and heads. Version 1.x then recycles: of the tokens that go, the best 30 % are clustered by
    density peaks, and one mean for every ten of them stays.

    The release has three versions under one name. "1.0" (commit 91fb6d9) keeps min(rank x scale + bias, v - 1) of the v
    tokens there are, where rank is that of the raters' attention. "1.5" (the numbers of ICML) keeps fixed counts. Both
    recycle, and count positions anew. "2.0" (commit 9e1f649, "SparseVLM+") keeps fixed counts, recycles nothing and
    leaves positions; it divides attention by what rotary positions give equal vectors (gravity), and reads the heads
    that look most at the image. It is the default.

    mode="released" follows the release with these faults: only the first image of a prompt is pruned; at least one
    token of it always goes; recycled tokens stand after the kept ones, out of their places; random noise decides
    between equal densities (here drawn from `seed` and pixels); gravity divides also where it is negative, from a
    distance of 1707 on with LLaVA-1.5's positions. mode="corrected", the default, prunes every image by itself, puts a
    recycled token at the place of its cluster's centre, needs no noise, and leaves gravity out where it is not
    positive. In both modes scores are in fp32, and ties go to the lower index. Without ids of the prompt, or if no word
    is above the mean, all text after the image rates; without such text, the prompt's last token does.

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

    reads_back = "attention decides which words rate, and how many tokens stay"

    budget_options: ClassVar = ("keep",)

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
        check_choices(self, mode=("corrected", "released"), version=("1.0", "1.5", "2.0"))
        old = self.version != "2.0"
        self.layer = self.layers = tuple(LAYERS[self.version] if self.layer is None else self.layer)
        self.recycle = old if self.recycle is None else self.recycle
        if self.layer_positions == "auto":
            self.layer_positions = "renumbered" if old else "original"
        check_choices(self, layer_positions=("renumbered", "original"))
        for layer in self.layer:
            check_layer(layer)
        if self.version == "1.0":
            if self.keep is not None or self.counts is not None:
                raise ValueError("version='1.0' decides by rank how many tokens stay: give scale and bias, not keep")
        else:
            self.counts = tuple(COUNTS[self.version] if self.counts is None else self.counts)
            if self.keep is not None:
                check_keep(self.keep)
            for count in self.counts:
                check_keep(count, "counts")
            if len(self.counts) != len(self.layer) or not self.layer:
                raise ValueError(f"layer={self.layer} and counts={self.counts}: give one count for each layer")
        if not 0 < self.heads <= 1:
            raise ValueError(f"heads={self.heads}: a part of the heads lies in (0, 1]; the release reads 14 of 32")

    def setup(self, model: Any) -> None:
        """Turn shares of the depth into layers, and find the input embeddings."""
        self.layers = ascending(self.layer or (), model, spread=True)
        self.embedding = model.get_input_embeddings()

    def kept(self, n: int) -> list[int]:
        """Return how many of an image's n tokens each drop keeps, recycled ones not counted."""
        counts = [min(n, count) if isinstance(count, int) else resolve_keep(count, n) for count in self.counts or ()]
        if self.keep is not None:
            k, last = resolve_keep(self.keep, n), counts[-1]
            counts = [min(n, max(k, round(k * count / last))) for count in counts]
        return counts

    def left(self, n: int) -> list[int]:
        """Return how many of an image's n tokens are there after each drop, recycled ones included."""
        there = [n]
        for k in self.kept(n):
            k = min(k, there[-1] - (self.mode == "released"))
            there.append(k + clusters(there[-1] - k)[1] * bool(self.recycle))
        return there[1:]

    def requested(self, n: int) -> int | None:
        """Return what the last drop leaves; None in version 1.0."""
        return None if self.version == "1.0" else self.left(n)[-1]

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """Return the counts, layer by layer."""
        return [n] * depth if self.version == "1.0" else seen_by_layers(n, depth, self.layer or (), self.left(n))

    def retain(self, tokens: LayerInput) -> Tensor | Retained:
        """Keep what the raters look at, and means of what they look at next."""
        keep, hidden = tokens.mask.clone(), tokens.hidden.clone()
        moves: list[tuple[int, Tensor, Tensor]] = []  # row, places of tokens, and those of what they went into
        images = []  # row, place of its tokens, place of its raters, the image, how many of its tokens entered
        for row, entered in enumerate(tokens.entered):
            for number, n in enumerate(entered[: 1 if self.mode == "released" else None], 1):
                place = (tokens.image[row] == number).nonzero()[:, 0]
                if len(place):
                    image = tokens.images[row][number - 1]
                    images.append((row, place, self.raters(tokens, row, place, image), image, n))
        asked = torch.zeros_like(tokens.mask)
        for row, _, raters, *_ in images:
            asked[row, raters] = True
        parts = list(attention_rows(tokens.attention, asked, heads=True))
        tokens.score = scores = torch.zeros_like(keep, dtype=torch.float32)
        for row, place, raters, image, n in images:
            paid = torch.cat(
                [x[row][:, torch.isin(at[row], raters) & asked[row, at[row]]][..., place] for at, x in parts], 1
            )
            gravity, heads = (
                (None, None)
                if self.version != "2.0"
                else (self.gravity(tokens, row, raters, place), max(1, round(self.heads * paid.shape[0])))
            )
            score = guided_score(paid, gravity, heads)
            scores[row, place] = score.to(scores)
            order = score.argsort(descending=True, stable=True)
            k = min(self.staying(tokens, paid, n), len(place) - (self.mode == "released"))
            if k >= len(place):
                continue
            stay, states = place[order[:k].sort().values], []
            if self.recycle:
                of, amount = clusters(len(place) - k)
                best = place[order[k : k + of]]
                noise = None
                if self.mode == "released":
                    noise = torch.rand(of, generator=image.generator(self.seed)).to(hidden.device)
                means, centres, group = recycled(tokens.hidden[row, best], amount, noise)
                stay, states = torch.cat([stay, best[centres]]), [means.to(hidden)]
            keep[row, place] = False
            keep[row, stay] = True
            at = stay.sort().values if self.mode == "released" else stay
            hidden[row, at] = torch.cat([tokens.hidden[row, stay[:k]], *states])
            if self.recycle:
                moves += [(row, stay[:k], at[:k]), (row, best, at[k + group])]
        if not self.recycle:
            return keep
        tokens.into = partial(destinations, tokens.mask.shape, moves)
        return Retained(keep, hidden)

    def staying(self, tokens: LayerInput, paid: Tensor, n: int) -> int:
        """Return how many tokens of an image stay, of n that entered, given what raters pay (heads, r, v)."""
        if self.version != "1.0":
            return self.kept(n)[self.layers.index(tokens.layer)]
        rank = int(torch.linalg.matrix_rank(paid.float().mean(0)))
        return max(1, min(int(rank * self.scale + self.bias), paid.shape[-1] - 1))

    def raters(self, tokens: LayerInput, row: int, place: Tensor, image: ImageTokens) -> Tensor:
        """Find the text tokens after an image that rate its tokens at `place`: their places."""
        text = tokens.mask[row] & (tokens.image[row] == 0)
        after = text & (torch.arange(len(text), device=text.device) > place[-1])
        at = after.nonzero()[:, 0]
        if not len(at):
            return tokens.last[row, None]
        if image.prompt is None:
            return at
        words = image.prompt.to(text.device)[after[text]]  # text is never dropped, so its order is that of the prompt
        return at[visual_words(image.features, self.embedding(words).to(image.features.device)).to(at.device)]

    def gravity(self, tokens: LayerInput, row: int, raters: Tensor, place: Tensor) -> Tensor | None:
        """Compute what rotary positions alone give raters and visual tokens, (r, v); None where it is of no use."""
        if tokens.rotary is None:
            return None
        width = tokens.keys.shape[-1]
        cos, sin = (x[row if len(x) > 1 else 0].float().to(raters.device) for x in tokens.rotary)
        turned = cos[raters] @ cos[place].T + sin[raters] @ sin[place].T  # a vector of ones against another
        gravity = (turned + width - cos.shape[-1]) / width**0.5
        return gravity if self.mode == "released" or bool((gravity > 0).all()) else None


def destinations(shape: torch.Size, moves: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Return `LayerInput.into` of the tokens that moved: row, places (m,), and the places (m,) that they went to."""
    rows, places = shape
    into = torch.arange(places).repeat(rows, 1)
    for row, place, target in moves:
        into[row, place.cpu()] = target.cpu()
    return into


def clusters(dropped: int) -> tuple[int, int]:
    """Return how many of the dropped tokens are recycled, and into how many."""
    of = int(0.3 * dropped) + 1 if dropped else 0
    return of, of // 10 + 1 if dropped else 0


@full_precision
def visual_words(x: Tensor, words: Tensor) -> Tensor:
    """Find the words (t, d) that an image's tokens (n, d) are nearest to: (t,) bool, all if none stands out."""
    share = (x @ words.float().T).softmax(1).mean(0)
    found = share > share.mean()
    return found if found.any() else ~found


@full_precision
def guided_score(paid: Tensor, gravity: Tensor | None = None, heads: int | None = None) -> Tensor:
    """Average what raters pay to visual tokens.

    Args:
        paid: (heads, r, v) attention.
        gravity: (r, v) divides it; None for 1.
        heads: number of heads that count, those which look most at the image; None for all.

    Returns:
        (v,).
    """
    paid = paid if gravity is None else paid / gravity
    if heads is not None:
        paid = paid[paid.sum((1, 2)).argsort(descending=True, stable=True)[:heads]]
    return paid.mean((0, 1))


@full_precision
def recycled(x: Tensor, amount: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster tokens by density peaks, and average each cluster.

    Args:
        x: (m, d) tokens.
        amount: number of clusters, at most m; also of the neighbours that make density, the token itself among them.
        noise: (m,) in [0, 1), a millionth of which is added to densities; None for none.

    Returns:
        (amount, d) means, (amount,) indices of the centres, and (m,) the cluster of each token.
    """
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = (-distance.sort(dim=1).values[:, :amount].square().mean(1)).exp()
    density = density if noise is None else density + 1e-6 * noise
    denser = density > density[:, None]
    apart = distance.masked_fill(~denser, float("inf")).amin(1)
    apart = torch.where(denser.any(1), apart, distance.max())
    centres = (density * apart).argsort(descending=True, stable=True)[:amount]
    group = distance[:, centres].argmin(1).index_copy(0, centres, torch.arange(amount, device=x.device))
    joins = (group == torch.arange(amount, device=x.device)[:, None]).to(x)
    return joins @ x / joins.sum(1, keepdim=True), centres, group
