"""DivPrune: "Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025, arXiv 2503.02175)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import ImageTokens, Keep, check_choices, check_keep
from vlmslim.methods._greedy import GreedySelection, least_close
from vlmslim.ops.selection import full_precision


@dataclass
class DivPrune(GreedySelection):
    """Keep the subset of visual tokens whose smallest pairwise cosine distance is large (algorithm 1 of the paper).

    Departures from the release (commit 799e2d9), each because the release misbehaves there: distances are computed
    in fp32, not in the model's dtype, where rounding re-picks tokens; a picked token is never picked again; a zero
    token is at distance 1 from all others instead of NaN; every image of every sample is pruned, wherever it stands;
    at least one token stays. On distinct fp32 tokens the picks are those of the release.

    keep      : visual tokens to keep per image, a count or a share. The paper uses 0.098
    order     : "raster" feeds the kept tokens in reading order, as the release does; "selection" in the order in
                which they were picked, as the runs behind the paper's tables did
    newline   : newline tokens of anyres images and videos: "pool" lets them compete as the release does (they are all
                alike, so at most one survives), "drop" removes them, "rows" keeps the newline of each row that keeps
                a token; all within the budget
    positions : "renumbered" (as released) or "original" rotary positions
    """

    keep: Keep = 0.098
    order: str = "raster"
    newline: str = "pool"
    positions: str = "renumbered"

    def __post_init__(self):
        check_keep(self.keep)
        check_choices(self, order=("raster", "selection"), newline=("pool", "drop", "rows"))
        if self.order == "selection" and self.positions == "original":
            raise ValueError(
                "order='selection' moves tokens away from their places; use positions='renumbered' with it"
            )

    def search(self, x: Tensor, k: int, images: Sequence[ImageTokens], pools: Sequence[Tensor]) -> Tensor:
        """Farthest points."""
        return farthest_points(x, k)


@full_precision
def farthest_points(x: Tensor, k: int) -> Tensor:
    """Greedy max-min selection by cosine distance.

    The first pick is the token farthest from its nearest neighbour; each next one the token farthest from those
    picked so far. Ties go to the lower index. O(n^2 d) once, then O(n) a pick, without synchronisation.

    Args:
        x: (..., n, d) tokens.
        k: how many to pick, 1 <= k <= n.

    Returns:
        (..., k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    n = x.shape[-2]
    unit = F.normalize(x, dim=-1).reshape(-1, n, x.shape[-1])
    # one image at a time: a batched product may round otherwise, and an image must not depend on its batch
    closeness = torch.stack([one @ one.T for one in unit]).sub_(1)  # minus the distance
    diagonal = closeness.diagonal(dim1=1, dim2=2)
    diagonal.fill_(-float("inf"))
    first = closeness.amax(2).argmin(1)
    diagonal.fill_(float("inf"))  # once picked, a token is nobody's farthest
    return least_close(closeness, first, k, "maximum").view(*x.shape[:-2], k)
