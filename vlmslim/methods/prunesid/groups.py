"""PruneSID's groups of patches: components, suppression of near-copies, and shares of the budget."""

from fractions import Fraction
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.ops.ranking import full_precision


@full_precision
def loadings(x: Tensor, q: int, start: Tensor | None = None) -> Tensor:
    """Compute how strongly each patch loads on each of the first q principal components.

    Args:
        x: (n, d) patches.
        q: number of components; at most n count.
        start: (min(n, d), q) of two subspace iterations, as released; None for exact components.

    Returns:
        (n, q) not negative.
    """
    sample = torch.sigmoid(x)
    sample = sample - sample.mean(1, keepdim=True)
    if start is None:
        vectors = torch.linalg.eigh(sample.double() @ sample.double().T)[1].flip(1)  # the largest first
        return vectors[:, :q].abs().to(x)
    wide = sample.T if x.shape[1] >= len(x) else sample  # (d, n), or (n, d) if that is taller
    basis = torch.linalg.qr(wide @ start.to(wide))[0]
    for _ in range(2):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    left, _, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    return (right.T if wide.shape[1] == len(x) else basis @ left).abs()


@full_precision
def choose(
    x: Tensor,
    weight: Tensor,
    score: Tensor,
    k: int,
    budget: int,
    threshold: float | None = None,
    released: bool = False,
) -> Tensor:
    """Choose patches group by group.

    Args:
        x: (n, d) patches, compared by cosine.
        weight: (n, q) their loadings.
        score: (n,) what decides within a group.
        k: T, on which threshold and limits depend.
        budget: number of patches to choose.
        threshold: cosine above which a patch is suppressed; None for T / 32 times the mean of all pairs.
        released: count patches of score 0 as suppressed.

    Returns:
        (budget,) indices: the groups in order, of each those not suppressed first, by score.
    """
    n, unit, group = len(x), F.normalize(x, dim=-1, eps=1e-12), weight.argmax(1)
    similarity = unit @ unit.T
    if threshold is None:
        threshold = k / 32 * similarity.triu(1).sum().item() / max(1, n * (n - 1) // 2)
    alive = unsuppressed((similarity > threshold) & (group[:, None] == group), score)
    alive = alive & (score > 0) if released else alive
    count, survivors = (group[kept].bincount(minlength=weight.shape[1]) for kept in (alive | True, alive))
    quota = quotas(count.tolist(), survivors.tolist(), k, budget)
    order = score.argsort(descending=True, stable=True)
    order = order[(2 * group + ~alive)[order].argsort(stable=True)]
    place = torch.arange(n, device=x.device) - (count.cumsum(0) - count)[group[order]]  # within the group
    return order[place < torch.tensor(quota, device=x.device)[group[order]]]


def unsuppressed(conflict: Tensor, score: Tensor) -> Tensor:
    """Take tokens by falling score (n,), unless they conflict (n, n) with one taken before: (n,) bool."""
    order = score.argsort(descending=True, stable=True).cpu()
    table, alive = conflict.cpu().numpy(), torch.ones(len(order), dtype=torch.bool).numpy()
    for i in order.tolist():
        if alive[i]:
            alive &= ~table[i]
            alive[i] = True
    return torch.from_numpy(alive).to(score.device)


def quotas(count: list[int], survivors: list[int], k: int, budget: int) -> list[int]:
    """Share a budget out over groups of `count` patches, of which `survivors` were not suppressed."""
    lower = [min(1, size) for size in count]
    upper = [min(5 * -(-k // 64), size, alive) for size, alive in zip(count, survivors, strict=True)]
    while sum(upper) < min(k, sum(count)):
        upper = [min(limit + 1, size) for limit, size in zip(upper, count, strict=True)]
    other = max(0, budget - sum(lower))
    ends = [round(Fraction(other * done, max(1, sum(survivors)))) for done in accumulate(survivors)]
    parts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    quota = [min(least + part, limit) for least, part, limit in zip(lower, parts, upper, strict=True)]
    for i in sorted(range(len(quota)), key=lambda i: -survivors[i]):
        quota[i] += max(0, min(upper[i] - quota[i], budget - sum(quota)))
    return quota
