"""DivPrune: "Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025, arXiv 2503.02175)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Keep, check_choices
from vlmslim.methods._selection import Pool, Selection
from vlmslim.ops.greedy import Farthest, Rows, greedy, similarity_matrix
from vlmslim.ops.ranking import full_precision


@dataclass
class DivPrune(Selection):
    """Keep a subset of visual tokens whose smallest pairwise cosine distance is large (algorithm 1 of the paper).

    Differs from the release (commit 799e2d9) where the release misbehaves. Distances are computed in fp32 instead of
    the model's dtype, because rounding changes which tokens are picked. No token is picked twice. A zero token is at
    distance 1 from all others, instead of NaN. Every image of every sample is pruned, wherever it stands in the
    prompt. At least one token stays. On distinct fp32 tokens the picks are those of the release.

    keep      : visual tokens to keep per image, a count or a share; the paper uses 0.098
    order     : "raster" feeds the kept tokens in reading order, as the release does; "selection" in the order in
                which they were picked, as the runs for the paper's tables did
    newline   : newline tokens of anyres images and videos, which count within the budget. "pool" lets them compete
                with patches, as the release does (they are identical, so at most one stays); "drop" removes them;
                "rows" keeps the newline of each row that keeps a token
    positions : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    keep: Keep = 0.098
    order: str = "raster"
    newline: str = "pool"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(self, order=("raster", "selection"), newline=("pool", "drop", "rows"))

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Search for the farthest points."""
        x, weight = self.compared(read[0])
        return farthest_points(x, k, weight)


@full_precision
def farthest_points(x: Tensor, k: int, weight: Tensor | None = None) -> Tensor:
    """Select tokens greedily by the largest smallest cosine distance.

    The first pick is the token farthest from its nearest neighbour. Each next pick is the token farthest from the
    tokens picked so far. Ties go to the lower index. The cost is O(n^2 d) once, then O(n) a pick.

    Args:
        x: (..., n, d) tokens.
        k: number of picks, 1 <= k <= n.
        weight: (..., n) of the distance, from the second pick on; None for 1.

    Returns:
        (..., k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    unit = F.normalize(x, dim=-1)
    closeness = similarity_matrix(unit.reshape(-1, *x.shape[-2:])).sub_(1)  # minus the distance
    closeness.diagonal(dim1=1, dim2=2).fill_(-float("inf"))  # a token is not its own neighbour
    first = closeness.amax(2).argmin(1)
    closeness.diagonal(dim1=1, dim2=2).fill_(0)
    weight = None if weight is None else weight.reshape(len(first), -1)
    return greedy(Farthest(Rows(closeness), torch.maximum, weight), k, first).view(*x.shape[:-2], k)
