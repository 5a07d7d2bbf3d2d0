"""Outliers among numbers, by local density and by quartiles."""

import torch
from torch import Tensor


@torch.no_grad()
def local_outlier_factor(x: Tensor, k: int) -> Tensor:
    """Local outlier factor (Breunig et al., 2000) of numbers, in fp64.

    The k nearest of a number are among the k on each side of it in sorted order, so this is O(n k) after sorting.
    Ties go to the smaller number, then to the lower index.

    Args:
        x: (n,) the numbers.
        k: how many nearest others to compare with; at most n - 1 are there.

    Returns:
        (n,) about 1 inside a cluster, larger outside.
    """
    n = len(x)
    k = min(k, n - 1)
    if k < 1:
        return torch.ones(n, dtype=torch.float64, device=x.device)
    value, order = x.double().sort(stable=True)
    place = torch.arange(n, device=x.device)[:, None]
    near = place + torch.cat([torch.arange(-k, 0), torch.arange(1, k + 1)]).to(x.device)  # (n, 2k)
    distance = (value[near.clamp(0, n - 1)] - value[:, None]).abs()
    distance = distance.masked_fill((near < 0) | (near >= n), float("inf"))
    distance, nearest = (t[:, :k] for t in distance.sort(dim=1, stable=True))
    near = near.gather(1, nearest)
    reach = torch.maximum(distance, distance[:, -1][near])
    density = 1 / (reach.mean(1) + 1e-10)
    return torch.empty_like(value).scatter_(0, order, density[near].mean(1) / density)


def count_outliers(x: Tensor, k: int) -> int:
    """How many of the numbers x (n,) are outliers: their local outlier factor is above 1.5."""
    return int((local_outlier_factor(x, k) > 1.5).sum())


def beyond_quartiles(x: Tensor, factor: float = 1.5) -> Tensor:
    """(m,) bool: which of `x` (m,) lie more than `factor` interquartile ranges above the third quartile."""
    low, high = x.double().quantile(torch.tensor([0.25, 0.75], dtype=torch.float64))
    return x > high + factor * (high - low)
