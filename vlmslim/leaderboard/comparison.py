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
    effective_size,
    holm,
    interval,
    mcnemar,
    ranks,
    resamples,
    sums_by_unit,
    swap_test,
    units_of,
    wilson,
)

LEVEL = 0.05  # a difference is significant if its adjusted p value is below this
SWAPS = 20_000  # random swaps of a permutation test, at least
RESAMPLES = 2_000  # resamples of a bootstrap interval

Ends = tuple[float, float]  # the lower and the upper end of a 95 % confidence interval


@dataclass(frozen=True)
class Pair:
    """One row minus another on the same questions.

    task       : None for the average over tasks, relative to the unpatched model
    difference : of the mean question scores, or of the averages
    p          : two-sided p value of the paired test
    p_adjusted : after Holm's correction for all pairs of one budget and column, with the unpatched model
    better     : whether the first row is better, by the direction of the task's metric
    low, high  : 95 % bootstrap interval of the difference; None where all resamples give the same difference
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
    """How the answers of a row relate to those of the unpatched model, as fractions of the questions.

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
    intervals : (label, task) -> its 95 % interval
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
    draws = _bootstrap(scored, pictures)
    columns = []
    for task in scored:
        means, own = task.scores.mean(1), draws[task.task]
        for label, mean, *ends in zip(task.labels, means, *_score_intervals(task, own), strict=True):
            result.means[label, task.task] = float(mean)
            result.intervals[label, task.task] = _rounded(*ends)
        columns.append(_Column(task.task, task.labels, means, _p_values(task, swaps), own, task.sign))

    complete = [label for label in tasks[0].labels if all(label in task.labels for task in tasks)]
    # A task on which the unpatched model scores 0 says nothing about scores relative to that model.
    averaged = [task for task in scored if base in complete and task.row(base).any()]
    if averaged:
        ratios = {task.task: _ratios(task, draws[task.task], complete, base) for task in averaged}
        average = np.mean(list(ratios.values()), axis=0)
        result.averaged, result.relative = list(ratios), _intervals(complete, average)
        for group in dict.fromkeys(groups[task] for task in ratios):
            mean = np.mean([ratio for task, ratio in ratios.items() if groups[task] == group], axis=0)
            result.groups |= {(label, group): ends for label, ends in _intervals(complete, mean).items()}
        columns.append(_average(averaged, pictures, complete, base, swaps, average))

    for budget in budgets:
        for column in columns:
            result.pairs |= {(p.first, p.second, p.task): p for p in column.pairs([*budget, base])}
        rows = [label for label in budget if label in complete] if averaged else []
        better = [[_beats(result.pair(one, other, None)) for other in rows] for one in rows]
        if rows:  # in an unfinished run, a budget may have no row with all tasks yet
            result.ranks |= dict(zip(rows, map(int, ranks(np.array(better))), strict=True))
    return result


class _Pictures:
    """The pictures of all tasks, numbered: a test swaps and the bootstrap draws whole pictures.

    count   : number of pictures
    numbers : task -> number of each question's picture
    """

    def __init__(self, tasks: list[ScoredTask]):
        numbers = units_of([name for task in tasks for name in task.pictures])
        ends = np.cumsum([len(task.pictures) for task in tasks])[:-1]
        self.count = int(numbers.max()) + 1
        self.numbers = {task.task: own for task, own in zip(tasks, np.split(numbers, ends), strict=True)}

    def sizes(self, task: ScoredTask) -> np.ndarray:
        """Count the task's questions about each picture, (pictures,)."""
        return np.bincount(self.numbers[task.task], minlength=self.count)

    def sums(self, task: ScoredTask) -> np.ndarray:
        """Add up the task's scores of each picture, (rows, pictures)."""
        return sums_by_unit(task.scores, self.numbers[task.task], self.count)


@dataclass(frozen=True)
class _Column:
    """One column of the leaderboard, of which all pairs of rows are compared.

    task   : None for the average
    values : (rows,)
    p      : (rows, rows), p value of each pair
    draws  : (draws, rows), the values in each bootstrap draw
    sign   : 1 if higher values are better, else -1
    """

    task: str | None
    labels: list[str]
    values: np.ndarray
    p: np.ndarray
    draws: np.ndarray
    sign: int = 1

    def pairs(self, labels: list[str]) -> Iterator[Pair]:
        """Compare all of the given rows that the column has, and correct the p values for the number of pairs."""
        at = [self.labels.index(label) for label in labels if label in self.labels]
        pairs = [(i, j) for place, i in enumerate(at) for j in at[place + 1 :]]
        adjusted = holm(np.array([self.p[i, j] for i, j in pairs]))
        for (i, j), p_adjusted in zip(pairs, adjusted, strict=True):
            difference = self.values[i] - self.values[j]
            ends = _interval(self.draws[:, i] - self.draws[:, j])
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
            )


