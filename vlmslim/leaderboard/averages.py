"""Averages over tasks on which the unpatched model scores 1, with what their intervals and tests need."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.sparse.csgraph import connected_components

from vlmslim.leaderboard.samples import ScoredTask
from vlmslim.leaderboard.significance import (
    covariances,
    half_width,
    resolution,
    sums_by_unit,
    swap_test,
    units_of,
)

#: What an average is measured on, each with the unpatched model at 1: the plain score, the score above that of the
#: blind model, and the score on the questions that the shrunk picture does not answer.
SCALES = ("unpatched", "vision-retained", "hard")

CONTRIBUTION = 0.1  # of a task's score that the picture has to contribute, for the task to count in vision-retained
RIGHT = 0.5  # a question counts as answered from this score on


@dataclass(frozen=True)
class References:
    """Rows that scales refer to, besides the unpatched model.

    blind        : label of the row without any visual token; None if there is none
    shrunk       : label of the row `downsample` of each budget, in the order of the budgets; None where there is none
    contributing : tasks to which the picture contributes enough, by their scores
    """

    blind: str | None = None
    shrunk: tuple[str | None, ...] = ()
    contributing: tuple[str, ...] = ()


class Pictures:
    """The pictures of some tasks, numbered: a test swaps whole pictures, and intervals rest on whole pictures.

    count   : number of pictures
    numbers : task -> number of each question's picture
    strata  : (pictures,) tasks that share pictures form one stratum. Finer strata, of the pictures that occur in
              exactly the same tasks, would hold one or two pictures each, which tell too little
    """

    def __init__(self, tasks: Sequence[ScoredTask]):
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


class Average:
    """The mean over tasks of (score - floor) / (unpatched - floor), for some rows.

    Where lower scores are better and there is no floor, it is 2 minus that ratio.

    Args:
        tasks: with at least one question each. The unpatched model's mean is not that of the floor on any of them.
        labels: of the rows, which all tasks have.
        base: label of the unpatched model, one of `labels`.
        floor: label of the row that scores 0, one of `labels`; None for the score 0.
    """

    def __init__(self, tasks: Sequence[ScoredTask], labels: Sequence[str], base: str, floor: str | None = None):
        self.tasks, self.labels, self.base, self.floor = list(tasks), list(labels), base, floor
        self.pictures = Pictures(self.tasks)
        self._ratios = {task.task: self._ratio(task) for task in self.tasks}

    def _ratio(self, task: ScoredTask) -> tuple[np.ndarray, np.ndarray]:
        """Relate the mean scores of the rows to the unpatched model's.

        Returns:
            (rows,) the ratios, and (rows, pictures), how far each picture moves them, to first order.
        """
        influence, means = self.pictures.influence(task), task.scores.mean(1)
        rows, at = [task.labels.index(label) for label in self.labels], task.labels.index(self.base)
        if self.floor is not None:
            low = task.labels.index(self.floor)
            influence, means = influence - influence[low], means - means[low]
        ratio = means[rows] / means[at]
        moved = (influence[rows] - ratio[:, None] * influence[at]) / means[at]
        return (ratio, moved) if task.sign > 0 or self.floor is not None else (2 - ratio, -moved)

    def estimate(self, names: Sequence[str] | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Average over the tasks called `names`, by default over all.

        Returns:
            The values (rows,), their covariances (strata, rows, rows) and the degrees of freedom (strata,).
        """
        tasks = [task for task in self.tasks if names is None or task.task in names]
        values, influence = (np.mean([self._ratios[task.task][i] for task in tasks], axis=0) for i in (0, 1))
        own = self.pictures.of(*tasks)
        return values, *covariances(influence[:, own], self.pictures.strata[own])

    def tested(self, swaps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Compare all pairs of rows by the average, as a sum of question scores with a weight for each task.

        Task weights come from the unpatched model's scores. Where a row is tested against the unpatched model itself,
        they come from the scores of both rows. The null hypothesis says that the two rows are exchangeable, and
        weights from only one of them would bias the test.

        Args:
            swaps: random swaps of a test.

        Returns:
            (rows,) the averages, up to a number that is the same for all rows; (rows, rows) p values, and whether each
            is the smallest that random swaps can give.
        """
        sums = {t.task: self.pictures.sums(t)[[t.labels.index(label) for label in self.labels]] for t in self.tasks}
        at, low = self.labels.index(self.base), None if self.floor is None else self.labels.index(self.floor)

        def weighted(rows: list[int], scale: list[int]) -> np.ndarray:
            parts = []
            for task in self.tasks:
                total = sums[task.task][scale].sum(1).mean()
                if low is not None:  # a row may be worse than the floor, and no weight may be infinite
                    above = task.sign * (total - sums[task.task][low].sum())
                    total = max(above, CONTRIBUTION * abs(total))
                parts.append(task.sign * sums[task.task][rows] / abs(total) / len(self.tasks))
            return np.sum(parts, axis=0)

        everything = weighted(list(range(len(self.labels))), [at])
        p, at_limit = swapped(everything[:, everything.any(0)], swaps)
        for i in range(len(self.labels)):
            if i != at:
                both = weighted([i, at], [i, at])
                own, limited = swapped(both[:, both.any(0)], swaps)
                p[i, at] = p[at, i] = own[0, 1]
                at_limit[i, at] = at_limit[at, i] = limited[0, 1]
        return everything.sum(1), p, at_limit


def swapped(sums: np.ndarray, swaps: int) -> tuple[np.ndarray, np.ndarray]:
    """Test all pairs by swaps: p values, and whether each is the smallest that random swaps can give."""
    p = swap_test(sums, swaps)
    return p, p < 1.5 * resolution(sums.shape[1], swaps)


def contributes(score: float, blind: float, higher_is_better: bool) -> bool:
    """Tell whether the picture contributes enough to a task: a tenth of the score of the unpatched model.

    Where lower scores are better, it is a tenth of the blind model's.
    """
    gain, whole = (score - blind, abs(score)) if higher_is_better else (blind - score, abs(blind))
    return gain > 0 and gain >= CONTRIBUTION * whole


def surely_contributes(task: ScoredTask, base: str, blind: str) -> bool:
    """Tell whether the 95 % interval of the unpatched model's score above the blind model's lies above 0."""
    pictures = Pictures([task])
    influence = pictures.influence(task)
    rows = task.labels.index(base), task.labels.index(blind)
    gain = task.sign * (task.scores[rows[0]].mean() - task.scores[rows[1]].mean())
    spread, freedom = covariances((influence[rows[0]] - influence[rows[1]])[None], pictures.strata)
    return bool(gain > half_width(spread[:, 0, 0], freedom))  # False where the width is not known


def hard_part(task: ScoredTask, shrunk: str) -> ScoredTask | None:
    """Return the part of a task that a row does not answer; None where scores do not say what an answer is.

    A question is answered if its score, a number from 0 (wrong) to 1 (right), is at least one half.
    """
    if task.sign < 0 or task.scores.min() < 0 or task.scores.max() > 1:
        return None
    wrong = (task.row(shrunk) < RIGHT).nonzero()[0]
    return replace(
        task,
        answers={label: [own[i] for i in wrong] for label, own in task.answers.items()},
        scores=task.scores[:, wrong],
        pictures=[task.pictures[i] for i in wrong],
    )
