"""Rows compared question by question: who differs from whom, and how sure that is.

Every comparison is paired: two rows answered the very same questions about the very same pictures. What is compared is
each question's own score; where the task's score is their mean, that is the score on the leaderboard.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from scipy.sparse.csgraph import connected_components

from vlmslim.evaluation.config import ConfigError
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

LEVEL = 0.05  # differences with an adjusted p value below it count
SWAPS = 20_000  # random swaps of a permutation test, at least
RESAMPLES = 2_000  # of a bootstrap interval

#: Names under which data sets say which picture (or page, or video) a question is about, the surest first.
_PICTURE = (
    *("scene", "page", "image_id", "imageId", "image_source", "data_id", "docId"),
    *("video_id", "videoID", "video_idx", "video_name", "video_path", "video", "question_id"),
)


@dataclass(frozen=True)
class TaskAnswers:
    """What several rows answered to one task's questions.

    labels   : names of the rows
    pictures : name of each question's picture [questions]
    scores   : each question's own score [rows, questions]; None where lmms-eval logs none
    answers  : the text, or the number of the chosen option [rows][questions]
    sign     : 1 if higher scores are better, else -1
    """

    task: str
    labels: list[str]
    pictures: list[str]
    scores: np.ndarray | None
    answers: list[list[str]]
    sign: int = 1

    @classmethod
    def collect(cls, task: str, samples: dict[str, list[dict]], metric: str, higher_is_better: bool, source: str = ""):
        """Take them from lmms-eval's samples.

        A metric may be about some of the questions only, as MME's perception score; the others are left out.

        Args:
            task: its name.
            samples: of each row, by label.
            metric: whose scores are compared.
            higher_is_better: the direction of the metric.
            source: the data set, in which pictures have names of their own.

        Raises:
            ConfigError: two rows answered different questions; they cannot be paired.
        """
        labels = list(samples)
        asked = [sample["doc_id"] for sample in samples[labels[0]]]
        for label in labels[1:]:
            if [sample["doc_id"] for sample in samples[label]] != asked:
                raise ConfigError(
                    f"{labels[0]} and {label} answered different questions of {task}, so they cannot be compared; "
                    "start over with --fresh"
                )
        scores = [[question_score(sample, metric) for sample in samples[label]] for label in labels]
        about = [i for i in range(len(asked)) if any(row[i] is not None for row in scores)]
        known = bool(about) and all(row[i] is not None for row in scores for i in about)
        own = {label: [samples[label][i] for i in about] if known else samples[label] for label in labels}
        return cls(
            task,
            labels,
            _pictures(own[labels[0]], source or task),
            np.array([[row[i] for i in about] for row in scores], dtype=float) if known else None,
            [[answer(sample) for sample in own[label]] for label in labels],
            1 if higher_is_better else -1,
        )

    def row(self, label: str) -> np.ndarray:
        """A row's scores [questions]."""
        return self.scores[self.labels.index(label)]

    @property
    def right_or_wrong(self) -> bool:
        """Whether every question is either right (1) or wrong (0)."""
        return bool(np.isin(self.scores, (0.0, 1.0)).all())


def question_score(sample: dict, metric: str) -> float | None:
    """A question's own score in one of lmms-eval's samples: a number, or the `score` in what the task logs."""
    value = sample.get(metric)
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def answer(sample: dict) -> str:
    """What was answered: the text without case and spacing, or the option that log-likelihood chose (lowest loss)."""
    given = sample.get("filtered_resps", sample.get("resps"))
    given = given if isinstance(given, list) else [given]
    losses = [r[0] for r in given if isinstance(r, list | tuple) and len(r) == 2 and isinstance(r[0], int | float)]
    if losses and len(losses) == len(given):
        return f"option {losses.index(min(losses))}" if len(losses) > 1 else f"option {given[0][1]}"
    text = given[0] if len(given) == 1 else given
    return " ".join((text if isinstance(text, str) else json.dumps(text)).casefold().split())


def _pictures(samples: list[dict], source: str) -> list[str]:
    """Names of the questions' pictures; a question whose data set does not tell has a picture of its own."""
    docs = [sample.get("doc") or {} for sample in samples]
    name = next((name for name in _PICTURE if docs and all(doc.get(name) not in (None, "") for doc in docs)), None)
    if name is None:
        return [f"{source} question {sample['doc_id']}" for sample in samples]
    return [f"{source} {name} {doc[name]}" for doc in docs]


