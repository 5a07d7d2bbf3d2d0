"""ToDRE: "Effective Visual Token Pruning via Token Diversity and Task Relevance" (arXiv 2505.18757)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmslim.compressor import Compressor, ImageTokens, Keep, check_choices, check_keep
from vlmslim.engine.families import has_cls
from vlmslim.methods._greedy import GreedySelection, least_close, least_close_to
from vlmslim.methods.drop_visual import DropVisual
from vlmslim.ops.attention import cls_attention
from vlmslim.ops.selection import full_precision

GRAM_LIMIT = 8192  # tokens up to which all cosine similarities are held at once: 256 MiB


@dataclass
class Diversify(GreedySelection):
    """Stage 1: start from one pivot token and add, again and again, the token most unlike those chosen so far.

    Candidates are the projected tokens of all crops or frames together, compared by cosine similarity.

    keep      : visual tokens to keep per image, a count or a share. The paper reports 0.25 and 0.1
    objective : "max_sum" adds the token whose summed similarity to the chosen ones is smallest (second version of the
                paper); "k_center" the one whose nearest chosen token is farthest (first version), which covers
                clusters where max-sum goes for the outskirts
    pivot     : "auto" is "cls" on a tower with a CLS token and "random" without; "cls" the patch with the highest CLS
                attention (in the thumbnail, under anyres; in any frame, of a video); "random"; "center" and
                "farthest", the token most and least similar to the mean. All within 0.4 points of one another
    cls_layer : vision-tower layer of the CLS attention; -1 is the last, as in the paper, -2 the one LLaVA reads
    newline   : newline tokens of anyres images and videos: "rows" keeps the newline of each row that keeps a token,
                "drop" removes them, "pool" lets them compete; all within the budget
    seed      : of the random pivot, which depends on the image's pixels as well
    positions : "renumbered" or "original" rotary positions
    """

    keep: Keep = 0.1
    objective: str = "max_sum"
    pivot: str = "auto"
    cls_layer: int = -1
    newline: str = "rows"
    seed: int = 0
    positions: str = "renumbered"

    def __post_init__(self):
        check_keep(self.keep)
        check_choices(
            self,
            objective=("max_sum", "k_center"),
            pivot=("auto", "cls", "random", "center", "farthest"),
            newline=("rows", "drop", "pool"),
        )

    def setup(self, model: nn.Module) -> None:
        """See whether there is a CLS token to take the pivot from."""
        if self.pivot == "auto":
            self.pivot = "cls" if has_cls(model.model) else "random"
        elif self.pivot == "cls" and not has_cls(model.model):
            raise ValueError(
                f"pivot='cls' needs a CLS token, and {type(model.model.vision_tower).__name__} has none; "
                "use 'random', which is what 'auto' takes there"
            )
        self.tower_layers = (self.cls_layer,) if self.pivot == "cls" else ()

    def search(self, x: Tensor, k: int, images: Sequence[ImageTokens], pools: Sequence[Tensor]) -> Tensor:
        """From each image's pivot on."""
        pivots = [self._pivot(image, pool) for image, pool in zip(images, pools, strict=True)]
        return diverse(x, k, torch.stack(pivots), self.objective)

    def _pivot(self, image: ImageTokens, pool: Tensor) -> Tensor:
        """Where in `pool` (m,) the search starts: a scalar."""
        if self.pivot == "random":
            return torch.randint(len(pool), (), generator=image.generator(self.seed)).to(pool.device)
        if self.pivot == "cls":
            attention = cls_attention(*image.qk(self.cls_layer))  # (c, p)
            attention = attention.unflatten(1, (image.side, -1)).to(pool.device)
            if image.video:
                side = int(image.grid[:, 1].max()) + 1  # frames are pooled after the projector: pool alike
                attention = F.interpolate(attention[:, None], (side, side), mode="bilinear")[:, 0]
            else:
                attention = attention[:1]
            return at_tokens(attention, image.grid[pool]).argmax()
        likeness = to_mean(image.features[pool])
        return likeness.argmax() if self.pivot == "center" else likeness.argmin()


@dataclass
class ToDRE(Diversify):
    """Two stages: keep a diverse set of tokens (`Diversify`), drop them all late in the decoder (`DropVisual`).

    There is no official release; this follows the second version of the paper, with the first version's objective as
    an option. Where the paper is silent: a share of tokens is rounded, not cut; kept tokens stay in reading order, at
    renumbered rotary positions; CLS attention is a softmax over all keys, averaged over heads; the question's tokens
    are all text behind the image; visual tokens of the early layers stay in the KV cache.

    Options of stage 1 are those of `Diversify`; of stage 2:

    layer : decoder layer before which the visual tokens are dropped, a number or a share of the depth or a list of
            them; None leaves stage 2 out
    tau   : attention share under which they are dropped; None drops unconditionally
    """

    budget_options: ClassVar = ("keep", "layer")

    layer: int | float | list[int | float] | None = 7 / 8
    tau: float | None = 0.1

    def __post_init__(self):
        self.stages()  # each stage checks its options

    def stages(self) -> list[Compressor]:
        """Stage 1, and stage 2 unless `layer` is None."""
        first = Diversify(**{f.name: getattr(self, f.name) for f in fields(Diversify)})
        return [first] if self.layer is None else [first, DropVisual(self.layer, self.tau)]


@full_precision
def diverse(x: Tensor, k: int, pivot: Tensor, objective: str = "max_sum") -> Tensor:
    """Greedy diverse selection by cosine similarity, from a given first token.

    Ties go to the lower index. O(n) a pick behind one O(n^2 d) matrix product, which beyond `GRAM_LIMIT` tokens is
    computed a row a pick instead, O(n d); no synchronisation.

    Args:
        x: (..., n, d) tokens.
        k: how many to pick, 1 <= k <= n.
        pivot: (...) the first pick of each set.
        objective: "max_sum" or "k_center".

    Returns:
        (..., k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    fold = {"max_sum": "add", "k_center": "maximum"}[objective]
    n = x.shape[-2]
    x = F.normalize(x, dim=-1).reshape(-1, n, x.shape[-1])
    first = pivot.reshape(-1).to(x.device)

    def similarity(pick: Tensor) -> Tensor:
        row = torch.stack([one @ one.index_select(0, p)[0] for one, p in zip(x, pick.split(1), strict=True)])
        return row.scatter_(1, pick[:, None], float("inf"))

    if n <= GRAM_LIMIT:
        # one image at a time: a batched product may round otherwise, and an image must not depend on its batch
        gram = torch.stack([one @ one.T for one in x])
        gram.diagonal(dim1=1, dim2=2).fill_(float("inf"))
        picks = least_close(gram, first, k, fold)
    else:
        picks = least_close_to(similarity, first, k, fold)
    return picks.reshape(*pivot.shape, k)


@full_precision
def to_mean(x: Tensor) -> Tensor:
    """Similarity of each token to the mean of all, up to a positive factor: (n, d) -> (n,), on unit vectors."""
    x = F.normalize(x, dim=-1)
    return x @ x.mean(0)


def at_tokens(maps: Tensor, grid: Tensor) -> Tensor:
    """Read maps of values off at the tokens' places.

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