def _average(
    tasks: list[ScoredTask], pictures: _Pictures, labels: list[str], base: str, swaps: int, draws: np.ndarray
) -> _Column:
    """Compare rows by their average, as a sum of question scores with a weight for each task.

    Task weights come from the unpatched model's scores, so that the sum is the average relative to that model. Where a
    row is tested against the unpatched model itself, the weights come from the scores of both rows. The null hypothesis
    says that the two rows are exchangeable, and weights from only one of them would bias the test.
    """
    sums = {task.task: pictures.sums(task)[[task.labels.index(label) for label in labels]] for task in tasks}
    at = labels.index(base)

    def weighted(rows: list[int], scale: list[int]) -> np.ndarray:
        parts = [t.sign * sums[t.task][rows] / abs(sums[t.task][scale].sum(1).mean()) / len(tasks) for t in tasks]
        return np.sum(parts, axis=0)

    everything = weighted(list(range(len(labels))), [at])
    p = swap_test(everything[:, everything.any(0)], swaps)
    for i in range(len(labels)):
        if i != at:
            both = weighted([i, at], [i, at])
            p[i, at] = p[at, i] = swap_test(both[:, both.any(0)], swaps)[0, 1]
    return _Column(None, labels, everything.sum(1), p, draws)


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


def _p_values(task: ScoredTask, swaps: int) -> np.ndarray:
    """Test all pairs of rows: by McNemar where questions are right or wrong and each has its own picture."""
    units = units_of(task.pictures)
    if task.right_or_wrong and units.max() + 1 == len(units):
        return mcnemar(task.scores)
    return swap_test(sums_by_unit(task.scores, units), swaps)


def _score_intervals(task: ScoredTask, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return Wilson's intervals of the mean scores where questions are right or wrong, else the bootstrap's."""
    if not task.right_or_wrong:
        return interval(draws)
    units = units_of(task.pictures)
    clusters = 1 + int(units.max())
    size = effective_size(task.scores, units)
    return wilson(task.scores.mean(1), size, clusters if clusters < len(units) else None)


def _bootstrap(tasks: list[ScoredTask], pictures: _Pictures) -> dict[str, np.ndarray]:
    """Draw pictures with replacement, the same ones for all tasks: task -> mean scores (draws, rows)."""
    sizes = {task.task: pictures.sizes(task) for task in tasks}
    sums = {task.task: pictures.sums(task) for task in tasks}
    # Tasks that share pictures form one stratum. Tasks that share none are drawn apart, so that each keeps its number
    # of pictures. Finer strata, of the pictures that occur in exactly the same tasks, would hold one or two pictures
    # each, which vary too little.
    within = np.stack([size > 0 for size in sizes.values()])
    strata = connected_components(within.astype(int) @ within.T.astype(int))[1][within.argmax(0)]
    drawn: dict[str, list[np.ndarray]] = {task.task: [] for task in tasks}
    for weights in resamples(strata, RESAMPLES):
        for task in tasks:
            size = (weights @ sizes[task.task])[:, None]  # 0 where a draw has no picture of the task
            empty = np.full((len(weights), len(task.labels)), np.nan)
            drawn[task.task].append(np.divide(weights @ sums[task.task].T, size, out=empty, where=size > 0))
    return {task: np.concatenate(chunks) for task, chunks in drawn.items()}


def _ratios(task: ScoredTask, draws: np.ndarray, labels: list[str], base: str) -> np.ndarray:
    """Divide the drawn mean scores of each row by the unpatched model's, (draws, rows)."""
    ours = draws[:, [task.labels.index(label) for label in labels]]
    theirs = draws[:, [task.labels.index(base)]]
    ratio = np.divide(ours, theirs, out=np.full_like(ours, np.nan), where=theirs != 0)
    return ratio if task.sign > 0 else 2 - ratio


def _intervals(labels: list[str], draws: np.ndarray) -> dict[str, Ends]:
    """Return the bootstrap interval of each row that has one, from draws (draws, rows)."""
    found = {label: _interval(own) for label, own in zip(labels, draws.T, strict=True)}
    return {label: ends for label, ends in found.items() if ends is not None}


def _interval(draws: np.ndarray) -> Ends | None:
    """Return the bootstrap interval of one number; None where all draws are the same, for example 0."""
    known = draws[np.isfinite(draws)]
    if not known.size or known.max() == known.min():
        return None
    low, high = interval(known)
    return _rounded(low, high)


def _rounded(low: float | np.ndarray, high: float | np.ndarray) -> Ends:
    return round(float(low), 9), round(float(high), 9)


def _nine_digits(number: float) -> float:
    return float(f"{number:.9g}")
