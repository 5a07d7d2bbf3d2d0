"""Scales other than "% of unpatched", and costs other than tokens: what they say, against sums by hand."""

import json
from dataclasses import replace

import numpy as np
import pytest
from boards import costs, row_of
from evaluation_doubles import FakeHarness, receipt, write_config
from scipy import stats

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.averages import References, contributes
from vlmslim.leaderboard.axes import quality_axes
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.comparison import compare
from vlmslim.leaderboard.costs import add_fronts, front_changes, spans
from vlmslim.leaderboard.render import render
from vlmslim.leaderboard.rows import Row, Times
from vlmslim.leaderboard.samples import ScoredTask
from vlmslim.leaderboard.scores import Estimate

ROWS = ("none", "blind", "divprune", "downsample")


def scored(task: str, scores: dict[str, list[float]], sign: int = 1) -> ScoredTask:
    """Make a task whose questions have a picture each."""
    count = len(scores["none"])
    answers = {label: [str(x) for x in own] for label, own in scores.items()}
    return ScoredTask(task, answers, np.array(list(scores.values())), [f"{task} {i}" for i in range(count)], sign)


def drawn(task: str, shares: tuple[float, ...], seed: int) -> ScoredTask:
    """Draw right and wrong answers of the four rows to 80 questions."""
    rng = np.random.default_rng(seed)
    return scored(task, {label: (rng.random(80) < p).astype(float) for label, p in zip(ROWS, shares, strict=True)})


TASKS = [
    drawn("see", (0.9, 0.2, 0.6, 0.5), 0),
    drawn("look", (0.8, 0.3, 0.7, 0.4), 1),
    drawn("know", (0.7, 0.66, 0.6, 0.6), 2),
]
GROUPS = dict.fromkeys(("see", "look", "know"), "general")


def compared(scale="unpatched", tasks=TASKS, contributing=("see", "look")):
    budgets = [["blind"], ["divprune", "downsample"]]
    references = References("blind", (None, "downsample"), contributing)
    return compare(tasks, budgets, "none", GROUPS, references, scale)


def by_hand(tasks: list[ScoredTask], label: str, floor: str | None) -> tuple[float, float, float]:
    """Compute an average and the ends of its interval, of tasks that share no picture."""
    shares, variances, freedom = [], [], []
    for task in tasks:
        below = task.row(floor) if floor else 0 * task.row("none")
        ours, whole = task.row(label) - below, task.row("none") - below
        share = ours.mean() / whole.mean()
        moved = (ours - share * whole) / whole.mean()
        shares.append(share)
        variances.append(moved.var(ddof=1) / len(moved) / len(tasks) ** 2)
        freedom.append(len(moved) - 1)
    spread = np.array(variances)
    pooled = spread.sum() ** 2 / (spread**2 / freedom).sum()
    half = stats.t.ppf(0.975, pooled) * spread.sum() ** 0.5
    return np.mean(shares), np.mean(shares) - half, np.mean(shares) + half


def test_vision_retained_intervals():
    """The floor varies with the rows, because the same pictures are drawn for all."""
    comparison = compared()
    assert comparison.vision["divprune"] == pytest.approx(by_hand(TASKS[:2], "divprune", "blind")[1:], abs=1e-8)
    assert "blind" not in comparison.vision and comparison.uncertain == []  # it is 0 by definition


def test_a_task_whose_picture_may_add_nothing_is_left_out():
    """Seven of ten against six of ten: a seventh of the score, but within the noise."""
    noisy = drawn("know", (0.72, 0.62, 0.7, 0.6), 5)
    comparison = compared(tasks=[*TASKS[:2], noisy], contributing=("see", "look", "know"))
    assert comparison.uncertain == ["know"]
    assert comparison.vision["divprune"] == pytest.approx(by_hand(TASKS[:2], "divprune", "blind")[1:], abs=1e-8)


@pytest.mark.parametrize(
    ("score", "blind", "higher", "enough"),
    [(69.5, 63.5, True, False), (61.9, 37.7, True, True), (0.5, 0.5, True, False), (0.4, 0.6, True, False)]
    + [(1.0, 2.0, False, True), (1.9, 2.0, False, False), (3.0, 2.0, False, False), (0.0, 0.0, True, False)],
)
def test_a_picture_has_to_add_a_tenth_of_the_score(score, blind, higher, enough):
    """ScienceQA and GQA of LLaVA-1.5-7B are the first two."""
    assert contributes(score, blind, higher) is enough


