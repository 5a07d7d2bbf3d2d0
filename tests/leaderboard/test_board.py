"""Reading a leaderboard: rows, costs, scores, averages, marks, and which directories are refused."""

import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from boards import Costly, costs, interrupted, row_of, scored_rows
from evaluation_doubles import SHAPE, FakeHarness, write_config

from vlmslim.cost.flops import prefill_flops
from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.board import Leaderboard, add_ratios
from vlmslim.leaderboard.costs import add_fronts
from vlmslim.leaderboard.render import FORMATS, render
from vlmslim.leaderboard.rows import Row, StageActivity
from vlmslim.leaderboard.scores import Estimate, Score, metric_of, score_of, stderr_of_mean
from vlmslim.leaderboard.significance import wilson

# ---------------------------------------------------------------------- rows


def test_rows_are_grouped_by_budget_the_unpatched_model_on_top(board):
    expected = ["none", "random-64", "divprune-64", "fastv-64", "random-16", "divprune-16", "fastv-16"]
    assert [row.label for row in board.rows] == expected
    assert [len(group) for group in board.budgets()] == [1, 3, 3]


def test_budgets_are_ordered_counts_fractions_costs(tmp_path):
    budgets = [{"equivalent_tokens": 16}, 0.25, 16, {"equivalent_tokens": 64}, 0.5, 64]
    config = load_config(write_config(tmp_path, budgets=budgets, baselines=False))
    rows = run(config, harness=Costly()).rows
    assert [row.budget_name for row in rows] == [
        *("all", "64", "16", "0.5", "0.25"),
        *("equivalent_tokens=64", "equivalent_tokens=16"),
    ]


def test_costs_are_budgets_too():
    budgets = [{"equivalent_tokens": 16}, None, 0.1, {"equivalent_tokens": 64}, 64, {"equivalent_tokens": 16}]
    rows = [Row("none", None), *(Row(f"m{i}", budget) for i, budget in enumerate(budgets))]
    groups = [[row.label for row in group] for group in Leaderboard(rows, [], {}, {}).budgets()]
    assert groups[:3] == [["none"], ["m0", "m5"], ["m1"]]


def test_scores_and_the_average_relative_to_the_unpatched_model(board):
    low, high = wilson(np.array(0.75), np.array(4.0))
    score = Score(0.75, round(float(low), 9), round(float(high), 9), stderr=0.05, questions=4)
    assert row_of(board, "divprune-64").scores["count"] == score
    assert row_of(board, "none").relative == Estimate(1)
    assert row_of(board, "divprune-64").relative.value == (0.75 / 1 + 0.5 / 0.5) / 2
    assert row_of(board, "fastv-16").relative.value == (0.5 / 1 + 0) / 2


def test_cost_is_computed_from_what_was_kept(board):
    row, none, random = (row_of(board, label) for label in ("divprune-16", "none", "random-16"))
    assert (row.cost.requested, row.cost.kept, row.cost.equivalent) == (16, 16, 16)
    assert (none.cost.requested, none.cost.kept) == (None, 144)
    assert row.cost.flops == prefill_flops(SHAPE, 36)
    assert row.flops_ratio == prefill_flops(SHAPE, 36) / prefill_flops(SHAPE, 164)
    assert (row.cost.method_flops, none.cost.method_flops) == (1e6, 0)
    assert row.work_ratio == (prefill_flops(SHAPE, 36) + 1e6) / prefill_flops(SHAPE, 164)
    assert row.cost.kv_bytes == 36 * 4 * 2 * 2 * 16 * 4
    assert random.times.ttft_ratio is not None
    assert (random.cost.selection_ms, random.cost.positions) == (0.5, "renumbered")


def test_receipts_are_averaged_over_images_and_prompts(tmp_path):
    class Uneven(FakeHarness):
        def evaluate(self, variant, task):
            cell, first = super().evaluate(variant, task), task == "count"
            counts = {"images": 1, "prompts": 1} if first else {"images": 6, "prompts": 3}
            changes = {"kept": 8.0 if first else 15.0, "equivalent_tokens": 8.0 if first else 30.0}
            changes |= {"visual_tokens_per_layer": [8.0] * 4 if first else [30.0, 30.0, 20.0, 20.0]}
            changes |= {"kept_range": [3, 20] if first else [5, 30]}
            return replace(cell, receipt=cell.receipt | counts | changes)

    cost = run(load_config(write_config(tmp_path, budgets=[16])), harness=Uneven()).rows[1].cost
    assert cost.kept == (8 + 6 * 15) / 7
    assert (cost.kept_low, cost.kept_high) == (3, 30)
    assert cost.last == pytest.approx((8 + 3 * 20) / 7)
    assert cost.equivalent == (8 + 3 * 30) / 4
    expected = (prefill_flops(SHAPE, 28) + 3 * prefill_flops(SHAPE, [50, 50, 40, 40])) / 4
    assert cost.flops == pytest.approx(expected)


