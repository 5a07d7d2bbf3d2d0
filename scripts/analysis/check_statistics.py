"""Simulate what the statistics of the leaderboard promise: coverage of the intervals, and errors and power of the test.

    python scripts/analysis/check_statistics.py             # prints the two tables of docs/leaderboard.md
    python scripts/analysis/check_statistics.py --draws 500

Two rows answer right or wrong. The chance of a right answer differs between pictures (beta-distributed, with the given
correlation within a picture), and pictures that are hard for one row are hard for the other. Intervals are those of
`vlmslim.leaderboard.comparison.compare`, of whole data sets that are drawn anew each time.
"""

import argparse
from dataclasses import dataclass

import numpy as np
from scipy import stats

from vlmslim.io.files import markdown_table
from vlmslim.leaderboard import comparison
from vlmslim.leaderboard.samples import ScoredTask


@dataclass(frozen=True)
class Design:
    """A data set.

    correlation : of two questions about one picture
    chances     : of a right answer, of the unpatched model and of a method
    """

    pictures: int
    questions: int
    correlation: float
    chances: tuple[float, float] = (0.85, 0.7)

    def __str__(self) -> str:
        return f"{self.pictures} x {self.questions}"

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """Draw the scores of the two rows, (2, pictures, questions)."""
        shared, own = rng.normal(size=(1, self.pictures)), rng.normal(size=(2, self.pictures))
        rank = stats.norm.cdf(np.sqrt(0.5) * (shared + own))
        size, chances = 1 / self.correlation - 1, np.array(self.chances)[:, None]
        chance = stats.beta.ppf(rank, chances * size, (1 - chances) * size)
        return (rng.random((2, self.pictures, self.questions)) < chance[..., None]).astype(float)


DESIGNS = (Design(6, 20, 0.3), Design(10, 10, 0.3), Design(25, 4, 0.4), Design(100, 1, 0.3))


def coverage(design: Design, draws: int, seed: int = 0) -> tuple[float, float]:
    """Return the share of 95 % intervals that hold the truth: of the difference, and of the relative average."""
    rng = np.random.default_rng(seed)
    pictures = [str(picture) for picture in np.arange(design.pictures).repeat(design.questions)]
    answers = {label: [""] * len(pictures) for label in ("none", "method")}
    base, ours = design.chances
    swaps, comparison.SWAPS = comparison.SWAPS, 1  # p values are not looked at
    held = np.zeros(2)
    try:
        for _ in range(draws):
            task = ScoredTask("task", answers, design.draw(rng).reshape(2, -1), pictures)
            result = comparison.compare([task], [["method"]], "none", {"task": "group"})
            pair = result.pair("method", "none", "task")
            low, high = result.relative.get("method", (1.0, 1.0))
            if pair is not None and pair.low is not None and pair.high is not None:
                held[0] += pair.low <= ours - base <= pair.high
            held[1] += low <= ours / base <= high
    finally:
        comparison.SWAPS = swaps
    return float(held[0] / draws), float(held[1] / draws)


def rates(questions: int, only_first: float, only_second: float, level: float = 0.05) -> tuple[float, float]:
    """Compute how often McNemar's exact test and its mid-p test find a difference; nothing is drawn.

    Args:
        questions: number of questions.
        only_first: the chance that only the first row answers a question right.
        only_second: the chance that only the second does. With equal chances the result is the type I error.
        level: p values below it are findings.
    """
    differing, wins = np.arange(questions + 1)[:, None], np.arange(questions + 1)[None]
    either = only_first + only_second
    chance = stats.binom.pmf(differing, questions, either) * stats.binom.pmf(wins, differing, only_first / either)
    fewer = np.clip(np.minimum(wins, differing - wins), 0, None)
    exact = np.minimum(1, 2 * stats.binom.cdf(fewer, differing, 0.5))
    mid = np.minimum(1, 2 * stats.binom.cdf(fewer, differing, 0.5) - stats.binom.pmf(fewer, differing, 0.5))
    return float(chance[exact < level].sum()), float(chance[mid < level].sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=2000, help="data sets of each design")
    draws = parser.parse_args().draws
    lines = []
    for design in DESIGNS:
        difference, relative = coverage(design, draws)
        lines.append([str(design), f"{design.correlation:g}", f"{difference:.1%}", f"{relative:.1%}"])
    names = ["pictures x questions", "correlation", "difference", "relative average"]
    print(markdown_table(names, lines), end="\n\n", flush=True)
    lines = []
    for questions in (40, 100, 500):
        for either in (0.1, 0.3):
            error, better = rates(questions, either / 2, either / 2), rates(questions, either * 0.75, either * 0.25)
            lines.append([str(questions), f"{either:.0%}", *(f"{rate:.1%}" for rate in (*error, *better))])
    names = ["questions", "differ on", "error, exact", "error, mid-p", "power, exact", "power, mid-p"]
    print(markdown_table(names, lines))


if __name__ == "__main__":
    main()
