"""Index maths that several methods share. Pure tensor functions; nothing here knows a model."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def full_precision(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a scoring function in fp32 whatever the model runs in, autocast included.

    Half precision re-picks tokens and changes sets: distances between neighbours drown in rounding.
    """

    @wraps(function)
    def scored(x: Tensor, *args, **kwargs) -> Tensor:
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return function(x.float(), *args, **kwargs)

    return scored


def rank_within_groups(score: Tensor, group: Tensor) -> Tensor:
    """Rank of every element among those of its row and group, 0 for the highest score, ties to the lower index.

    Args:
        score: (B, S).
        group: (B, S) non-negative integers.

    Returns:
        (B, S) long.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))  # by group, then by score
    grouped = group.gather(1, order)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place - torch.searchsorted(grouped, grouped))


def grid_cells(height: int, width: int, k: int) -> Tensor:
    """Cover a height x width grid with exactly k rectangles, as square and as even as k allows.

    The grid is cut into bands of rows, and each band into cells; a k that divides well gives a regular grid.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        k: number of cells, 1 <= k <= height * width.

    Returns:
        (height, width) long: the cell, 0 .. k-1 in reading order, that each grid point belongs to.

    Raises:
        ValueError: k does not fit.
    """
    if not 1 <= k <= height * width:
        raise ValueError(f"a {height} x {width} grid has no partition into {k} cells")
    bands = min(height, k, max(1, round((k * height / width) ** 0.5), -(-k // width)))
    cells = torch.empty(height, width, dtype=torch.long)
    rows = _edges(height, bands)
    counts = [b - a for a, b in _pairs(_edges(k, bands))]
    first = 0
    for (top, bottom), count in zip(_pairs(rows), counts, strict=True):
        columns = torch.tensor(_edges(width, count)[1:-1], dtype=torch.long)
        cells[top:bottom] = first + torch.bucketize(torch.arange(width), columns, right=True)
        first += count
    return cells


def share_out(k: int, sizes: list[int]) -> list[int]:
    """Split a budget of k over components in proportion to their sizes, by largest remainder.

    Ties go to the earlier component. The parts sum to k and none exceeds its component.

    Raises:
        ValueError: k exceeds the sum of the sizes.
    """
    total = sum(sizes)
    if k > total:
        raise ValueError(f"cannot keep {k} of {total} tokens")
    parts = [k * size // total for size in sizes]
    remainders = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in remainders[: k - sum(parts)]:
        parts[i] += 1
    return parts


def largest_remainder(k: int, shares: tuple[float, ...]) -> list[int]:
    """Split k by shares that sum to 1; what rounding down leaves goes to the largest remainders, earlier ones first."""
    exact = [round(k * share, 9) for share in shares]
    parts = [int(part) for part in exact]
    for i in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])[: k - sum(parts)]:
        parts[i] += 1
    return parts


def _edges(length: int, parts: int) -> list[int]:
    return [i * length // parts for i in range(parts + 1)]


def _pairs(edges: list[int]) -> list[tuple[int, int]]:
    return list(zip(edges, edges[1:], strict=False))
