"""The complexity of an image, measured by the effective rank of its features, and the budget that follows from it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmslim.ops.greedy import similarity_matrix
from vlmslim.ops.ranking import full_precision


@full_precision
def effective_rank(x: Tensor) -> Tensor:
    """Compute the effective rank of the tokens of each image, without their mean: (b, n, d) -> (b,).

    It is the exponential of the entropy of the singular values: Roy and Vetterli, "The effective rank: a measure of
    effective dimensionality", EUSIPCO 2007.
    """
    x = x - x.mean(1, keepdim=True)
    x = x if x.shape[1] < x.shape[2] else x.transpose(1, 2)  # the smaller product has the same spectrum
    gram = similarity_matrix(x.double())
    value = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    part = value / value.sum(1, keepdim=True).clamp(min=1e-300)
    return torch.special.entr(part).sum(1).exp().float()


def adapted(k: int, n: int, rank: float, average: float) -> int:
    """Return the budget of an image of n tokens with a given effective rank, if k is that of an average image.

    It lies between half and twice of k.
    """
    return min(max(round(k * rank / average), max(1, k // 2)), min(n, 2 * k))


def solve_average(budgets: Sequence[int], sizes: Sequence[int], ranks: Sequence[float]) -> float:
    """Find the effective rank of an average image, so that the adapted budgets sum to the budgets, as near as may be.

    Args:
        budgets: of each image, if its rank were average.
        sizes: tokens of each image.
        ranks: effective rank of each image.
    """

    def excess(average: float) -> int:
        images = zip(budgets, sizes, ranks, strict=True)
        return sum(adapted(k, n, rank, average) - k for k, n, rank in images)

    low, high = max(min(ranks) / 4, 1e-6), 4 * max(*ranks, 1e-6)  # everything at its most, and at its least
    for _ in range(60):  # the budgets fall as the average grows
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return min((low, high), key=lambda average: abs(excess(average)))
