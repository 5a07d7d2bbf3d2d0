"""`vlmslim compare`: two runs, question by question."""

import csv
import io
import json

import pytest
from evaluation_doubles import FakeHarness, write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.two_runs import compare_runs, render


def finished(folder, right, changes=None, **behaviour):
    """Run, so that every label has these right answers of 60 to each task, and return the output directory."""
    folder.mkdir()
    config = load_config(write_config(folder, **{"budgets": [16]} | (changes or {})))
    tasks = [task.task for task in config.tasks]
    scores = {(label, task): count for label, count in right.items() for task in tasks}
    run(config, harness=FakeHarness(**{"scores": scores, "questions": 60} | behaviour))
    return config.output


RIGHT = {"none": 54, "divprune-16": 50, "random-16": 30}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    return finished(tmp_path_factory.mktemp("first") / "a", RIGHT)


@pytest.fixture(scope="module")
def runs(first, tmp_path_factory):
    """Divprune gets 20 of 60 questions fewer in the second run, random one more."""
    right = {"none": 54, "divprune-16": 30, "random-16": 31}
    return compare_runs(first, finished(tmp_path_factory.mktemp("second") / "b", right, identity="weights-2"))


def found(runs):
    return {(one.label, one.task): one for one in runs.differences}


def test_differences_are_paired_and_corrected_for_the_rows(runs):
    lost = found(runs)["divprune-16", "count"]
    assert (lost.first, lost.second, lost.stability.lost, lost.stability.won) == (50 / 60, 0.5, 20 / 60, 0)
    assert lost.pair.difference == pytest.approx(-20 / 60) and lost.pair.low < -20 / 60 < lost.pair.high
    # McNemar's mid-p: all 20 differing questions fell, by 2 * 0.5**20 less half of that; three rows are compared
    assert lost.pair.p == pytest.approx(0.5**20) and lost.pair.p_adjusted == pytest.approx(3 * 0.5**20)
    won = found(runs)["random-16", "count"]
    assert (won.stability.lost, won.stability.won) == (0, 1 / 60) and not won.pair.significant
    same = found(runs)["none", "text"]
    assert (same.pair.difference, same.pair.p, same.stability.loyalty) == (0, 1, 1)


def test_the_average_is_relative_to_the_first_run(runs):
    average = found(runs)["divprune-16", None]
    assert average.second == pytest.approx(30 / 50) and average.pair.significant
    assert average.stability == found(runs)["divprune-16", "count"].stability  # both tasks lose the same


def test_the_conditions_are_told(runs):
    assert runs.conditions == ["checkpoint: weights-1 in A, weights-2 in B"]


def test_markdown(runs):
    lines = [line.split("|") for line in render(runs, "md").splitlines() if line.startswith("|")]
    cells = {(line[1].strip(), line[2].strip()): [cell.strip() for cell in line[3:-1]] for line in lines[2:]}
    assert cells["divprune-16", "count"][:2] == ["83.3", "50.0"]
    assert cells["divprune-16", "count"][2].startswith("-33.3 ±") and cells["divprune-16", "count"][2].endswith("†")
    assert cells["divprune-16", "count"][3:] == ["<0.001", "66.7", "33.3", "0.0"]
    assert cells["divprune-16", "average, % of A"][:2] == ["100.0", "60.0"]


def test_items(runs):
    lines = list(csv.DictReader(io.StringIO(render(runs, "csv"))))
    assert len(lines) == 3 * 2 * 60
    fell = [line for line in lines if line["score_a"] > line["score_b"]]
    assert {line["label"] for line in fell} == {"divprune-16"} and len(fell) == 2 * 20
    assert (fell[0]["prompt"], fell[0]["answer_a"], fell[0]["answer_b"]) == ("count 30?", "yes", "no")
    data = json.loads(render(runs, "json"))
    assert len(data["items"]) == len(lines) and data["runs"].keys() == {"A", "B"}
    assert [one["label"] for one in data["differences"]] == [one.label for one in runs.differences]


def test_a_run_equals_itself(first):
    assert all(
        one.pair.difference == 0 and one.stability.loyalty == 1 for one in compare_runs(first, first).differences
    )


@pytest.mark.parametrize(
    "changes, behaviour, message",
    [
        ({"tasks": ["other"]}, {}, "have no task in common: count, text there, other here"),
        ({"limit": 30}, {"questions": 30}, "of count, .*: all questions there, the first 30 questions here; use one"),
        ({}, {"questions": 50}, "asked different questions of count"),
        ({}, {"definition": "edited"}, "settings of count changed between"),
        ({"tasks": [{"task": "count", "metric": "f1"}]}, {}, "count is scored by acc in .* and by f1 in"),
    ],
)
def test_what_cannot_be_compared_is_refused(first, tmp_path, changes, behaviour, message):
    class TwoMetrics(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            cell.results["results"][task]["f1,none"] = 0.5
            return cell

    config = load_config(write_config(tmp_path, **{"budgets": [16]} | changes))
    run(config, harness=TwoMetrics(**{"questions": 60} | behaviour))
    with pytest.raises(ConfigError, match=message):
        compare_runs(first, config.output)


def test_unfinished_runs_are_compared_as_far_as_they_go(tmp_path):
    config = load_config(write_config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(config, harness=FakeHarness(fail_at=("random-64", "text"), failure=KeyboardInterrupt()))
    other = finished(tmp_path / "b", {}, {"tasks": ["text"]}, questions=4)
    compared = compare_runs(config.output, other)
    assert [one.label for one in compared.differences] == ["none"]
    assert "rows: random-64, divprune-64 only in A, so left out" in compared.conditions
    assert "tasks: count only in A, so left out" in compared.conditions
