"""Budgets that include newline tokens, which end the rows of an anyres mosaic, or a whole video or single view."""

import torch
from torch import Tensor
from torch.nn import functional as F

NEWLINES = ("rows", "all", "drop")


def row_end_newline(grid: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Find the newline token that ends the row of each token.

    The rows of a thumbnail have no newline. The one newline of a single view, or of a video, ends it as a whole.

    Args:
        grid: (n, 3) `ImageTokens.grid`.
        tiles: `ImageTokens.tiles`.

    Returns:
        (n,) indices, -1 where no newline ends the row.
    """
    crop = grid[:, 0]
    newline = (crop < 0).nonzero()[:, 0]
    following = torch.searchsorted(newline, torch.arange(len(grid), device=grid.device))
    ended = (crop >= (1 if tiles[1] else 0)) & (following < len(newline))
    return torch.where(ended, F.pad(newline, (0, 1), value=-1)[following], -1)


def fill_budget(order: Tensor, grid: Tensor, tiles: tuple[int, int], k: int, newline: str) -> Tensor:
    """Fill a budget of k tokens with ranked patches and with newlines.

    Args:
        order: (t,) patches of an image, best first; at least k of them if the image has that many.
        grid: (n, 3) `ImageTokens.grid`.
        tiles: `ImageTokens.tiles`.
        k: the budget, newlines included.
        newline: "rows": the first kept patch of a row brings the row's newline along. If the budget ends between the
            two, the newline stays out. "all": every newline is kept. "drop": no newline is kept.

    Returns:
        (k,) indices: patches in the order of their ranks, then newlines. If both are used up before the budget is, the
        remaining tokens of the image follow.

    Raises:
        ValueError: newline="all", and the newlines leave no room for a patch.
    """
    if newline == "rows":
        end = row_end_newline(grid, tiles)[order]  # (t,)
        rank = torch.arange(len(order), device=order.device)
        # (n + 1,) the best rank of a row, by the row's newline; entry 0 is for rows without one
        best = rank.new_full((len(grid) + 1,), len(order)).scatter_reduce(0, end + 1, rank, "amin")
        brings = (end >= 0) & (best[end + 1] == rank)
        spent = (1 + brings).cumsum(0)  # by each patch and all better ones, with their newlines
        kept = torch.cat([order[spent - brings.long() <= k], end[brings & (spent <= k)]])
    elif newline == "all":
        newlines = (grid[:, 0] < 0).nonzero()[:, 0]
        if k <= len(newlines):
            raise ValueError(
                f"keep={k} leaves no room for patches beside the image's {len(newlines)} newlines; "
                "keep more, or use newline='rows'"
            )
        kept = torch.cat([order[: k - len(newlines)], newlines])
    else:
        kept = order[:k]
    if len(kept) < k:
        rest = torch.ones(len(grid), dtype=torch.bool, device=kept.device).index_fill(0, kept, False)
        kept = torch.cat([kept, rest.nonzero()[: k - len(kept), 0]])
    return kept