def test_every_row_says_where_it_comes_from(board):
    for row in board.rows:
        assert row.provenance.keys() == {"config_hash", "seed", "versions", "git_commit", "hardware"}
        assert len(row.provenance["config_hash"]) == 64 and row.provenance["seed"] == "0"
        assert "torch=" in row.provenance["versions"] and "vlmslim=" in row.provenance["versions"]
    assert board.rows[2].stages == [{"method": "divprune", "keep": 64}]


def test_a_directory_from_before_ranges_costs_and_stages_were_recorded(board):
    """Its receipts hold neither ranges nor stages, and its cells neither budgets nor weights."""
    for row in board.rows:
        assert (row.cost.kept_low, row.solved) == (None, None)
    assert StageActivity.read([{"images": 4}]) == []
    assert not {"spent", "prompts.", "‡"} & set(render(board, "md").split())


# ---------------------------------------------------------------------- averages, marks, fronts


def averages(rows, groups=None, **higher_is_better):
    metrics = {task: ("m", higher_is_better.get(task, True)) for task in rows[0].scores}
    add_ratios(rows, list(metrics), metrics, groups or dict.fromkeys(metrics, "general"))
    return [None if row.relative is None else row.relative.value for row in rows]


def test_a_task_the_unpatched_model_fails_is_left_out_of_the_average():
    assert averages(scored_rows(none={"t": 0.5, "u": 0.0}, a={"t": 0.4, "u": 0.1})) == [1, 0.8]
    assert averages(scored_rows(none={"u": 0.0}, a={"u": 0.1})) == [None, None]


def test_ratios_where_lower_is_better():
    def rows(*errors):
        return scored_rows(**{name: {"t": e, "u": 0.5} for name, e in zip(("none", "a", "b"), errors, strict=True)})

    assert averages(rows(2.0, 0.0, 3.0), t=False) == [1, 1.5, 0.75]
    without_errors = rows(0.0, 0.0, 3.0)
    averages(without_errors, {"t": "OCR", "u": "general"}, t=False)
    assert [row.groups for row in without_errors] == [{"general": Estimate(1)}] * 3


def test_groups_of_tasks_are_averaged_apart(decided):
    fastv = row_of(decided, "fastv-16")
    assert fastv.groups["general"] == fastv.relative and fastv.relative.value == pytest.approx(18 / 54)
    assert decided.groups == {"count": "general", "text": "general"}
    rows = scored_rows(none={"gqa": 0.5, "scenes_text": 0.8}, a={"gqa": 0.5, "scenes_text": 0.4})
    averages(rows, {"scenes_text": "OCR", "gqa": "general"})
    assert list(rows[1].groups.items()) == [("OCR", Estimate(0.5)), ("general", Estimate(1))]


def test_medals(board):
    """On four questions, no difference is significant."""
    assert board.medals("count") == {
        **{"divprune-64": 1, "random-64": 2, "fastv-64": 2},
        **{"fastv-16": 1, "random-16": 2, "divprune-16": 2},
    }
    text = board.medals("text")
    assert (text["random-64"], text["divprune-64"], text["fastv-64"]) == (1, 1, 2)
    assert "none" not in board.medals(None)


def test_where_all_are_equal_no_row_is_marked():
    assert Leaderboard(scored_rows(a={"t": 0.5}, b={"t": 0.5}), ["t"], {"t": ("acc", True)}, {}).medals("t") == {}


def test_lower_may_be_better():
    board = Leaderboard(scored_rows(a={"loss": 2.0}, b={"loss": 1.0}), ["loss"], {"loss": ("nll", False)}, {})
    assert board.medals("loss") == {"b": 1}
    assert board.scale("loss") == 1


def test_significant_differences_decide_medals_and_ranks(decided):
    rows = {row.label: row for row in decided.rows}
    assert decided.medals(None) == decided.medals("text") == {"divprune-16": 1}
    assert (rows["divprune-16"].rank, rows["fastv-16"].rank, rows["none"].rank) == (1, 2, None)
    assert rows["random-16"].rank >= 2
    assert decided.comparison.pair("fastv-16", "none", "text").difference == pytest.approx((18 - 54) / 60)
    assert decided.comparison.pair("divprune-16", "none", None).p_adjusted == 1


