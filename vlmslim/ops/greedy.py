"""Greedy searches: one loop that picks the best token of each image again and again, and the rules that say which.

A rule scores the tokens of b images, and learns after each step what was picked. The loop masks what is picked, batches
over images and makes no device synchronisation. Ties go to the lower index.

Where a pick changes the scores by one row of a matrix, the loop takes longer to start its operations than to compute
them. Then a Triton kernel does all steps on a GPU (`vlmslim.ops.greedy_kernel`), and NumPy does them on a CPU
(`vlmslim.ops.greedy_numpy`). Both make the picks of the loop, up to the rounding of sums.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.ops import greedy_numpy
from vlmslim.ops.ranking import full_precision

#: Rows of a product of all tokens that are computed at once. With so many, and not less than half as many in the last
#: block, MKL rounds each number as it does in a product of all rows.
BLOCK = 384


class Rule(Protocol):
    """The rule by which a greedy search picks its next token; searches differ in nothing else."""

    def score(self) -> Tensor:
        """Score all tokens of each image, higher is better: (b, n). What is picked already may get any score."""

    def add(self, pick: Tensor) -> None:
        """Learn that each image picked a token: indices (b,)."""


@dataclass(frozen=True)
class Stream:
    """A rule that reads one row of a matrix for each pick.

    kind   : "sum" or "max": the score is bonus - weight x closeness, where closeness is the sum or the largest of the
             rows of all picks. "determinant": the rule is `Determinant`, and `bonus` the score of lost tokens.
             "coverage": the rule is `Coverage`, and the score is bonus + weight x gain
    matrix : (b, n, n) symmetric; of "coverage" (b, n, m), how well each token covers each of m places
    weight : (b, n)
    bonus  : (b, n)
    floor  : of `Determinant`
    """

    kind: str
    matrix: Tensor
    weight: Tensor
    bonus: Tensor
    floor: float = 0.0


@runtime_checkable
class Streamed(Rule, Protocol):
    """A rule that may be a `Stream`."""

    def stream(self) -> Stream | None:
        """Describe the search from its start; None if it needs the loop."""


def greedy(rule: Rule, k: int, first: Tensor | None = None, at_once: int = 1) -> Tensor:
    """Pick k tokens of every image, each time the best that is left; ties to the lower index.

    Args:
        rule: scores the tokens, and has not been told of any pick yet.
        k: number of picks, 1 <= k <= n.
        first: (b,) the first pick of each image; None for the best by the rule's first score.
        at_once: picks per step. Those of one step do not see each other; the last step takes what is missing.

    Returns:
        (b, k) indices in the order of selection. With `at_once=1` the first j of them are the result for k = j. On a
        GPU, the picks of an image are all -1 if the kernel meets a NaN, because a kernel cannot raise; the engine
        refuses such an index.

    Raises:
        ValueError: NumPy meets a NaN.
    """
    stream = rule.stream() if at_once == 1 and isinstance(rule, Streamed) else None
    if stream is not None and _has_kernel(stream):
        from vlmslim.ops.greedy_kernel import search

        first = rule.score().argmax(1) if first is None else first
        return search(stream.kind, stream.matrix, first, stream.weight, stream.bonus, k, stream.floor)
    if stream is not None and _suits_numpy(stream):
        first = rule.score().argmax(1) if first is None else first
        return greedy_numpy.search(stream.kind, stream.matrix, first, stream.weight, stream.bonus, k, stream.floor)
    return step_by_step(rule, k, first, at_once)


def step_by_step(rule: Rule, k: int, first: Tensor | None = None, at_once: int = 1) -> Tensor:
    """Search as `greedy` does, by the plain loop, which takes every rule and device."""
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


def _has_kernel(stream: Stream) -> bool:
    single = stream.matrix.is_cuda and stream.matrix.dtype == torch.float32
    return single and stream.kind != "coverage" and find_spec("triton") is not None


def _suits_numpy(stream: Stream) -> bool:
    """Tell whether NumPy makes the search. Gains under a negative weight may rise, which coverage in NumPy excludes."""
    if stream.matrix.device.type != "cpu" or stream.matrix.dtype not in (torch.float32, torch.float64):
        return False
    return stream.kind != "coverage" or bool((stream.weight >= 0).all())


# --- similarities -----------------------------------------------------------------------------------------------------


def similarity_matrix(unit: Tensor) -> Tensor:
    """Compute all pairwise products of each image's tokens: (b, n, d) -> (b, n, n).

    One image at a time, because a batched product may round otherwise, and an image must not depend on its batch. The
    product is symmetric, so what lies left of a block on the diagonal is copied from above.
    """
    n = unit.shape[1]
    starts = list(range(0, n, BLOCK))
    if len(starts) > 1 and n - starts[-1] < BLOCK // 2:
        starts.pop()
    product = unit.new_empty(len(unit), n, n)
    for x, out in zip(unit, product, strict=True):
        for start, end in zip(starts, [*starts[1:], n], strict=True):
            torch.mm(x[start:end], x[start:].T, out=out[start:end, start:])
            if start:
                out[start:end, :start] = out[:start, start:end].T
    return product


@full_precision
def cosine_matrix(x: Tensor) -> Tensor:
    """Compute all pairwise cosines of each image's tokens, 0 to a zero token: (b, n, d) -> (b, n, n)."""
    return similarity_matrix(F.normalize(x, dim=-1))


@full_precision
def cosines(x: Tensor, y: Tensor) -> Tensor:
    """Compute the cosine of each row of x (n, d) to each row of y (m, d), 0 to a row of zeros: (n, m)."""
    return F.normalize(x, dim=-1, eps=1e-8) @ F.normalize(y.float(), dim=-1, eps=1e-8).T


