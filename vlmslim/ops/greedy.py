"""Greedy searches: one loop that picks the best token of each image again and again, and the rules that say which.

A rule scores the tokens of b images, and learns after each step what was picked. The loop masks what is picked, batches
over images and makes no device synchronisation. Ties go to the lower index.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


class Rule(Protocol):
    """What tells one greedy search from another."""

    def score(self) -> Tensor:
        """Score all tokens of each image, higher is better: (b, n). What is picked already may get any score."""

    def add(self, pick: Tensor) -> None:
        """Learn that each image picked a token: indices (b,)."""


def greedy(rule: Rule, k: int, first: Tensor | None = None, at_once: int = 1) -> Tensor:
    """Pick k tokens of every image, each time the best that is left; ties to the lower index.

    Args:
        rule: scores the tokens.
        k: number of picks, 1 <= k <= n.
        first: (b,) the first pick of each image; None for the best by the rule's first score.
        at_once: picks per step. Those of one step do not see each other; the last step takes what is missing.

    Returns:
        (b, k) indices in the order of selection. With `at_once=1` the first j of them are the result for k = j.
    """
    steps = [] if first is None else [first[:, None]]
    done, taken = len(steps), None
    while done < k:
        for column in steps[-1].unbind(1) if steps else ():
            rule.add(column)
        score = rule.score()
        taken = torch.zeros_like(score, dtype=torch.bool) if taken is None else taken
        if steps:
            taken.scatter_(1, steps[-1], True)
        score = score.masked_fill(taken, float("-inf"))
        if at_once == 1:
            steps.append(score.argmax(1, keepdim=True))
        else:
            steps.append(score.argsort(dim=1, descending=True, stable=True)[:, : min(at_once, k - done)])
        done += steps[-1].shape[1]
    return torch.cat(steps, dim=1)


# --- similarities -----------------------------------------------------------------------------------------------------


def similarity_matrix(unit: Tensor) -> Tensor:
    """Compute all pairwise products of each image's tokens: (b, n, d) -> (b, n, n).

    One image at a time, because a batched product may round otherwise, and an image must not depend on its batch.
    """
    return torch.stack([x @ x.T for x in unit])


def cosine_matrix(x: Tensor) -> Tensor:
    """Compute all pairwise cosines of each image's tokens, 0 to a zero token: (b, n, d) in fp32 -> (b, n, n)."""
    return similarity_matrix(F.normalize(x, dim=-1))


