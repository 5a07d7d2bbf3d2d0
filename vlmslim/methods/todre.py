"""ToDRE: "Effective Visual Token Pruning via Token Diversity and Task Relevance" (arXiv 2505.18757)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressor, ImageTokens, Keep, check_choices
from vlmslim.engine.families import has_cls, tower
from vlmslim.methods._selection import Pool, Selection
from vlmslim.methods.drop_visual import DropVisual
from vlmslim.ops.attention import cls_attention
from vlmslim.ops.greedy import Rows, farthest_greedy, similarity_matrix
from vlmslim.ops.ranking import full_precision

#: how similarity to the chosen tokens follows from similarity to each of them
REDUCE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"max_sum": torch.add, "k_center": torch.maximum}
MATRIX_LIMIT = 8192  # tokens up to which all similarities of an image are in memory at once: 256 MiB


@dataclass
class Diversify(Selection):
    """Stage 1: start from a pivot token, and add again and again the token least similar to those chosen so far.

    Candidates are the projected tokens of all crops or frames together, compared by cosine similarity.

    keep      : visual tokens to keep per image, a count or a share; the paper reports 0.25 and 0.1
    objective : "max_sum" adds the token whose similarities to the chosen tokens have the smallest sum (version 2 of
                the paper); "k_center" adds the token whose nearest chosen token is farthest (version 1). "k_center"
                covers clusters, "max_sum" prefers tokens at the outskirts
    pivot     : "cls" is the patch with the highest CLS attention (of the thumbnail, under anyres; of any frame, of a
                video); "random" draws; "center" and "farthest" are the tokens most and least similar to the mean.
                "auto" is "cls" on a tower with a CLS token, and "random" on others. In the paper all are within 0.4
                points of one another
    cls_layer : tower layer of the CLS attention; -1 is the last, as in the paper, -2 the one that LLaVA reads
    newline   : newline tokens of anyres images and videos, which count within the budget: "rows" keeps the newline
                of each row that keeps a token, "drop" removes them, "pool" lets them compete with patches
    seed      : seed of the random pivot, which depends on the image's pixels as well
    positions : rotary positions: "auto", "original" or "renumbered"
    """

    keep: Keep = 0.1
    objective: str = "max_sum"
    pivot: str = "auto"
    cls_layer: int = -1
    newline: str = "rows"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            self,
            objective=("max_sum", "k_center"),
            pivot=("auto", "cls", "random", "center", "farthest"),
            newline=("rows", "drop", "pool"),
        )

    def setup(self, model: Any) -> None:
        """Choose the pivot by whether the tower has a CLS token."""
        if self.pivot == "auto":
            self.pivot = "cls" if has_cls(model.model) else "random"
            self.substitutes = () if self.pivot == "cls" else ("random pivot",)
        elif self.pivot == "cls" and not has_cls(model.model):
            raise ValueError(
                f"pivot='cls' needs a CLS token, and {type(tower(model.model)).__name__} has none; "
                "use pivot='random', which is what 'auto' takes there"
            )
        self.tower_layers = (self.cls_layer,) if self.pivot == "cls" else ()

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Start from each image's pivot."""
        pivots = [self._pivot(pool.image, pool.slots) for pool in pools]
        return diverse(self.compared(read[0])[0], k, torch.stack(pivots), self.objective)

    def _pivot(self, image: ImageTokens, slots: Tensor) -> Tensor:
        """Find where in the candidates (m,) the search starts: a scalar."""
        if self.pivot == "random":
            return (image.uniform(self.seed, 1)[0] * len(slots)).long()
        if self.pivot == "cls":
            attention = cls_attention(*image.qk(self.cls_layer))  # (c, p)
            attention = attention.unflatten(1, (image.side, -1)).to(slots.device)
            if image.video:  # the model pools frames after the projector: pool the attention alike
                side = int(image.grid_on_host[:, 1].max()) + 1
                attention = F.interpolate(attention[:, None], (side, side), mode="bilinear")[:, 0]
            else:
                attention = attention[:1]
            return at_tokens(attention, image.grid[slots]).argmax()
        similarity = similarity_to_mean(image.features[slots])
        return similarity.argmax() if self.pivot == "center" else similarity.argmin()


