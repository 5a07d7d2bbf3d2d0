"""Budgets that include newline tokens, which end the rows of an anyres mosaic, or a whole video or single view."""

import numpy as np
import torch
from torch import Tensor

NEWLINES = ("rows", "all", "drop")


def row_end_newline(grid: np.ndarray, tiles: tuple[int, int]) -> np.ndarray:
    """Find the newline token that ends the row of each token.

    The rows of a thumbnail have no newline. The one newline of a single view, or of a video, ends it as a whole.

    Args:
        grid: (n, 3) `ImageTokens.grid_on_host`.
        tiles: `ImageTokens.tiles`.

    Returns:
        (n,) indices, -1 where no newline ends the row.
    """
    crop = grid[:, 0]
    newline = np.flatnonzero(crop < 0)
    following = np.searchsorted(newline, np.arange(len(grid)))
    ended = (crop >= (1 if tiles[1] else 0)) & (following < len(newline))
    return np.where(ended, np.append(newline, -1)[following], -1)


def fill_budget(order: Tensor, grid: np.ndarray, tiles: tuple[int, int], k: int, newline: str) -> Tensor:
    """Fill a budget of k tokens with ranked patches and with newlines, without waiting for the device.

    Args:
        order: (t,) patches of an image, best first; at least k of them if the image has that many.
        grid: (n, 3) `ImageTokens.grid_on_host`.
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
    grid = np.asarray(grid)
    n, device = len(grid), order.device
    rank = torch.arange(len(order), device=device)
    # of each token, its turn among all n, and its kind: 0 for a patch, 1 for a newline, 2 for what only fills up
    turn, kind = torch.arange(2 * n, 3 * n, device=device), torch.full((n,), 2, device=device)
    kind = kind.index_fill(0, order, 0)
    if newline == "rows":
        end = torch.from_numpy(row_end_newline(grid, tiles)).to(device, non_blocking=True)[order]  # (t,)
        # (n + 1,) the best rank of a row, by the row's newline; entry 0 is for rows without one
        best = rank.new_full((n + 1,), len(order)).scatter_reduce(0, end + 1, rank, "amin")
        brings = (end >= 0) & (best[end + 1] == rank)
        spent = (1 + brings).cumsum(0)  # by each patch and all better ones, with their newlines
        turn = turn.index_copy(0, order, spent - brings.long())
        brought = torch.where(brings, end, n)  # entry n takes what brings nothing
        turn = torch.cat([turn, turn[:1]]).index_copy(0, brought, spent)[:n]
        kind = torch.cat([kind, kind[:1]]).index_copy(0, brought, torch.ones_like(end))[:n]
    else:
        turn = turn.index_copy(0, order, rank)
    if newline == "all":
        newlines = np.flatnonzero(grid[:, 0] < 0)
        if k <= len(newlines):
            raise ValueError(
                f"keep={k} leaves no room for patches beside the image's {len(newlines)} newlines; "
                "keep more, or use newline='rows'"
            )
        at = torch.from_numpy(newlines).to(device, non_blocking=True)
        turn = turn.index_copy(0, at, torch.arange(-len(newlines), 0, device=device))
        kind = kind.index_fill(0, at, 1)
    kept = turn.argsort()[:k]
    return kept[(3 * n * kind + turn)[kept].argsort()]
