"""Compares rows question by question: differences, p values, intervals and ranks.

Every comparison is paired, because all rows answered the same questions about the same pictures. The number compared
is each question's own score. Where a task's score is the mean of these, it is the score on the leaderboard.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse.csgraph import connected_components

from vlmslim.leaderboard.samples import ScoredTask, UnscoredTask
from vlmslim.leaderboard.significance import (
    covariances,
    effective_size,
    half_width,
    holm,
    mcnemar,
    ranks,
    resolution,
    sums_by_unit,
    swap_test,
    units_of,
    wilson,
)

LEVEL = 0.05  # a difference is significant if its adjusted p value is below this
SWAPS = 20_000  # random swaps of a permutation test, at least

Ends = tuple[float, float]  # the lower and the upper end of a 95 % confidence interval


@dataclass(frozen=True)
class Pair:
    """One row minus another on the same questions.

    task       : None for the average over tasks, relative to the unpatched model
    difference : of the mean question scores, or of the averages
    p          : two-sided p value of the paired test
    p_adjusted : after Holm's correction for all pairs of one budget and column, with the unpatched model
    better     : whether the first row is better, by the direction of the task's metric
    low, high  : 95 % interval of the difference, Student's over pictures; None where the pictures all say the same, or
                 there is only one
    at_limit   : whether `p` is the smallest that the random swaps of the test can give, so that it is an upper bound
    """

    first: str
    second: str
    task: str | None
    difference: float
    p: float
    p_adjusted: float
    better: bool
    low: float | None = None
    high: float | None = None
    at_limit: bool = False

    @property
    def significant(self) -> bool:
        """Whether the adjusted p value is below the level."""
        return self.p_adjusted < LEVEL

    def reversed(self) -> "Pair":
        """Return the second row minus the first."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            difference=0.0 - self.difference,  # never -0.0
            better=not self.better and self.difference != 0,
            low=None if self.high is None else 0.0 - self.high,
            high=None if self.low is None else 0.0 - self.low,
        )


@dataclass(frozen=True)
class Stability:
    """How the answers of a row relate to those of the unpatched model, as shares of the questions.

    loyalty   : questions with the same answer
    lost, won : questions whose score fell, and rose; None for a task without scores of single questions
    """

    loyalty: float
    lost: float | None
    won: float | None


@dataclass
class Comparison:
    """What the single questions say about the rows of a leaderboard.

    means     : (label, task) -> mean question score
    intervals : (label, task) -> its 95 % interval, where it is known
    relative  : label -> 95 % interval of the average relative to the unpatched model
    groups    : (label, group) -> the same interval, over the tasks of one group
    pairs     : (first label, second label, task) -> the comparison of two rows of one budget
    stability : (label, task) -> loyalty and flips
    ranks     : label -> 1 + the number of rows of its budget with a significantly better average
    untested  : tasks without scores of single questions
    averaged  : tasks whose question scores make up the average that is tested and ranked
    """

    means: dict[tuple[str, str], float] = field(default_factory=dict)
    intervals: dict[tuple[str, str], Ends] = field(default_factory=dict)
    relative: dict[str, Ends] = field(default_factory=dict)
    groups: dict[tuple[str, str], Ends] = field(default_factory=dict)
    pairs: dict[tuple[str, str, str | None], Pair] = field(default_factory=dict)
    stability: dict[tuple[str, str], Stability] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    untested: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)

    def pair(self, first: str, second: str, task: str | None) -> Pair | None:
        """Return `first` minus `second`, whichever way round it was computed; None if it was not."""
        if (found := self.pairs.get((first, second, task))) is not None:
            return found
        found = self.pairs.get((second, first, task))
        return None if found is None else found.reversed()


