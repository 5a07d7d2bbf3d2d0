"""A race between rows: which row to choose, after as few questions as possible.

All rows are asked the same questions in the same random order, but each only as many as it takes. The *full board* asks
every row every question; the race draws from these questions without replacement. It has one of two goals:

- `target` is a number: the cheapest row whose average, relative to the unpatched model, is at least the target;
- `target` is None: the row with the best average.

A row leaves the race when it cannot win: it is below the target, or below the row that leads. Each of these tests bets
against the hypothesis that the row does win. The stake that the bets have won is a nonnegative supermartingale under
this hypothesis, so by Ville's inequality it ever grows to 1/a with probability at most a, however often one looks
(Waudby-Smith and Ramdas, "Estimating means of bounded random variables by betting", arXiv:2010.09686, and "Confidence
sequences for sampling without replacement", arXiv:2006.04347). With a = `level` / rows, the row that wins on the full
board is dropped with probability at most `level`.

Where the race must end before all others are dropped, because it has spent its share of the full board's cost, the row
with the best estimate is chosen, and the result lists the rows that are still in the race.

Estimates are stratified, because the unpatched model was asked every question: a row is right more often where the
unpatched model is right, and how often that is on all questions is known. So each task is split into the questions
that the unpatched model answers rightly and the others. A row's score in each part is estimated from its own answers,
and the parts count by their true sizes.
"""

from dataclasses import dataclass, field

import numpy as np

FRACTIONS = np.array([0.01, 0.03, 0.1, 0.2, 0.4, 0.8])  # of the largest stake; the bets are spread over all of them


def log_evidence(drawn: np.ndarray, size: int, low: float) -> float:
    """Return the logarithm of the evidence that the mean of all numbers is above 0: what bets against it have won.

    Args:
        drawn: the first of `size` numbers in random order.
        size: how many numbers there are.
        low: no number is lower; negative.

    Returns:
        If the mean is at most 0, this ever reaches log(1 / a) with probability at most a.
    """
    before = np.concatenate([[0.0], np.cumsum(drawn)[:-1]])
    left = size - np.arange(len(drawn))
    mean = -before / left  # of the numbers that are left, if the mean of all is 0
    room = mean - low
    if (room <= 1e-12).any():  # what is left cannot bring the mean down to 0
        return float("inf")
    won = np.log1p(FRACTIONS[:, None] * ((drawn - mean) / room)).cumsum(1)
    return float(np.logaddexp.reduce(won, axis=0).max() - np.log(len(FRACTIONS))) if len(drawn) else 0.0