def test_loyalty_and_flips(decided):
    same, fastv = (row_of(decided, label).stability for label in ("divprune-16", "fastv-16"))
    assert (same.loyalty, same.lost, same.won) == (1, 0, 0)
    assert (fastv.loyalty, fastv.lost, fastv.won) == (pytest.approx(1 - 36 / 60), pytest.approx(36 / 60), 0)
    assert row_of(decided, "none").stability is None


def test_the_pareto_front_spans_budgets():
    values = {"none": (1.0, 144), "a-64": (0.9, 64), "b-64": (0.8, 64), "a-16": (0.95, 16)}
    rows = [
        Row(label, None, relative=Estimate(average), cost=costs(requested=tokens, equivalent=tokens), work_ratio=tokens)
        for label, (average, tokens) in values.items()
    ]
    add_fronts(rows)
    assert {row.label: row.pareto for row in rows if row.pareto} == dict.fromkeys(
        ("none", "a-16"), ["nominal tokens", "equivalent tokens", "FLOPs"]
    )


def test_the_work_of_a_method_counts_on_the_front():
    """The costlier selection takes a row off the front although its language model has no more to do."""
    own = {"none": 0.0, "plain": 1e8, "clever": 4e8}
    rows = scored_rows(none={"t": 1.0}, plain={"t": 0.8}, clever={"t": 0.8})
    for row in rows:
        row.cost = costs(flops=1e9 if row.label == "none" else 5e8, method_flops=own[row.label])
    averages(rows)
    add_fronts(rows)
    assert [row.flops_ratio for row in rows] == [1, 0.5, 0.5]
    assert [row.work_ratio for row in rows] == [1, 0.6, 0.9]
    assert ["FLOPs" in row.pareto for row in rows] == [True, True, False]


def test_old_cells_do_not_know_the_work_of_their_method(finished):
    cell, samples = finished.cell("divprune-16", "text"), finished.samples("divprune-16", "text")
    del cell["method_flops"]
    finished.save_cell("divprune-16", "text", cell, samples)
    row = row_of(Leaderboard.read(finished.directory), "divprune-16")
    assert row.cost.method_flops is None and row.work_ratio == row.flops_ratio


def test_medals_of_the_average_agree_with_its_tests(captions):
    """CIDEr is in the average and cannot be tested; by what is tested, the other row is better."""
    random, divprune = row_of(captions, "random-16"), row_of(captions, "divprune-16")
    assert random.relative.value > divprune.relative.value
    assert random.relative.low is None and random.groups["general"].low is None  # of another number than the test
    assert (divprune.rank, random.rank) == (1, 2)
    assert captions.medals(None) == {"divprune-16": 1}
    assert captions.not_question_means == ["text"]
    assert divprune.stability.loyalty < 1 and divprune.stability.lost is None


# ---------------------------------------------------------------------- scores


def test_the_metric_is_the_first_or_the_one_asked_for():
    results = {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.4, "submission,none": None, "alias": "t"}
    directions = {"submission": True, "f1": True, "acc": True, "loss": False}
    cell = {"lmms_eval": {"results": {"t": results}, "higher_is_better": {"t": directions}}}
    assert metric_of(cell, "t", None) == ("f1", True)  # the task's own order, without what is not a number
    assert metric_of(cell, "t", "acc") == ("acc", True)
    directions["f1"] = False
    assert metric_of(cell, "t", None) == ("f1", False)
    with pytest.raises(ConfigError, match="t reports no metric 'bleu'; use one of acc, f1"):
        metric_of(cell, "t", "bleu")
    cell["lmms_eval"]["results"]["t"] = {"submission,none": None}
    with pytest.raises(ConfigError, match="t reports no number"):
        metric_of(cell, "t", None)


def test_a_missing_standard_error_comes_from_the_samples_if_the_score_is_their_mean():
    samples = [{"acc": {"score": s}} for s in (1, 1, 0, 1)]
    expected = statistics.stdev([1, 1, 0, 1]) / 2
    assert math.isclose(stderr_of_mean(samples, "acc", 0.75), expected)
    assert stderr_of_mean([{"acc": s} for s in (True, True, False, True)], "acc", 0.75) == expected
    assert stderr_of_mean(samples, "acc", 75.0) is None  # points, or F1, or CIDEr
    assert stderr_of_mean(samples, "other", 0.75) is None
    assert stderr_of_mean([*samples, {}], "acc", 0.75) is None
    assert stderr_of_mean(samples[:1], "acc", 1.0) is None
    cell = {"label": "none", "lmms_eval": {"results": {"t": {"acc,none": 0.75, "acc_stderr,none": "N/A"}}}}
    score = score_of(cell, "t", "acc", samples)
    assert (score.value, score.stderr, score.questions) == (0.75, expected, 4)
    assert (score.low, score.high) == pytest.approx((0.75 - 1.959964 * expected, 0.75 + 1.959964 * expected))
    cell["lmms_eval"]["results"]["t"] = {"acc,none": float("nan")}
    with pytest.raises(ConfigError, match="none on t: lmms-eval reports acc = nan"):
        score_of(cell, "t", "acc", samples)