def test_the_hard_subset_holds_what_downsample_gets_wrong():
    comparison = compared()
    parts = []
    for task in TASKS:
        wrong = task.row("downsample") == 0
        parts.append(scored(task.task, {label: task.row(label)[wrong] for label in ROWS}))
    assert comparison.hard_questions == {"downsample": {part.task: part.scores.shape[1] for part in parts}}
    ours = comparison.hard["divprune"]
    assert (ours.value, ours.low, ours.high) == pytest.approx(by_hand(parts, "divprune", None), abs=1e-8)
    assert comparison.hard["downsample"] == Estimate(0.0) and "blind" not in comparison.hard


def test_graded_answers_are_right_from_one_half_on_and_other_scores_are_left_out():
    graded = scored(
        "see", {"none": [1.0, 1, 1], "blind": [0, 0, 0], "divprune": [0.3, 1, 0], "downsample": [0.5, 0.4, 0]}
    )
    points = scored("look", {label: [5.0, 7, 9] for label in ROWS})
    errors = scored("know", {label: [0.5, 0.1, 0.9] for label in ROWS}, sign=-1)
    comparison = compared(tasks=[graded, points, errors], contributing=())
    assert comparison.hard_questions == {"downsample": {"see": 2}}
    assert comparison.hard["divprune"].value == 0.5 and comparison.vision == {}


def test_ranks_and_tests_follow_the_scale():
    """Only the hard questions tell two rows apart of which one is right where the shrunk picture is."""
    right = np.arange(80) < 60
    easy = {
        "none": np.ones(80),
        "blind": np.zeros(80),
        "downsample": right,
        "same": right,
        "other": np.arange(80) >= 20,
    }
    task = scored("see", {label: own.astype(float) for label, own in easy.items()})
    references = References("blind", ("downsample",), ("see",))
    found = {
        scale: compare([task], [["downsample", "same", "other"]], "none", GROUPS, references, scale)
        for scale in ("unpatched", "vision-retained", "hard")
    }
    assert found["unpatched"].ranks == found["vision-retained"].ranks == {"downsample": 1, "same": 1, "other": 1}
    assert found["hard"].ranks == {"downsample": 2, "same": 2, "other": 1}
    assert found["hard"].pair("other", "same", None).difference == 1
    assert found["unpatched"].pair("other", "same", None).difference == 0


# ---------------------------------------------------------------------- boards

#: label -> right answers of 60 to the tasks count and text
RIGHT = {
    "none": (54, 30),
    "blind": (6, 29),
    "downsample-16": (30, 20),
    "random-16": (18, 24),
    "uniform-16": (24, 25),
    "divprune-16": (42, 27),
}


@pytest.fixture(scope="module")
def referred(tmp_path_factory):
    """A run with the default baselines."""
    path = write_config(tmp_path_factory.mktemp("referred"), budgets=[16])
    path.write_text(path.read_text().replace("baselines:\n- random\n", ""))
    scores = {(label, task): n for label, own in RIGHT.items() for task, n in zip(("count", "text"), own, strict=True)}
    config = load_config(path)
    run(config, harness=Blindable(scores=scores, questions=60))
    return config.output


class Blindable(FakeHarness):
    """Knows that `blind` keeps nothing, although it has no budget."""

    def evaluate(self, variant, task):
        cell = super().evaluate(variant, task)
        return replace(cell, receipt=receipt("blind", 0.0, 0.0)) if variant.label == "blind" else cell


def test_the_baselines_make_the_scales(referred):
    board = Leaderboard.read(referred)
    assert [row.label for row in board.rows[:2]] == ["none", "blind"]
    assert [len(group) for group in board.budgets()] == [1, 1, 4]
    assert board.vision_tasks == ["count"]
    ours = row_of(board, "divprune-16")
    assert ours.vision.value == pytest.approx((42 - 6) / (54 - 6)) and ours.vision.low < 0.75 < ours.vision.high
    assert ours.hard.value == pytest.approx(((42 - 30) / (54 - 30) + (27 - 20) / (30 - 20)) / 2)
    blind, base = row_of(board, "blind"), row_of(board, "none")
    assert (blind.vision, blind.rank, blind.hard) == (Estimate(0.0), None, None)
    assert (base.vision.value, base.hard) == (1, None)
    assert board.comparison.pair("blind", "none", "count").significant


