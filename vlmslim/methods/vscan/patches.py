"""VScan's choice of patches, and what the others merge into."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.engine.layout import to_device
from vlmslim.ops.ranking import full_precision, membership, rank_within_groups


def windows(place: np.ndarray, side: int) -> np.ndarray:
    """Return the window (m,) of patches at rows and columns (m, 2); the last windows take what is left over."""
    count = ((place.max(0) + 1) // side).clip(min=1)
    row, column = np.minimum(place // side, count - 1).T
    return row * count[1] + column


def local_and_global(shallow: Tensor, deep: Tensor, window: np.ndarray, k: int, half: int) -> tuple[Tensor, Tensor]:
    """Choose k of m patches.

    Args:
        shallow: (m,) attention that decides on local tokens.
        deep: (m,) attention that decides on global tokens.
        window: (m,) the window of each patch, on the host.
        k: number of picks.
        half: number of local ones, as far as their windows have room.

    Returns:
        Local tokens and global ones, best first.
    """
    sizes = np.unique(window, return_counts=True)[1]
    room = -(-half // len(sizes))
    (group,) = to_device(shallow.device, window)
    full = rank_within_groups(shallow[None], group[None])[0] >= room
    order = shallow.argsort(descending=True, stable=True)
    local = order[full[order].byte().argsort(stable=True)][: min(half, int(sizes.clip(max=room).sum()))]
    rest = deep.index_fill(0, local, float("-inf"))
    return local, rest.argsort(descending=True, stable=True)[: k - len(local)]


def released_mask(shallow: Tensor, deep: Tensor, k: int) -> Tensor:
    """Choose patches of a crop (p,) as the release does: (p,) bool, at most k of them True."""
    side = round(len(shallow) ** 0.5)
    grid = torch.arange(len(shallow), device=shallow.device)
    window = grid // side // (side // 4) * 4 + grid % side // (side // 4)
    local = rank_within_groups(shallow[None], window[None])[0] < k // 2 // 16
    rest = deep.masked_fill(local, 0).argsort(descending=True, stable=True)[: k - k // 2]
    return local.index_fill(0, rest, True)


@full_precision
def merged(x: Tensor, kept: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """Average each token that is not kept into the kept token of its group that it resembles most, the first on ties.

    Args:
        x: (n, d) tokens, compared by cosine.
        kept: (k,) those that stay, ascending.
        group: (n,) -1 for tokens that neither merge nor take others in.

    Returns:
        (k, d), and (n - k,) the place among the kept that each other token joins, -1 where there is none in its group.
    """
    stays = torch.zeros(len(x), dtype=torch.uint8, device=x.device).index_fill(0, kept, 1)
    left = stays.argsort(stable=True)[: len(x) - len(kept)]
    unit = F.normalize(x, dim=-1)
    allowed = (group[left][:, None] == group[kept]) & (group[left] >= 0)[:, None]
    best, near = (unit[left] @ unit[kept].T).masked_fill(~allowed, float("-inf")).max(1)
    near = near.where(best > float("-inf"), -1)
    joins = membership(near, len(kept)).to(x)  # (k, n - k)
    return (x[kept] + joins @ x[left]) / (1 + joins.sum(1, keepdim=True)), near