def rows_of(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that looks up one row of each (n, n) matrix: indices (b,) -> (b, n)."""
    image = torch.arange(len(matrix), device=matrix.device)
    return lambda pick: matrix[image, pick]


# --- rules ------------------------------------------------------------------------------------------------------------


class Farthest:
    """The token that is least close to those picked: max-min or max-sum, by how closeness is combined.

    The search needs a first pick.

    Args:
        closeness_to: how close all tokens of each image are to one of them: indices (b,) -> (b, n).
        reduce: how closeness to several tokens follows from closeness to each: `torch.maximum` or `torch.add`.
        weight: (b, n) of minus the closeness; None for 1.
    """

    def __init__(
        self,
        closeness_to: Callable[[Tensor], Tensor],
        reduce: Callable[[Tensor, Tensor], Tensor],
        weight: Tensor | None = None,
    ):
        self.closeness_to, self.reduce, self.weight = closeness_to, reduce, weight
        self.closeness: Tensor | None = None

    def score(self) -> Tensor:
        """Score by minus the closeness."""
        if self.closeness is None:
            raise ValueError("a search for the farthest token needs a first pick: greedy(..., first=...)")
        return -self.closeness if self.weight is None else -self.closeness * self.weight

    def add(self, pick: Tensor) -> None:
        """Combine with the closeness to the new pick."""
        new = self.closeness_to(pick)
        self.closeness = new if self.closeness is None else self.reduce(self.closeness, new)


class Coverage:
    """Facility location: the token that most raises the sum of what each row is covered by.

    A row is covered by its largest entry among the columns picked, and by 0 at first. With `weight`, the gain of each
    token is multiplied by its weight; with `bonus`, the bonus is added to it.

    Args:
        matrix: (b, m, n) how well each of n tokens covers each of m rows.
        weight: (b, n).
        bonus: (b, n).
    """

    def __init__(self, matrix: Tensor, weight: Tensor | None = None, bonus: Tensor | None = None):
        self.matrix, self.weight, self.bonus = matrix, weight, bonus
        self.covered = matrix.new_zeros(matrix.shape[:2])
        self.column = rows_of(matrix.transpose(1, 2))

    def score(self) -> Tensor:
        """Score by the gain in coverage."""
        gain = (self.matrix - self.covered[..., None]).clamp_(min=0).sum(1)
        gain = gain if self.weight is None else gain * self.weight
        return gain if self.bonus is None else gain + self.bonus

    def add(self, pick: Tensor) -> None:
        """Raise what the new column covers better."""
        self.covered = torch.maximum(self.covered, self.column(pick))


class Determinant:
    """Determinantal point process: the token that most raises the determinant of the kernel of those picked.

    The determinant grows by a factor that an incremental Cholesky decomposition keeps for every token. A token whose
    factor is lost in rounding, because the picked tokens span it, is picked after all others, the highest `fallback`
    first.

    Args:
        kernel: (b, n, n) symmetric, positive semidefinite.
        fallback: (b, n) in [0, 1].
        k: number of picks at most.
        floor: the factor, as a share of the largest entry of the diagonal, at or below which it counts as lost.
    """

    def __init__(self, kernel: Tensor, fallback: Tensor, k: int, floor: float = 1e-6):
        self.row, self.fallback = rows_of(kernel), fallback
        self.factor = kernel.diagonal(dim1=1, dim2=2).clone()
        self.least = floor * self.factor.amax(1, keepdim=True)
        self.found = kernel.new_zeros(len(kernel), k, kernel.shape[2])  # rows of the decomposition
        self.count = 0

    def score(self) -> Tensor:
        """Score by the factor, and below all factors by the fallback."""
        return torch.where(self.factor > self.least, self.factor, self.fallback - 2)

    def add(self, pick: Tensor) -> None:
        """Add a row to the decomposition."""
        at, found = pick[:, None], self.found[:, : self.count]
        factor = self.factor.gather(1, at)
        known = found.gather(2, at[..., None].expand(-1, self.count, 1))  # (b, count, 1)
        # A sum of products, because a batched matrix product may round otherwise than that of one image.
        row = (self.row(pick) - (known * found).sum(1)) / factor.clamp(min=1e-30).sqrt()
        row = torch.where(factor > self.least, row, 0)
        self.found[:, self.count] = row
        self.count += 1
        self.factor = self.factor - row.square()


class MarginalRelevance:
    """Maximal marginal relevance: weight x relevance - (1 - weight) x the largest similarity to those picked.

    The first pick is the most relevant token.

    Args:
        relevance: (b, n).
        similarity: (b, n, n).
        weight: between 0 and 1.
    """

    def __init__(self, relevance: Tensor, similarity: Tensor, weight: float):
        self.relevance, self.weight, self.row = relevance, weight, rows_of(similarity)
        self.nearest: Tensor | None = None

    def score(self) -> Tensor:
        """Score by relevance at first, and then by the weighted difference."""
        if self.nearest is None:
            return self.relevance
        return self.weight * self.relevance - (1 - self.weight) * self.nearest

    def add(self, pick: Tensor) -> None:
        """Raise the similarity to the nearest pick."""
        new = self.row(pick)
        self.nearest = new if self.nearest is None else torch.maximum(self.nearest, new)


def farthest_greedy(
    closeness_to: Callable[[Tensor], Tensor], first: Tensor, k: int, reduce: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Start from one token, and add k - 1 times the token that is least close to those picked; ties to the lower index.

    The arguments are those of `Farthest` and `greedy`.

    Returns:
        (b, k) indices in the order of selection; the first j of them are the result for k = j.
    """
    return greedy(Farthest(closeness_to, reduce), k, first)