def test_the_scales_are_in_every_format(referred):
    board = Leaderboard.read(referred)
    md, data = render(board, "md"), json.loads(render(board, "json"))
    for text in ("vision-retained, %", "hard subset, % of unpatched", "picture adds too little to them: text."):
        assert text in md
    assert {"vision-retained, %", "hard subset, % of unpatched"} <= {axis.name for axis in quality_axes(board)}
    assert "70 of 120 at 16 (count 30, text 40)" in md
    assert "Missing baseline" not in md
    row = next(row for row in data["rows"] if row["label"] == "divprune-16")
    assert row["vision"] == pytest.approx(0.75) and row["vision_low"] < 0.75
    assert (data["scale"], data["vision_tasks"]) == ("unpatched", ["count"])
    assert data["hard_questions"] == {"downsample-16": {"count": 30, "text": 40}}
    assert ",vision,vision_low,vision_high,hard," in render(board, "csv")


def test_the_scale_decides_ranks_marks_and_front(referred):
    plain, vision = Leaderboard.read(referred), Leaderboard.read(referred, "vision-retained")
    difference = vision.comparison.pair("divprune-16", "random-16", None).difference
    assert difference == pytest.approx((42 - 18) / (54 - 6))
    assert vision.medals(None)["divprune-16"] == 1
    assert [row.relative for row in vision.rows] == [row.relative for row in plain.rows]
    assert "The rank follows the vision-retained score" in render(vision, "md")
    with pytest.raises(ConfigError, match="scale='nothing': use one of unpatched, vision-retained, hard"):
        Leaderboard.read(referred, "nothing")


def test_a_scale_that_nothing_refers_to_is_refused(directory):
    for scale, name in (("vision-retained", "blind"), ("hard", "downsample")):
        with pytest.raises(ConfigError, match=f"needs finished rows of none and {name}.*add {name} to 'baselines'"):
            Leaderboard.read(directory, scale)
    md = render(Leaderboard.read(directory), "md")
    assert "Missing baseline: blind." in md and "Missing baseline: downsample." in md and "vision-retained, %" not in md


# ---------------------------------------------------------------------- costs


def test_the_front_depends_on_what_is_counted():
    """Three rows of 64 nominal tokens: the best is the dearest, and the worst is no cheaper except in time."""
    own = {"whole": (1.0, 144, 144, 1.0, 1.0), "late": (0.9, 64, 84, 0.6, 0.9), "early": (0.8, 64, 64, 0.5, 0.6)}
    own |= {"slow": (0.7, 64, 64, 0.5, 0.5)}
    rows = [
        Row(label, 64, relative=Estimate(value), cost=costs(requested=float(nominal), equivalent=float(equivalent)))
        for label, (value, nominal, equivalent, *_) in own.items()
    ]
    for row in rows:
        *_, row.work_ratio, ttft = own[row.label]
        row.times = Times(100 * ttft, ttft, 1.0, 1.0)
    add_fronts(rows)
    assert {row.label: row.pareto for row in rows} == {
        "whole": ["nominal tokens", "equivalent tokens", "FLOPs", "TTFT"],
        "late": ["nominal tokens", "equivalent tokens", "FLOPs", "TTFT"],
        "early": ["equivalent tokens", "FLOPs", "TTFT"],
        "slow": ["TTFT"],
    }
    assert front_changes(rows) == [
        "early by equivalent tokens, FLOPs and TTFT, not by nominal tokens",
        "slow by TTFT, not by nominal tokens, equivalent tokens and FLOPs",
    ]
    assert spans(rows[1:]) == (
        "equivalent tokens 64.0 (early) to 84.0 (late), FLOPs 0.50 (early) to 0.60 (late), "
        "TTFT 0.50 (slow) to 0.90 (late)"
    )
