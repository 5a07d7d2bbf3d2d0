"""Leaderboards for the tests: rows made by hand, and small runs of the harness's double."""

from dataclasses import replace

import pytest
from evaluation_doubles import FakeHarness, Solving, stage, write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.rows import Cost, Row
from vlmslim.leaderboard.scores import Score

#: label -> right answers of four to the tasks count and text
RIGHT = {
    "none": (4, 2),
    "random-64": (2, 2),
    "divprune-64": (3, 2),
    "fastv-64": (2, 1),
    "random-16": (1, 1),
    "divprune-16": (1, 2),
    "fastv-16": (2, 0),
}


class Costly(Solving):
    """Its solutions cost more on the task `text` than on the sample prompts."""

    def evaluate(self, variant, task):
        self.cost = 44.0 if task == "text" else 40.0
        return super().evaluate(variant, task)


def costs(**changes) -> Cost:
    """Make the cost of a prompt with one image of 144 visual tokens."""
    usual = {
        **{"requested": None, "kept": 144.0, "kept_low": None, "kept_high": None, "last": 144.0, "equivalent": 144.0},
        **{"flops": 1e9, "kv_bytes": 2.0**10, "selection_ms": None, "positions": "original"},
    }
    return Cost(**usual | changes)


def scored_rows(**scores: dict[str, float]) -> list[Row]:
    """Make rows from label -> task -> score; the first is at no budget if its label is none."""
    return [
        Row(label, None if label == "none" else 1, scores={task: Score(value) for task, value in own.items()})
        for label, own in scores.items()
    ]


def row_of(board: Leaderboard, label: str) -> Row:
    """Find a row by its label."""
    return next(row for row in board.rows if row.label == label)


def interrupted(config, place: tuple[str, str]) -> Leaderboard:
    """Run until a cell, and read what is there."""
    with pytest.raises(KeyboardInterrupt):
        run(config, harness=FakeHarness(fail_at=place, failure=KeyboardInterrupt()))
    return Leaderboard.read(config.output)


class Staged(FakeHarness):
    """Records what each stage did: divprune always acts, and drop_visual as often as it is told, in either task."""

    def __init__(self, acted):
        super().__init__()
        self.acted = acted

    def evaluate(self, variant, task):
        cell = super().evaluate(variant, task)
        before = stage("none", keeps_all=True) if variant.unpatched else stage("divprune", 350)
        stages = [before | {"layers": [], "prompts": 350}]
        if variant.label == "both":
            stages.append(stage("drop_visual", self.acted[task], (6,), decides=True, prompts=350))
        return replace(cell, receipt=cell.receipt | {"stages": stages})


def staged(folder, **acted) -> Leaderboard:
    both = {"label": "both", "stages": [{"method": "divprune", "keep": 64}, {"method": "drop_visual"}]}
    return run(load_config(write_config(folder, methods=[both], budgets=[64])), harness=Staged(acted))
