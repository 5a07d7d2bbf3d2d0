"""Newline tokens end the rows of an anyres mosaic, or a video as a whole; here a budget pays for them."""

import torch
from torch import Tensor
from torch.nn import functional as F

NEWLINES = ("rows", "all", "drop")


def closing_newline(grid: Tensor, tiles: tuple[int, int]) -> Tensor:
    """(n,): the newline token that ends the row of each token of `ImageTokens.grid` (n, 3), -1 where none does.

    The rows of a thumbnail have none. The one newline of a single view, or of a video, ends it as a whole.
    """
    crop = grid[:, 0]
    newline = (crop < 0).nonzero()[:, 0]
    at = torch.searchsorted(newline, torch.arange(len(grid), device=grid.device))
    ended = (crop >= (1 if tiles[1] else 0)) & (at < len(newline))
    return torch.where(ended, F.pad(newline, (0, 1), value=-1)[at], -1)


def spend(order: Tensor, grid: Tensor, tiles: tuple[int, int], k: int, newline: str) -> Tensor:
    """Spend a budget on ranked patches and on their newlines.

    Args:
        order: (t,) patches of an image, most wanted first; at least k of them if there are that many.
        grid: (n, 3) `ImageTokens.grid`.
        tiles: `ImageTokens.tiles`.
        k: the budget, newlines included.
        newline: "rows": the first token of a row brings the row's newline along (if the budget ends between the two,
            the newline stays out); "all": every newline is kept; "drop": none is.

    Returns:
        (k,) indices: patches as ranked, then newlines. If these are used up, what is left of the image follows.

    Raises:
        ValueError: newline="all" and the newlines leave no room for a patch.
    """
    if newline == "rows":
        closes = closing_newline(grid, tiles)[order]
        place = torch.arange(len(order), device=order.device)
        opener = place.new_full((len(grid) + 1,), len(order)).scatter_reduce(0, closes + 1, place, "amin")
        first = (opener[closes + 1] == place) & (closes >= 0)
        spent = (1 + first).cumsum(0)
        kept = torch.cat([order[spent - first.long() <= k], closes[first & (spent <= k)]])
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
