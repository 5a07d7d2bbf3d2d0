"""The searches of `vlmslim.ops.greedy` in NumPy, which starts an operation faster than PyTorch does on a CPU."""

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray


def search(kind: str, matrix: Tensor, first: Tensor, weight: Tensor, bonus: Tensor, k: int, floor: float) -> Tensor:
    """Make all steps of a search, image by image.

    Args:
        kind: "sum", "max", "coverage" or "determinant". It and the next fields are those of `greedy.Stream`.
        matrix: (b, n, n), or (b, n, m) for "coverage".
        first: (b,) the first pick of each image.
        weight: (b, n).
        bonus: (b, n).
        k: number of picks, 1 <= k <= n.
        floor: of a determinant.

    Returns:
        (b, k) indices in the order of selection.

    Raises:
        ValueError: a score is NaN.
    """
    found = np.empty((len(first), k), dtype=np.int64)
    found[:, 0] = first
    images = zip(found, *(x.detach().numpy() for x in (matrix, weight, bonus)), strict=True)
    for picks, rows, scale, added in images:
        if kind == "determinant":
            _determinant(picks, rows, added, floor)
        elif kind == "coverage":
            _coverage(picks, rows, scale, added)
        else:
            _streamed(picks, rows, scale, added, np.add if kind == "sum" else np.maximum)
    return torch.from_numpy(found)


def _streamed(picks: Array, matrix: Array, weight: Array, bonus: Array, combine: np.ufunc) -> None:
    """Fill `picks` (k,) from the second on, each time with the token of least closeness to those before."""
    closeness = matrix[picks[0]].copy()
    for step in range(1, len(picks)):
        cost = weight * closeness - bonus
        cost[picks[:step]] = np.inf
        picks[step] = pick = cost.argmin()
        _refuse_nan(cost[pick])
        combine(closeness, matrix[pick], out=closeness)


def _coverage(picks: Array, covers: Array, weight: Array, bonus: Array) -> None:
    """Fill `picks` (k,) from the second on, each time with the token that adds most coverage.

    Coverage only grows, so a gain never rises, rounding included. What a token gained in an earlier step bounds what it
    gains now. So each step scores the token of the largest bound again, and then those whose bounds are not below that.
    """
    covered = np.zeros(covers.shape[1], dtype=covers.dtype)

    def gains(tokens: list[int] | Array) -> Array:
        new = covers[tokens]
        new -= covered
        return np.maximum(new, 0, out=new).sum(1) * weight[tokens] + bonus[tokens]

    bound = np.full_like(weight, np.inf)
    for step in range(1, len(picks)):
        np.maximum(covered, covers[picks[step - 1]], out=covered)
        bound[picks[step - 1]] = -np.inf
        top = int(bound.argmax())
        (gain,) = gains([top])
        (near,) = np.nonzero(bound >= gain)
        bound[near] = gains(near)
        picks[step] = pick = bound.argmax()
        _refuse_nan(gain + bound[pick])


def _determinant(picks: Array, kernel: Array, fallback: Array, floor: float) -> None:
    """Fill `picks` (k,) from the second on, each time with the token that most raises the determinant."""
    factor = kernel.diagonal().copy()
    _refuse_nan(factor.sum())
    least = floor * factor.max()
    found = np.zeros((len(picks), len(kernel)), dtype=kernel.dtype)  # rows of the Cholesky decomposition
    for step in range(1, len(picks)):
        pick = picks[step - 1]
        if factor[pick] > least:
            known = found[: step - 1]
            found[step - 1] = row = (kernel[pick] - known[:, pick] @ known) / np.sqrt(factor[pick])
            factor -= row * row
        score = np.where(factor > least, factor, fallback)
        score[picks[:step]] = -np.inf
        picks[step] = score.argmax()


def _refuse_nan(score: float) -> None:
    if np.isnan(score):  # which NumPy takes for the largest and for the smallest number
        raise ValueError("a search among NaNs has no best token; check that features and scores are finite")