@dataclass
class Race:
    """The state of a race. Ask the rows that `next_rows` names their next `block` questions, and call `add`.

    values   : (questions,) how much a question with score 1 adds to the average, times the number of questions. The
               average of a row is the mean of values x scores
    base     : (questions,) scores of the unpatched model, whose average is 1
    costs    : (rows,) cost of a row, in any unit
    target   : the average to reach at the least cost; None for the best average
    level    : most probable error of all tests together
    most     : how many answers all rows together may be asked for
    block    : questions that a row is asked at a time
    """

    values: np.ndarray
    base: np.ndarray
    costs: np.ndarray
    target: float | None
    level: float
    most: int
    block: int
    scores: list[np.ndarray] = field(init=False)
    dropped: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.scores = [np.empty(0) for _ in self.costs]
        self.dropped = np.zeros(len(self.costs), dtype=bool)
        parts, stratum, sizes = np.unique(
            np.stack([self.values, self.base >= 0.5]), axis=1, return_inverse=True, return_counts=True
        )
        self._stratum, self._sizes, self._worths, self._right = stratum.ravel(), sizes, parts[0], parts[1] > 0

    @property
    def asked(self) -> np.ndarray:
        """Questions that each row was asked, (rows,)."""
        return np.array([len(own) for own in self.scores])

    @property
    def left(self) -> list[int]:
        """Rows that can still win."""
        return [int(row) for row in np.flatnonzero(~self.dropped)]

    def add(self, row: int, scores: np.ndarray) -> None:
        """Take in the scores of a row on its next questions, and drop the rows that cannot win."""
        self.scores[row] = np.concatenate([self.scores[row], scores])
        if self.target is not None:
            self.dropped[row] |= self._is_below(row, self.target * self.values * self.base)
            return
        leader = self.best()
        for other in self.left:
            if leader is not None and other != leader and len(self.scores[other]):
                self.dropped[other] |= self._is_below(other, self._worth(leader))

    def next_row(self) -> int | None:
        """Return the row to ask next; None when the race has a winner or has spent all that it may."""
        if self.asked.sum() + self.block > self.most:
            return None
        return self._next_of_best() if self.target is None else self._next_of_target(self.target)

    def best(self) -> int | None:
        """Return the row that the estimates choose; None if no row that was asked reaches the target."""
        known = [row for row in self.left if len(self.scores[row])]
        if self.target is None:
            return max(known, key=lambda row: (self.estimate(row), -self.costs[row]), default=None)
        reaching = [row for row in known if self.estimate(row) >= self.target]
        return min(reaching, key=lambda row: (self.costs[row], -self.estimate(row)), default=None)

    def estimate(self, row: int) -> float:
        """Estimate the average of a row; the unpatched model's is 1. After the last question this is no estimate."""
        return self._estimate(row)[0]

    def _estimate(self, row: int) -> tuple[float, float]:
        """Estimate the average of a row by strata, and the standard error of the estimate.

        Of a stratum that was asked little, the row's rate on all questions that the unpatched model answers as well (or
        as badly) says more, so it counts as one more answer.
        """
        own = self.scores[row]
        strata, count = self._stratum[: len(own)], len(self._sizes)
        total, asked = np.bincount(strata, own, count), np.bincount(strata, minlength=count)
        prior = np.empty(count)
        for alike in (self._right, ~self._right):
            prior[alike] = (total[alike].sum() + 0.5) / (asked[alike].sum() + 1)
        rate = (total + prior) / (asked + 1)
        left = self._sizes - asked
        mean = float(((total + left * rate) * self._worths).sum()) / len(self.values)
        doubt = (total + prior + 0.5) / (asked + 2)  # half right in one more answer, because the first may be all alike
        variance = self._worths**2 * doubt * (1 - doubt) * left * self._sizes / (asked + 1)
        return mean, float(np.sqrt(variance.sum())) / len(self.values)

    def _next_of_target(self, target: float) -> int | None:
        """Choose the cheapest row that may reach the target; when it has, rows that cost no more and are in doubt."""
        by_cost = sorted(self.left, key=lambda row: self.costs[row])
        hopeful = next((row for row in by_cost if self._upper(row) >= target), None)
        if hopeful is not None and self._unfinished(hopeful):
            return hopeful
        most = np.inf if hopeful is None else self.costs[hopeful]
        rivals = [row for row in by_cost if self.costs[row] <= most and self._unfinished(row)]
        return max(rivals, key=self._upper, default=None)

    def _next_of_best(self) -> int | None:
        """Choose the row that may have the best average; when it is finished, the next one that may."""
        rivals = [row for row in self.left if self._unfinished(row)] if len(self.left) > 1 else []
        return max(rivals, key=self._upper, default=None)

    def _unfinished(self, row: int) -> bool:
        return len(self.scores[row]) < len(self.values)

    def _worth(self, row: int) -> np.ndarray:
        """Return what each answer of a row adds to its average."""
        return self.values[: len(self.scores[row])] * self.scores[row]

    def _upper(self, row: int) -> float:
        """Return what a row's average may well be. It decides who is asked next, not who is dropped.

        Half a standard error above the estimate is little, because there are many rows and few answers: a row that is
        asked again only if its luck turns does no harm, as long as it is not dropped.
        """
        mean, error = self._estimate(row)
        return mean + 0.5 * error if len(self.scores[row]) else np.inf

    def _is_below(self, row: int, other: np.ndarray) -> bool:
        """Tell whether a row's average is below that of other numbers, of which the first may be known only."""
        both = min(len(self.scores[row]), len(other))
        gaps = other[:both] - self._worth(row)[:both]
        if both == len(self.values):
            return float(gaps.mean()) > 1e-12
        return log_evidence(gaps, len(self.values), -self.values.max()) >= np.log(len(self.costs) / self.level)