def compare(
    tasks: list[ScoredTask | UnscoredTask], budgets: list[list[str]], base: str, groups: dict[str, str]
) -> Comparison:
    """Compare all rows of each budget with each other and with the unpatched model.

    Args:
        tasks: answers and scores of each task.
        budgets: labels of the rows of each budget, without the unpatched model.
        base: label of the unpatched model.
        groups: task -> its group.
    """
    result = Comparison(untested=[task.task for task in tasks if isinstance(task, UnscoredTask)])
    for task in tasks:
        if base in task.labels:
            result.stability |= {(row, task.task): _stability(task, row, base) for row in task.labels if row != base}
    scored = [task for task in tasks if isinstance(task, ScoredTask)]
    if not scored:
        return result
    pictures, swaps = _Pictures(scored), _swaps(budgets)
    columns = []
    for task in scored:
        means, influence = task.scores.mean(1), pictures.influence(task)
        own = pictures.of(task)
        spread = covariances(influence[:, own], np.zeros(int(own.sum())))
        for label, mean, ends in zip(task.labels, means, _score_intervals(task, spread), strict=True):
            result.means[label, task.task] = float(mean)
            if ends is not None:
                result.intervals[label, task.task] = ends
        columns.append(_Column(task.task, task.labels, means, *_p_values(task, swaps), *spread, task.sign))

    complete = [label for label in tasks[0].labels if all(label in task.labels for task in tasks)]
    # A task on which the unpatched model scores 0 says nothing about scores relative to that model.
    averaged = [task for task in scored if base in complete and task.row(base).any()]
    if averaged:
        ratios = {task.task: _ratio(task, pictures.influence(task), complete, base) for task in averaged}

        def average(names: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            """Average the ratios of some tasks: their values, covariances and degrees of freedom."""
            values, influence = (np.mean([ratios[name][i] for name in names], axis=0) for i in (0, 1))
            own = pictures.of(*(task for task in averaged if task.task in names))
            return values, *covariances(influence[:, own], pictures.strata[own])

        values, covariance, freedom = average(list(ratios))
        result.averaged, result.relative = list(ratios), _intervals(complete, values, covariance, freedom)
        for group in dict.fromkeys(groups[task] for task in ratios):
            known = _intervals(complete, *average([task for task in ratios if groups[task] == group]))
            result.groups |= {(label, group): interval for label, interval in known.items()}
        tested = _average(averaged, pictures, complete, base, swaps)
        columns.append(_Column(None, complete, *tested, covariance, freedom))

    for budget in budgets:
        for column in columns:
            result.pairs |= {(p.first, p.second, p.task): p for p in column.pairs([*budget, base])}
        rows = [label for label in budget if label in complete] if averaged else []
        better = [[_beats(result.pair(one, other, None)) for other in rows] for one in rows]
        if rows:  # in an unfinished run, a budget may have no row with all tasks yet
            result.ranks |= dict(zip(rows, map(int, ranks(np.array(better))), strict=True))
    return result


class _Pictures:
    """The pictures of all tasks, numbered: a test swaps whole pictures, and intervals rest on whole pictures.

    count   : number of pictures
    numbers : task -> number of each question's picture
    strata  : (pictures,) tasks that share pictures form one stratum. Finer strata, of the pictures that occur in
              exactly the same tasks, would hold one or two pictures each, which tell too little
    """

    def __init__(self, tasks: list[ScoredTask]):
        numbers = units_of([name for task in tasks for name in task.pictures])
        ends = np.cumsum([len(task.pictures) for task in tasks])[:-1]
        self.count = int(numbers.max()) + 1
        self.numbers = {task.task: own for task, own in zip(tasks, np.split(numbers, ends), strict=True)}
        within = np.stack([self.of(task) for task in tasks])
        self.strata = connected_components(within.astype(int) @ within.T.astype(int))[1][within.argmax(0)]

    def of(self, *tasks: ScoredTask) -> np.ndarray:
        """Find the pictures that any of the tasks asks about, (pictures,)."""
        return np.any([self.sizes(task) > 0 for task in tasks], axis=0)

    def sizes(self, task: ScoredTask) -> np.ndarray:
        """Count the task's questions about each picture, (pictures,)."""
        return np.bincount(self.numbers[task.task], minlength=self.count)

    def sums(self, task: ScoredTask) -> np.ndarray:
        """Add up the task's scores of each picture, (rows, pictures)."""
        return sums_by_unit(task.scores, self.numbers[task.task], self.count)

    def influence(self, task: ScoredTask) -> np.ndarray:
        """Compute how far each picture moves the task's mean scores, (rows, pictures)."""
        mean = task.scores.mean(1, keepdims=True)
        return (self.sums(task) - mean * self.sizes(task)) / task.scores.shape[1]


@dataclass(frozen=True)
class _Column:
    """One column of the leaderboard, of which all pairs of rows are compared.

    task     : None for the average
    values   : (rows,)
    p        : (rows, rows), p value of each pair
    at_limit : (rows, rows), whether the p value is the smallest that random swaps can give
    spread   : (strata, rows, rows), covariances of the values from each stratum of pictures
    freedom  : (strata,), their degrees of freedom
    sign     : 1 if higher values are better, else -1
    """

    task: str | None
    labels: list[str]
    values: np.ndarray
    p: np.ndarray
    at_limit: np.ndarray
    spread: np.ndarray
    freedom: np.ndarray
    sign: int = 1

    def pairs(self, labels: list[str]) -> Iterator[Pair]:
        """Compare all of the given rows that the column has, and correct the p values for the number of pairs."""
        at = [self.labels.index(label) for label in labels if label in self.labels]
        pairs = [(i, j) for place, i in enumerate(at) for j in at[place + 1 :]]
        adjusted = holm(np.array([self.p[i, j] for i, j in pairs]))
        variances = self.spread.diagonal(axis1=1, axis2=2)[:, :, None] + self.spread.diagonal(axis1=1, axis2=2)[:, None]
        apart = variances - 2 * self.spread
        halves = half_width(np.where(apart < 1e-10 * variances, 0.0, apart), self.freedom)  # equal up to rounding
        for (i, j), p_adjusted in zip(pairs, adjusted, strict=True):
            difference = self.values[i] - self.values[j]
            ends = _ends(difference, halves[i, j])
            yield Pair(
                self.labels[i],
                self.labels[j],
                self.task,
                difference=_nine_digits(difference),
                p=_nine_digits(self.p[i, j]),
                p_adjusted=_nine_digits(p_adjusted),
                better=bool(self.sign * difference > 0),
                low=None if ends is None else ends[0],
                high=None if ends is None else ends[1],
                at_limit=bool(self.at_limit[i, j]),
            )


def _average(
    tasks: list[ScoredTask], pictures: _Pictures, labels: list[str], base: str, swaps: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Compare rows by their average, as a sum of question scores with a weight for each task.

    Task weights come from the unpatched model's scores, so that the sum is the average relative to that model. Where a
    row is tested against the unpatched model itself, the weights come from the scores of both rows. The null hypothesis
    says that the two rows are exchangeable, and weights from only one of them would bias the test.

    Returns:
        (rows,) the averages; (rows, rows) p values, and whether each is the smallest that random swaps can give.
    """
    sums = {task.task: pictures.sums(task)[[task.labels.index(label) for label in labels]] for task in tasks}
    at = labels.index(base)

    def weighted(rows: list[int], scale: list[int]) -> np.ndarray:
        parts = [t.sign * sums[t.task][rows] / abs(sums[t.task][scale].sum(1).mean()) / len(tasks) for t in tasks]
        return np.sum(parts, axis=0)

    everything = weighted(list(range(len(labels))), [at])
    p, at_limit = _swapped(everything[:, everything.any(0)], swaps)
    for i in range(len(labels)):
        if i != at:
            both = weighted([i, at], [i, at])
            own, limited = _swapped(both[:, both.any(0)], swaps)
            p[i, at] = p[at, i] = own[0, 1]
            at_limit[i, at] = at_limit[at, i] = limited[0, 1]
    return everything.sum(1), p, at_limit


def _swapped(sums: np.ndarray, swaps: int) -> tuple[np.ndarray, np.ndarray]:
    """Test all pairs by swaps: p values, and whether each is the smallest that random swaps can give."""
    p = swap_test(sums, swaps)
    return p, p < 1.5 * resolution(sums.shape[1], swaps)


def _beats(pair: Pair | None) -> bool:
    return pair is not None and pair.better and pair.significant


def _stability(task: ScoredTask | UnscoredTask, label: str, base: str) -> Stability:
    ours, theirs = task.answers[label], task.answers[base]
    loyalty = sum(a == b for a, b in zip(ours, theirs, strict=True)) / max(len(ours), 1)
    if isinstance(task, UnscoredTask):
        return Stability(loyalty, None, None)
    change = task.sign * (task.row(label) - task.row(base))
    return Stability(loyalty, float((change < 0).mean()), float((change > 0).mean()))


def _swaps(budgets: list[list[str]]) -> int:
    """Count the random swaps that a test needs, so that Holm's correction leaves the smallest p value significant."""
    pairs = max((len(budget) * (len(budget) + 1) // 2 for budget in budgets), default=0)
    return max(SWAPS, round(5 * pairs / LEVEL))


def _p_values(task: ScoredTask, swaps: int) -> tuple[np.ndarray, np.ndarray]:
    """Test all pairs of rows: by McNemar where questions are right or wrong and each has its own picture.

    Returns:
        (rows, rows) p values, and whether each is the smallest that random swaps can give.
    """
    units = units_of(task.pictures)
    if task.right_or_wrong and units.max() + 1 == len(units):
        p = mcnemar(task.scores)
        return p, np.zeros(p.shape, dtype=bool)
    return _swapped(sums_by_unit(task.scores, units), swaps)


def _score_intervals(task: ScoredTask, spread: tuple[np.ndarray, np.ndarray]) -> list[Ends | None]:
    """Return Wilson's intervals of the mean scores where questions are right or wrong, else Student's."""
    means = task.scores.mean(1)
    if not task.right_or_wrong:
        covariance, freedom = spread
        halves = half_width(covariance.diagonal(axis1=1, axis2=2), freedom)
        return [_rounded(m - h, m + h) if np.isfinite(h) else None for m, h in zip(means, halves, strict=True)]
    units = units_of(task.pictures)
    clusters = 1 + int(units.max())
    size = effective_size(task.scores, units)
    lows, highs = wilson(means, size, clusters if clusters < len(units) else None)
    return [_rounded(low, high) for low, high in zip(lows, highs, strict=True)]


def _ratio(task: ScoredTask, influence: np.ndarray, labels: list[str], base: str) -> tuple[np.ndarray, np.ndarray]:
    """Divide the mean scores of rows by the unpatched model's.

    Returns:
        (rows,) the ratios, 2 minus the ratio where lower is better; and (rows, pictures), how far each picture moves
        them, to first order.
    """
    rows, at = [task.labels.index(label) for label in labels], task.labels.index(base)
    means = task.scores.mean(1)
    ratio = means[rows] / means[at]
    moved = (influence[rows] - ratio[:, None] * influence[at]) / means[at]
    return (ratio, moved) if task.sign > 0 else (2 - ratio, -moved)


def _intervals(labels: list[str], values: np.ndarray, spread: np.ndarray, freedom: np.ndarray) -> dict[str, Ends]:
    """Return the interval of each row that has one."""
    halves = half_width(spread.diagonal(axis1=1, axis2=2), freedom)
    found = {label: _ends(value, half) for label, value, half in zip(labels, values, halves, strict=True)}
    return {label: ends for label, ends in found.items() if ends is not None}


def _ends(value: float, half: float) -> Ends | None:
    """Return the ends of an interval; None where it has no width, or where the width is not known."""
    return _rounded(value - half, value + half) if half > 0 else None


def _rounded(low: float, high: float) -> Ends:
    return round(float(low), 9), round(float(high), 9)


def _nine_digits(number: float) -> float:
    return float(f"{number:.9g}")
