"""Greedy searches that add, again and again, the token that is least close to the tokens picked so far."""

from collections.abc import Callable

import torch
from torch import Tensor


def similarity_matrix(unit: Tensor) -> Tensor:
    """Compute all pairwise products of each image's tokens: (b, n, d) -> (b, n, n).

    One image at a time, because a batched product may round otherwise, and an image must not depend on its batch.
    """
    return torch.stack([x @ x.T for x in unit])


def rows_of(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that looks up one row of each (n, n) matrix: indices (b,) -> (b, n)."""
    image = torch.arange(len(matrix), device=matrix.device)
    return lambda pick: matrix[image, pick]


def farthest_greedy(
    closeness_to: Callable[[Tensor], Tensor], first: Tensor, k: int, reduce: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Start from one token, and add k - 1 times the token that is least close to those picked; ties to the lower index.

    A pick takes three tensor operations and no device synchronisation.

    Args:
        closeness_to: how close all tokens of each image are to one of them: indices (b,) -> (b, n). It has to be
            infinite at the token itself, because that keeps a picked token from being picked again.
        first: (b,) the first pick of each image.
        k: number of picks, 1 <= k <= n.
        reduce: how closeness to several tokens follows from closeness to each: `torch.maximum` or `torch.add`.

    Returns:
        (b, k) indices in the order of selection; the first j of them are the result for k = j.
    """
    picks, closeness = [first], closeness_to(first)
    for _ in range(k - 1):
        picks.append(closeness.argmin(1))
        closeness = reduce(closeness, closeness_to(picks[-1]))
    return torch.stack(picks, dim=1)
