"""Races on a recorded board and on made-up ones: what is chosen, at what cost, and how often a winner is dropped."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from vlmslim.evaluation.race import Race, log_evidence

RECORDS = Path(__file__).parents[1] / "support"  # advise_*.json, by scripts/analysis/record_scores.py
SHARE = 0.25  # of the full board's answers


@dataclass
class Board:
    """A full board: costs (rows,), scores of the rows (rows, questions) and of the unpatched model, and tasks."""

    costs: np.ndarray
    scores: np.ndarray
    base: np.ndarray
    tasks: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """Compute what each question adds to the average: the mean over tasks of the ratio to the unpatched model."""
        names, sizes = np.unique(self.tasks, return_counts=True)
        right = {name: self.base[self.tasks == name].sum() for name in names}
        return np.array([len(self.tasks) / len(names) / right[name] for name in self.tasks])

    @property
    def averages(self) -> np.ndarray:
        names = np.unique(self.tasks)
        parts = [(self.tasks == name, self.base[self.tasks == name].mean()) for name in names]
        return np.mean([self.scores[:, own].mean(1) / mean for own, mean in parts], axis=0)

    def race(self, target: float | None, seed: int, rows: np.ndarray, share: float = SHARE) -> tuple[Race, int | None]:
        """Race some rows; returns the race and the row of the board that it chose."""
        order = np.random.default_rng(seed).permutation(len(self.base))
        most = int(share * (len(self.costs) + 1) * len(order)) - len(order)  # the unpatched model is asked everything
        race = Race(self.values[order], self.base[order], self.costs[rows], target, 0.05, most, block=8)
        while (row := race.next_row()) is not None:
            first = len(race.scores[row])
            race.add(row, self.scores[rows[row]][order][first : first + race.block])
        assert race.asked.sum() <= most
        chosen = race.best()
        return race, None if chosen is None else int(rows[chosen])

    def beaten(self, row: int) -> bool:
        """Tell if another row, or the unpatched model, is as good in cost and average and better in one of them."""
        costs, averages = self.costs, self.averages
        as_good = (costs <= costs[row]) & (averages >= averages[row])
        return bool((as_good & ((costs < costs[row]) | (averages > averages[row]))).any())


def record(name: str) -> Board:
    """Read a recorded board."""
    rows = json.loads((RECORDS / f"advise_{name}.json").read_text())
    tasks = rows["none"]["scores"]

    def scores(row):
        return [float(digit) for task in tasks for digit in row["scores"][task]]

    base, *others = rows.values()
    return Board(
        np.array([row["cost"] / base["cost"] for row in others]),
        np.array([scores(row) for row in others]),
        np.array(scores(base)),
        np.repeat(list(tasks), [len(digits) for digits in tasks.values()]),
    )


@pytest.fixture(scope="module")
def recorded() -> Board:
    return record("scenes")


GOALS = {  # target, and the most that a row may cost
    "scenes": [(0.92, 0.6), (0.9, 0.6), (0.87, 1), (0.8, 1), (0.7, 1), (None, 0.45)],
    "documents": [(0.7, 1), (0.6, 1), (0.5, 1), (0.4, 1), (None, 0.3), (None, 0.6)],  # not used for the estimates
}


@pytest.mark.parametrize("name, target, most_cost", [(name, *goal) for name, goals in GOALS.items() for goal in goals])
def test_the_choice_is_on_the_front_of_the_full_board_at_a_quarter_of_its_cost(name, target, most_cost):
    board = record(name)
    rows = np.flatnonzero(board.costs <= most_cost)
    chosen = [board.race(target, seed, rows)[1] for seed in range(20)]
    assert sum(row is not None and not board.beaten(row) for row in chosen) >= 18


def test_an_estimate_is_exact_after_the_last_question(recorded):
    race = Race(recorded.values, recorded.base, recorded.costs, None, 0.05, 10**6, block=8)
    race.add(0, recorded.scores[0])
    assert race.estimate(0) == pytest.approx(recorded.averages[0])


def test_a_target_that_no_row_reaches(recorded):
    rows = np.flatnonzero(recorded.costs < 0.25)
    assert recorded.race(0.98, 0, rows)[1] is None


def test_the_winner_is_rarely_dropped_and_others_are():
    """Made-up boards of rows that are close: 40 races of each goal, and at most 5 % of the winners may be dropped."""
    wrong, dropped = {0.85: 0, None: 0}, {0.85: 0, None: 0}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        base = rng.random(600) < 0.8
        kept = np.array([0.5, 0.8, 0.85, 0.9, 0.92, 0.94])[:, None]  # of the right answers
        scores = np.where(base, rng.random((6, 600)) < kept, rng.random((6, 600)) < 0.05).astype(float)
        board = Board(np.arange(1.0, 7.0), scores, base.astype(float), np.repeat(["a", "b"], 300))
        for target in wrong:
            reaching = np.flatnonzero(board.averages >= (target or 0))
            winner = reaching[0] if target else int(board.averages.argmax())
            race, _ = board.race(target, seed, np.arange(6), share=0.7)
            wrong[target] += race.dropped[winner]
            dropped[target] += race.dropped.sum()
    assert max(wrong.values()) <= 4  # of 40: at a true rate of 5 %, more than 4 happen once in twenty times
    assert min(dropped.values()) >= 40


def test_evidence_against_a_true_hypothesis_is_rare_and_against_a_false_one_grows():
    numbers = np.repeat([1.0, -1.0, 0.0], [30, 30, 140])
    draws = [np.random.default_rng(seed).permutation(200) for seed in range(300)]
    reached = sum(log_evidence(numbers[order][:150], 200, -1.0) >= np.log(10) for order in draws)
    assert reached <= 30 + 3 * np.sqrt(27)  # one in ten, by Ville's inequality
    better = numbers.copy()
    better[60:120] = 1.0
    assert all(log_evidence(better[order][:120], 200, -1.0) >= np.log(100) for order in draws[:50])
    assert log_evidence(np.empty(0), 10, -1.0) == 0.0
    assert log_evidence(np.ones(9), 10, -1.0) == np.inf  # the last number cannot bring the mean to 0