@dataclass(frozen=True)
class Pair:
    """One row minus another on the same questions.

    task       : None for the average over tasks, relative to the unpatched model
    difference : of the mean question score, or of the average
    p          : two-sided, of the paired test: that two rows which are alike differ at least as much
    p_adjusted : Holm's, over all pairs of one budget's rows (the unpatched model included) in one column
    better     : whether the first is better, by the task's direction
    low, high  : bootstrap's 95 % confidence interval of the difference; None where the draws are all alike
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
        """Whether the difference counts."""
        return self.p_adjusted < LEVEL


@dataclass(frozen=True)
class Stability:
    """How a row's answers relate to the unpatched model's, as shares of the questions.

    loyalty   : answered the same
    lost, won : the question's score fell, rose; together they are the flips
    """

    loyalty: float
    lost: float | None
    won: float | None


@dataclass
class Comparison:
    """What the questions say about a leaderboard's rows.

    means     : (label, task) -> mean question score
    intervals : (label, task) -> its 95 % interval
    relative  : label -> 95 % interval of the average relative to the unpatched model
    groups    : (label, group) -> the same, over the tasks of a group
    pairs     : all comparisons within budgets, by (first, second, task)
    stability : (label, task) -> flips and loyalty
    ranks     : label -> 1 + the number of rows of its budget that are significantly better by the average
    untested  : tasks without scores of single questions
    averaged  : tasks whose question scores make up the average that is tested and ranked
    """

    means: dict[tuple[str, str], float] = field(default_factory=dict)
    intervals: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    relative: dict[str, tuple[float, float]] = field(default_factory=dict)
    groups: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    pairs: dict[tuple[str, str, str | None], Pair] = field(default_factory=dict)
    stability: dict[tuple[str, str], Stability] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)
    untested: list[str] = field(default_factory=list)
    averaged: list[str] = field(default_factory=list)

    def pair(self, first: str, second: str, task: str | None) -> Pair | None:
        """The comparison of two rows in either order, with the first one's view; None if there is none."""
        if (found := self.pairs.get((first, second, task))) is not None:
            return found
        if (found := self.pairs.get((second, first, task))) is None:
            return None
        turned = not found.better and found.difference != 0
        low, high = (None, None) if found.low is None else (-found.high, -found.low)
        return Pair(first, second, task, -found.difference, found.p, found.p_adjusted, turned, low, high)


def compare(tasks: list[TaskAnswers], budgets: list[list[str]], base: str, groups: dict[str, str]) -> Comparison:
    """Compare all rows of each budget with each other and with the unpatched model.

    Args:
        tasks: the answers to each task.
        budgets: labels of the rows of each budget, without the unpatched model.
        base: label of the unpatched model.
        groups: task -> its group.
    """
    result = Comparison(untested=[task.task for task in tasks if task.scores is None])
    for task in tasks:
        for label in task.labels:
            if base in task.labels and label != base:
                result.stability[label, task.task] = _stability(task, label, base)
    scored = [task for task in tasks if task.scores is not None]
    if not scored:
        return result
    for task in scored:
        p = _p_values(task, _swaps(budgets))
        _add_pairs(result, task.task, task.labels, budgets, base, p, task.scores.mean(1), task.sign)
    pictures = units_of([name for task in scored for name in task.pictures])
    ends = np.cumsum([len(task.pictures) for task in scored])[:-1]
    units = {task.task: own for task, own in zip(scored, np.split(pictures, ends), strict=True)}
    everywhere = [label for label in tasks[0].labels if all(label in task.labels for task in tasks)]
    draws = _draws(scored, units)
    _add_intervals(result, scored, draws, everywhere, base, groups)
    for task in scored:
        _add_ends(result, task.task, task.labels, draws[task.task])
    if base in everywhere:
        _add_average(result, scored, units, everywhere, budgets, base)
        ratios = [_ratios(task, draws[task.task], everywhere, base) for task in scored if task.row(base).any()]
        if ratios:
            _add_ends(result, None, everywhere, np.mean(ratios, axis=0))
    return result