class Rows:
    """Looks up one row of each matrix (b, m, n): indices (b,) -> (b, n)."""

    def __init__(self, matrix: Tensor):
        self.matrix, self._image = matrix, torch.arange(len(matrix), device=matrix.device)

    def __call__(self, pick: Tensor) -> Tensor:
        """Look up the row `pick` (b,) of each matrix."""
        return self.matrix[self._image, pick]


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

    def stream(self) -> Stream | None:
        """Describe the search if closeness stands in a matrix."""
        if not isinstance(self.closeness_to, Rows):
            return None
        matrix = self.closeness_to.matrix
        ones = matrix.new_ones(matrix.shape[::2]) if self.weight is None else self.weight
        return Stream("sum" if self.reduce is torch.add else "max", matrix, ones, torch.zeros_like(ones))


class Coverage:
    """Facility location: the token that most raises the sum of what each place is covered by.

    A place is covered by its largest entry among the tokens picked, and by 0 at first. With `weight`, the gain of each
    token is multiplied by its weight; with `bonus`, the bonus is added to it.

    Args:
        covers: (b, n, m) how well each of n tokens covers each of m places.
        weight: (b, n).
        bonus: (b, n).
    """

    def __init__(self, covers: Tensor, weight: Tensor | None = None, bonus: Tensor | None = None):
        self.row = Rows(covers)
        self.weight = covers.new_ones(covers.shape[:2]) if weight is None else weight
        self.bonus = torch.zeros_like(self.weight) if bonus is None else bonus
        self.covered = covers.new_zeros(covers.shape[::2])

    def score(self) -> Tensor:
        """Score by the gain in coverage."""
        gain = (self.row.matrix - self.covered[:, None]).clamp_(min=0).sum(2)
        return gain * self.weight + self.bonus

    def add(self, pick: Tensor) -> None:
        """Raise what the new token covers better."""
        self.covered = torch.maximum(self.covered, self.row(pick))

    def stream(self) -> Stream:
        """Describe the search."""
        return Stream("coverage", self.row.matrix, self.weight, self.bonus)


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
        self.row, self.fallback, self.floor = Rows(kernel), fallback, floor
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

    def stream(self) -> Stream:
        """Describe the search."""
        return Stream("determinant", self.row.matrix, self.fallback, self.fallback - 2, self.floor)


class MarginalRelevance:
    """Maximal marginal relevance: weight x relevance - (1 - weight) x the largest similarity to those picked.

    The first pick is the most relevant token.

    Args:
        relevance: (b, n).
        similarity: (b, n, n).
        weight: between 0 and 1.
    """

    def __init__(self, relevance: Tensor, similarity: Tensor, weight: float):
        self.relevance, self.weight, self.row = relevance, weight, Rows(similarity)
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

    def stream(self) -> Stream:
        """Describe the search."""
        weight = torch.full_like(self.relevance, 1 - self.weight)
        return Stream("max", self.row.matrix, weight, self.weight * self.relevance)


class Balanced:
    """Relevance, distance to the nearest pick and gain in coverage, each made comparable over the tokens that are left.

    The first pick is the most relevant token. Tokens that are left are to be covered, by their most similar pick.

    Args:
        relevance: (b, n), not negative.
        similarity: (b, n, n).
        distance: weight of the distance, which is 1 - similarity.
        coverage: weight of the gain in coverage.
        normalise: "mean" divides by the mean over the tokens that are left; "fixed" too, but relevance by its first
            mean; "minmax" scales to [0, 1].
    """

    def __init__(self, relevance: Tensor, similarity: Tensor, distance: float, coverage: float, normalise: str):
        self.relevance, self.row = relevance, Rows(similarity)
        self.distance, self.coverage, self.normalise = distance, coverage, normalise
        self.left = torch.ones_like(relevance)
        self.gain = torch.empty_like(similarity)  # every step writes into it, because new memory takes most of its time
        self.nearest: Tensor | None = None

    def score(self) -> Tensor:
        """Score by relevance at first, and then by the weighted sum."""
        if self.nearest is None:
            return self.relevance
        # symmetric: by pick, then by candidate
        gain = torch.sub(self.row.matrix, self.nearest[:, None], out=self.gain).clamp_(min=0)
        covered = gain.mul_(self.left[:, None]).sum(2)
        counts = torch.ones_like(self.left) if self.normalise == "fixed" else self.left
        added = self.distance * self.comparable(1 - self.nearest, self.left)
        return self.comparable(self.relevance, counts) + (added + self.coverage * self.comparable(covered, self.left))

    def comparable(self, x: Tensor, counts: Tensor) -> Tensor:
        """Normalise x (b, n) by the tokens that count (b, n), 1 or 0; 0 if they are all 0, or all equal (minmax)."""
        if self.normalise == "minmax":
            low = x.masked_fill(counts == 0, float("inf")).amin(1, keepdim=True)
            x, unit = x - low, x.masked_fill(counts == 0, float("-inf")).amax(1, keepdim=True) - low
        else:
            unit = (x * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True)
        return torch.where(unit > 1e-12, x / unit.clamp(min=1e-12), 0)

    def add(self, pick: Tensor) -> None:
        """Raise the similarity to the nearest pick, and strike the pick off those that are left."""
        new = self.row(pick)
        self.nearest = new if self.nearest is None else torch.maximum(self.nearest, new)
        self.left = self.left.scatter(1, pick[:, None], 0)


def farthest_greedy(
    closeness_to: Callable[[Tensor], Tensor], first: Tensor, k: int, reduce: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Start from one token, and add k - 1 times the token that is least close to those picked; ties to the lower index.

    The arguments are those of `Farthest` and `greedy`.

    Returns:
        (b, k) indices in the order of selection; the first j of them are the result for k = j.
    """
    return greedy(Farthest(closeness_to, reduce), k, first)
