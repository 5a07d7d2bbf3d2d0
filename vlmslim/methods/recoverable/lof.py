"""Outliers among numbers, by their local density."""

import torch
from torch import Tensor

THRESHOLD = 1.5  # a number with a larger factor is an outlier


@torch.no_grad()
def local_outlier_factor(x: Tensor, k: int) -> Tensor:
    """Compute the local outlier factor (Breunig et al., 2000) of numbers, in fp64.

    The k nearest neighbours of a number are among the k on each side of it in sorted order, so this takes O(n k) after
    sorting. Ties go to the smaller number, then to the lower index.

    Args:
        x: (n,) the numbers.
        k: how many nearest neighbours to compare with; at most n - 1 are used.

    Returns:
        (n,) about 1 inside a cluster, larger outside.
    """
    n = len(x)
    k = min(k, n - 1)
    if k < 1:
        return torch.ones(n, dtype=torch.float64, device=x.device)
    value, order = x.double().sort(stable=True)
    place = torch.arange(n, device=x.device)[:, None]
    near = place + torch.cat([torch.arange(-k, 0), torch.arange(1, k + 1)]).to(x.device)  # (n, 2k) both sides
    distance = (value[near.clamp(0, n - 1)] - value[:, None]).abs()
    distance = distance.masked_fill((near < 0) | (near >= n), float("inf"))
    distance, nearest = (t[:, :k] for t in distance.sort(dim=1, stable=True))
    near = near.gather(1, nearest)  # (n, k)
    reach = torch.maximum(distance, distance[:, -1][near])  # reachability distance
    density = 1 / (reach.mean(1) + 1e-10)
    return torch.empty_like(value).scatter_(0, order, density[near].mean(1) / density)


def count_outliers(x: Tensor, k: int) -> int:
    """Count the numbers x (n,) whose local outlier factor exceeds `THRESHOLD`."""
    return int((local_outlier_factor(x, k) > THRESHOLD).sum())