def _stability(task: TaskAnswers, label: str, base: str) -> Stability:
    ours, theirs = task.answers[task.labels.index(label)], task.answers[task.labels.index(base)]
    loyalty = sum(a == b for a, b in zip(ours, theirs, strict=True)) / max(len(ours), 1)
    if task.scores is None:
        return Stability(loyalty, None, None)
    change = task.sign * (task.row(label) - task.row(base))
    return Stability(loyalty, float((change < 0).mean()), float((change > 0).mean()))


def _swaps(budgets: list[list[str]]) -> int:
    """How many random swaps it takes for a difference to stay significant whatever the number of pairs."""
    pairs = max((len(budget) * (len(budget) + 1) // 2 for budget in budgets), default=0)
    return max(SWAPS, round(5 * pairs / LEVEL))


def _p_values(task: TaskAnswers, swaps: int) -> np.ndarray:
    """Of all pairs of a task's rows: McNemar where questions are right or wrong and each has a picture of its own."""
    units = units_of(task.pictures)
    if task.right_or_wrong and units.max() + 1 == len(units):
        return mcnemar(task.scores)
    return swap_test(sums_by_unit(task.scores, units), swaps)


def _add_pairs(
    result: Comparison,
    task: str | None,
    labels: Sequence[str],
    budgets: list[list[str]],
    base: str,
    p: np.ndarray,
    values: np.ndarray,
    sign: int = 1,
) -> None:
    """Take each budget's pairs, and correct them for their number."""
    at = {label: i for i, label in enumerate(labels)}
    for budget in budgets:
        rows = [label for label in [*budget, base] if label in at]
        pairs = [(first, second) for i, first in enumerate(rows) for second in rows[i + 1 :]]
        raw = np.array([p[at[first], at[second]] for first, second in pairs])
        for (first, second), single, adjusted in zip(pairs, raw, holm(raw), strict=True):
            difference = values[at[first]] - values[at[second]]
            numbers = (float(f"{number:.9g}") for number in (difference, single, adjusted))
            result.pairs[first, second, task] = Pair(first, second, task, *numbers, bool(sign * difference > 0))


def _draws(tasks: list[TaskAnswers], units: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Bootstrap draws of every row's mean score, task -> [draws, rows]; one draw of pictures serves all tasks."""
    count = 1 + max(int(own.max()) for own in units.values())
    sizes = {t.task: np.bincount(units[t.task], minlength=count) for t in tasks}
    sums = {t.task: sums_by_unit(t.scores, units[t.task], count) for t in tasks}
    # Tasks that share pictures are drawn together; others apart, so that each keeps its number of pictures. Finer
    # strata, of pictures that are in just the same tasks, would be of one or two, which vary too little.
    within = np.stack([size > 0 for size in sizes.values()])
    strata = connected_components(within.astype(int) @ within.T.astype(int))[1][within.argmax(0)]
    drawn: dict[str, list] = {t.task: [] for t in tasks}
    for weights in resamples(strata, RESAMPLES):
        for t in tasks:
            size = (weights @ sizes[t.task])[:, None]  # 0 where a task of a few pictures lost all of them
            empty = np.full((len(weights), len(t.labels)), np.nan)
            drawn[t.task].append(np.divide(weights @ sums[t.task].T, size, out=empty, where=size > 0))
    return {task: np.concatenate(chunks) for task, chunks in drawn.items()}


def _add_ends(result: Comparison, task: str | None, labels: Sequence[str], draws: np.ndarray) -> None:
    """The intervals of a column's differences, from draws [draws, rows] of what is subtracted."""
    at = {label: i for i, label in enumerate(labels)}
    for key, pair in result.pairs.items():
        if pair.task == task:
            ends = _spread(["difference"], (draws[:, at[pair.first]] - draws[:, at[pair.second]])[:, None])
            low, high = ends.get("difference", (None, None))
            result.pairs[key] = replace(pair, low=low, high=high)


def _add_intervals(
    result: Comparison,
    tasks: list[TaskAnswers],
    means: dict[str, np.ndarray],
    everywhere: list[str],
    base: str,
    groups: dict[str, str],
) -> None:
    """Wilson's interval for right or wrong, else the bootstrap's, as of all averages; from draws [draws, rows]."""
    for t in tasks:
        if t.right_or_wrong:
            own = units_of(t.pictures)
            clusters = 1 + int(own.max())
            size = effective_size(t.scores, own)
            low, high = wilson(t.scores.mean(1), size, clusters if clusters < len(own) else None)
        else:
            low, high = interval(means[t.task])
        for label, mean, *ends in zip(t.labels, t.scores.mean(1), low, high, strict=True):
            result.means[label, t.task] = float(mean)
            result.intervals[label, t.task] = _ends(*ends)
    ratios = {t.task: _ratios(t, means[t.task], everywhere, base) for t in tasks if base in everywhere}
    ratios = {task: ratio for task, ratio in ratios.items() if ratio is not None}
    for group in dict.fromkeys(groups[task] for task in ratios):
        within = np.mean([ratio for task, ratio in ratios.items() if groups[task] == group], axis=0)
        result.groups |= {(label, group): ends for label, ends in _spread(everywhere, within).items()}
    if ratios:
        result.relative = _spread(everywhere, np.mean(list(ratios.values()), axis=0))


def _ratios(task: TaskAnswers, means: np.ndarray, labels: list[str], base: str) -> np.ndarray | None:
    """Bootstrap draws of each row's score relative to the unpatched model's [draws, rows]; None where that has none."""
    ours = means[:, [task.labels.index(label) for label in labels]]
    theirs = means[:, [task.labels.index(base)]]
    if not task.row(base).any():
        return None
    ratio = np.divide(ours, theirs, out=np.full_like(ours, np.nan), where=theirs != 0)
    return ratio if task.sign > 0 else 2 - ratio


def _spread(labels: list[str], draws: np.ndarray) -> dict[str, tuple[float, float]]:
    """Intervals of bootstrap draws [draws, rows]. Draws that are all alike, as of a score of 0, have none."""
    known = np.flatnonzero(np.isfinite(draws).any(0))
    known = known[np.nanmax(draws[:, known], 0) > np.nanmin(draws[:, known], 0)]
    return {labels[i]: _ends(*interval(draws[:, i])) for i in known}


def _ends(low: float, high: float) -> tuple[float, float]:
    return round(float(low), 9), round(float(high), 9)


def _add_average(
    result: Comparison,
    tasks: list[TaskAnswers],
    units: dict[str, np.ndarray],
    labels: list[str],
    budgets: list[list[str]],
    base: str,
) -> None:
    """Pairs and ranks by the average: question scores are weighted so that they add up to it.

    The weights come from the unpatched model's scores. A test against that model must not know which of the two it is,
    or luck of the other's on a task would weigh more than its own; there the weights come from the scores of both.
    """
    tasks = [task for task in tasks if task.row(base).any()]
    if not tasks:
        return
    count = 1 + max(int(own.max()) for own in units.values())
    result.averaged = [task.task for task in tasks]
    own = {
        t.task: sums_by_unit(t.scores, units[t.task], count)[[t.labels.index(label) for label in labels]] for t in tasks
    }
    at, swaps = labels.index(base), _swaps(budgets)

    def weighted(rows: list[int], scale: list[int]) -> np.ndarray:
        parts = [t.sign * own[t.task][rows] / abs(own[t.task][scale].sum(1).mean()) / len(tasks) for t in tasks]
        return np.sum(parts, axis=0)

    sums = weighted(list(range(len(labels))), [at])
    p = swap_test(sums[:, sums.any(0)], swaps)
    for i in range(len(labels)):
        if i != at:
            both = weighted([i, at], [i, at])
            p[i, at] = p[at, i] = swap_test(both[:, both.any(0)], swaps)[0, 1]
    _add_pairs(result, None, labels, budgets, base, p, sums.sum(1))
    for budget in budgets:
        rows = [label for label in budget if label in labels]
        if not rows:  # of an unfinished run: none of them has every task yet
            continue
        better = [[_beats(result.pair(one, other, None)) for other in rows] for one in rows]
        result.ranks |= dict(zip(rows, map(int, ranks(np.array(better).reshape(len(rows), -1))), strict=True))


def _beats(pair: Pair | None) -> bool:
    return pair is not None and pair.better and pair.significant