@dataclass
class ToDRE(Diversify):
    """Keep a diverse set of tokens (stage 1, `Diversify`), and drop them all late in the decoder (`DropVisual`).

    There is no official release. This follows version 2 of the paper; version 1's objective is an option. Where the
    paper is silent: a share of tokens is rounded, not truncated; kept tokens stay in reading order, at renumbered
    rotary positions; CLS attention is a softmax over all keys, averaged over heads; the question is all text after the
    image; visual tokens of the early layers stay in the KV cache.

    The options of stage 1 are those of `Diversify`. Those of stage 2:

    layer : decoder layer before which the visual tokens are dropped: a number, a share of the depth, or a list of
            either; None leaves stage 2 out
    tau   : share of attention below which they are dropped; None drops unconditionally
    """

    budget_options: ClassVar = ("keep", "layer")

    layer: int | float | Sequence[int | float] | None = 7 / 8
    tau: float | None = 0.1

    def __post_init__(self) -> None:
        self.stages()  # each stage checks its options

    def stages(self) -> list[Compressor]:
        """Return stage 1, and stage 2 unless `layer` is None."""
        first = Diversify.stage_of(self)
        return [first] if self.layer is None else [first, DropVisual(self.layer, self.tau)]


@full_precision
def diverse(x: Tensor, k: int, pivot: Tensor, objective: str = "max_sum") -> Tensor:
    """Select diverse tokens greedily by cosine similarity, from a given first token. Ties go to the lower index.

    The cost is O(n^2 d) once, then O(n) a pick. Beyond `MATRIX_LIMIT` tokens it is O(n d) a pick instead.

    Args:
        x: (..., n, d) tokens.
        k: number of picks, 1 <= k <= n.
        pivot: (...) the first pick of each set.
        objective: "max_sum" or "k_center".

    Returns:
        (..., k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    n = x.shape[-2]
    unit = F.normalize(x, dim=-1).reshape(-1, n, x.shape[-1])
    similarity_to: Callable[[Tensor], Tensor]
    if n <= MATRIX_LIMIT:
        similarity = similarity_matrix(unit)
        similarity.diagonal(dim1=1, dim2=2).fill_(float("inf"))
        similarity_to = Rows(similarity)
    else:
        similarity_to = partial(similarity_row, unit)
    first = pivot.reshape(-1).to(x.device)
    return farthest_greedy(similarity_to, first, k, REDUCE[objective]).reshape(*pivot.shape, k)


def similarity_row(unit: Tensor, pick: Tensor) -> Tensor:
    """Compute the similarity of all unit vectors (b, n, d) to one of each image (b,): (b, n), infinite to itself."""
    row = torch.stack([x @ x.index_select(0, p)[0] for x, p in zip(unit, pick.split(1), strict=True)])
    return row.scatter_(1, pick[:, None], float("inf"))


@full_precision
def similarity_to_mean(x: Tensor) -> Tensor:
    """Compute the similarity of each unit vector to the mean of all, up to a positive factor: (n, d) -> (n,)."""
    x = F.normalize(x, dim=-1)
    return x @ x.mean(0)


def at_tokens(maps: Tensor, grid: Tensor) -> Tensor:
    """Read maps at the places of tokens.

    Args:
        maps: (c, height, width) a value for every place of the first c crops.
        grid: (n, 3) crop, row and column of every token (`ImageTokens.grid`).

    Returns:
        (n,), -inf at tokens of other crops and at tokens without a place.
    """
    crop, row, column = grid.unbind(1)
    inside = (grid >= 0).all(1) & (crop < len(maps))
    value = maps[crop.clamp(0, len(maps) - 1), row.clamp(min=0), column.clamp(min=0)]
    return value.masked_fill(~inside, float("-inf"))