# ---------------------------------------------------------------------- unfinished, damaged and mixed runs


def test_an_unfinished_run_has_a_leaderboard_at_every_moment(tmp_path):
    """A budget of which no row has every task yet is not ranked."""
    config = load_config(write_config(tmp_path))
    cells = [(row.label, task.task) for task in config.tasks for row in config.variants()]
    for place in cells[1:]:
        board = interrupted(config, place)
        assert board.facts["cells"] == f"{cells.index(place)} of {len(cells)}"
        assert all(render(board, format) for format in FORMATS)


def test_an_unfinished_run_shows_what_is_there(tmp_path):
    board = interrupted(load_config(write_config(tmp_path)), ("divprune-64", "text"))
    finished, half = (row_of(board, label) for label in ("random-64", "divprune-64"))
    assert half.scores.keys() == {"count"} and half.relative is None
    assert half.cost.flops and half.flops_ratio is None  # the prompts differ from the unpatched model's
    assert finished.relative is not None and finished.flops_ratio is not None and finished.times is None
    config = load_config(write_config(tmp_path, output=str(tmp_path / "earlier")))
    board = interrupted(config, ("divprune-16", "count"))
    assert row_of(board, "divprune-16").cost is None


def test_directories_without_a_run_are_refused(tmp_path):
    for place, message in ((tmp_path, "no readable run.json"), (tmp_path / "no", "no does not exist")):
        with pytest.raises(ConfigError, match=message):
            Leaderboard.read(place)
    config = load_config(write_config(tmp_path))
    with pytest.raises(ConfigError, match="config.yaml is a file"):
        Leaderboard.read(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="no finished cell"):
        interrupted(config, ("none", "count"))


@pytest.mark.parametrize("damage", ["[1,2]", "7", "null", '{"seal": 1}', "[" * 100_000, "\x00"])
def test_a_damaged_cell_is_named(finished, damage):
    (finished.directory / "cells" / "divprune-16" / "text.json").write_text(damage)
    board = Leaderboard.read(finished.directory)
    assert "cells 9 of 10 (damaged, will be evaluated again: divprune-16 / text)." in render(board, "md")


def test_a_truncated_cell_is_no_result(finished):
    path = finished.directory / "cells" / "divprune-16" / "text.jsonl"
    path.write_text(path.read_text()[:-20])
    row = row_of(Leaderboard.read(finished.directory), "divprune-16")
    assert row.scores.keys() == {"count"} and row.rank is None


@pytest.mark.parametrize(
    "label, change, message",
    [
        ("divprune-16", {"config_hash": "another"}, "divprune-16 on text was made under another configuration"),
        ("divprune-16", {"stages": [{"method": "divprune", "keep": 17}]}, "divprune-16 on text was made under another"),
        ("divprune-16", {"questions": "others"}, "none and divprune-16 answered different questions of text"),
        ("divprune-16", {"weights": {"w": "1"}}, "the cells of divprune-16 were made with different weights"),
        ("divprune-16", {"code": {"divprune.py": "1"}}, "the cells of divprune-16 were made with different code"),
        ("none", {"definition": {}}, "the settings, functions or data of text changed between none and random-64"),
    ],
)
def test_cells_that_cannot_be_compared_are_refused(finished, label, change, message):
    cell, samples = finished.cell(label, "text"), finished.samples(label, "text")
    finished.save_cell(label, "text", cell | change, samples)
    with pytest.raises(ConfigError, match=message):
        Leaderboard.read(finished.directory)


def test_times_of_another_configuration_are_not_shown(finished):
    timing = finished.timing
    timing["settings"]["config_hash"] = "another"
    finished.save_timing(timing)
    board = Leaderboard.read(finished.directory)
    assert all(row.times is None for row in board.rows) and board.facts["timing"] is None


def test_times_of_another_method_under_the_same_label_are_not_shown(finished):
    timing = finished.timing
    timing["settings"]["rows"][-1][1] = [{"method": "divprune", "keep": 17}]
    finished.save_timing(timing)
    board = Leaderboard.read(finished.directory)
    assert [row.label for row in board.rows if row.times is None] == [timing["settings"]["rows"][-1][0]]
