"""Compares rows question by question: differences, p values, intervals and ranks.

Every comparison is paired, because all rows answered the same questions about the same pictures. The number compared
is each question's own score. Where a task's score is the mean of these, it is the score on the leaderboard.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from vlmslim.leaderboard.averages import (
    Average,
    Pictures,
    References,
    hard_part,
    surely_contributes,
    swapped,
)
from vlmslim.leaderboard.samples import ScoredTask, UnscoredTask
from vlmslim.leaderboard.scores import Estimate
from vlmslim.leaderboard.significance import (
    covariances,
    effective_size,
    half_width,
    holm,
    mcnemar,
    ranks,
    sums_by_unit,
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
        """True if the adjusted p value is below the level."""
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
    """Answers of a row compared with those of the unpatched model, as shares of the questions.

    loyalty   : questions with the same answer
    lost, won : questions whose score fell, and rose; None for a task without scores of single questions
    """

    loyalty: float
    lost: float | None
    won: float | None


@dataclass
class Comparison:
    """Results of comparing the rows of a leaderboard question by question.

    means     : (label, task) -> mean question score
    intervals : (label, task) -> its 95 % interval, where it is known
    relative  : label -> 95 % interval of the average relative to the unpatched model
    groups    : (label, group) -> the same interval, over the tasks of one group
    pairs     : (first label, second label, task) -> the comparison of two rows of one budget
    stability : (label, task) -> loyalty and flips
    ranks     : label -> 1 + the number of rows of its budget with a significantly better average
    untested  : tasks without scores of single questions
    averaged  : tasks whose question scores make up the average that is tested and ranked
    vision    : label -> 95 % interval of the vision-retained score
    uncertain : tasks to which the picture contributes enough, but not for sure
    hard      : label -> score on the hard questions of its budget, relative to the unpatched model's
    hard_questions : label of the row `downsample` of a budget -> task -> how many of its questions are hard
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
    vision: dict[str, Ends] = field(default_factory=dict)
    uncertain: list[str] = field(default_factory=list)
    hard: dict[str, Estimate] = field(default_factory=dict)
    hard_questions: dict[str, dict[str, int]] = field(default_factory=dict)

    def pair(self, first: str, second: str, task: str | None) -> Pair | None:
        """Return `first` minus `second`, whichever way round it was computed; None if it was not."""
        if (found := self.pairs.get((first, second, task))) is not None:
            return found
        found = self.pairs.get((second, first, task))
        return None if found is None else found.reversed()


def compare(
    tasks: list[ScoredTask | UnscoredTask],
    budgets: list[list[str]],
    base: str,
    groups: dict[str, str],
    references: References | None = None,
    scale: str = "unpatched",
) -> Comparison:
    """Compare all rows of each budget with each other and with the unpatched model.

    Args:
        tasks: answers and scores of each task.
        budgets: labels of the rows of each budget, without the unpatched model.
        base: label of the unpatched model.
        groups: task -> its group.
        references: rows that scales refer to.
        scale: one of `SCALES`: of the average that is tested and ranked.
    """
    references = references or References()
    result = Comparison(untested=[task.task for task in tasks if isinstance(task, UnscoredTask)])
    for task in tasks:
        if base in task.labels:
            result.stability |= {(row, task.task): _stability(task, row, base) for row in task.labels if row != base}
    scored = [task for task in tasks if isinstance(task, ScoredTask)]
    if not scored:
        return result
    pictures, swaps = Pictures(scored), _swaps(budgets)
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
    averages: dict[str, Average] = {}
    if averaged:
        average = averages["unpatched"] = Average(averaged, complete, base)
        result.averaged = [task.task for task in averaged]
        result.relative = _intervals(complete, *average.estimate())
        for group in dict.fromkeys(groups[name] for name in result.averaged):
            known = average.estimate([name for name in result.averaged if groups[name] == group])
            result.groups |= {(label, group): ends for label, ends in _intervals(complete, *known).items()}
        if (vision := _vision(result, averaged, complete, base, references)) is not None:
            averages["vision-retained"] = vision

    shared = _Column.average(averages[scale], swaps) if scale in averages else None
    for i, budget in enumerate(budgets):
        labels = [label for label in budget if label in complete]
        hard = _hard(result, averaged, labels, base, references.shrunk[i] if references.shrunk else None)
        column = shared if hard is None or scale != "hard" else _Column.average(hard, swaps)
        for one in columns if column is None else [*columns, column]:
            result.pairs |= {(p.first, p.second, p.task): p for p in one.pairs([*budget, base])}
        rows = [] if column is None else [label for label in budget if label in column.labels]
        better = [[_beats(result.pair(one, other, None)) for other in rows] for one in rows]
        if rows:  # in an unfinished run, a budget may have no row with all tasks yet
            result.ranks |= dict(zip(rows, map(int, ranks(np.array(better))), strict=True))
    return result


def _vision(
    result: Comparison, tasks: list[ScoredTask], labels: list[str], base: str, references: References
) -> Average | None:
    """Make the average above the blind model, and note its intervals; None without a task to which pictures matter."""
    if references.blind not in labels:
        return None
    assert references.blind is not None
    known = [task for task in tasks if task.task in references.contributing]
    sure = [task for task in known if surely_contributes(task, base, references.blind)]
    result.uncertain = [task.task for task in known if all(task is not one for one in sure)]
    if not sure:
        return None
    average = Average(sure, labels, base, references.blind)
    result.vision = _intervals(labels, *average.estimate())
    return average


def _hard(
    result: Comparison, tasks: list[ScoredTask], labels: list[str], base: str, shrunk: str | None
) -> Average | None:
    """Make the average on the questions of a budget that its row `downsample` gets wrong, and note what it says.

    A task without such questions, or on which the unpatched model gets none of them right, is left out.
    """
    if shrunk is None or shrunk not in labels:
        return None
    parts = [part for task in tasks if (part := hard_part(task, shrunk)) is not None]
    result.hard_questions[shrunk] = {part.task: part.scores.shape[1] for part in parts}
    parts = [part for part in parts if part.row(base).any()]
    if not parts:
        return None
    average = Average(parts, [*labels, base], base)
    values, spread, freedom = average.estimate()
    ends = _intervals(average.labels, values, spread, freedom)
    for label, value in zip(labels, values, strict=False):
        result.hard[label] = Estimate(_nine_digits(value), *ends.get(label, ()))
    return average


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

    @classmethod
    def average(cls, average: Average, swaps: int) -> "_Column":
        """Test an average over tasks."""
        _, spread, freedom = average.estimate()
        return cls(None, average.labels, *average.tested(swaps), spread, freedom)

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
    return swapped(sums_by_unit(task.scores, units), swaps)


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
