"""The leaderboard: numbers, marks, formats, and the same bytes from the same data."""

import csv
import io
import json
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest
from evaluation_doubles import SHAPE, FakeHarness, write_config

from vlmslim.cost.budget import Solution
from vlmslim.cost.flops import prefill_flops
from vlmslim.evaluation.config import ConfigError, load_config
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.leaderboard.board import Leaderboard, _add_fronts, _add_ratios
from vlmslim.leaderboard.render import FORMATS, render
from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.scores import Score, metric_of, score_of, source_of, stderr_of_mean
from vlmslim.leaderboard.significance import wilson
from vlmslim.leaderboard.tables import cost_columns, score_columns, tables, with_interval

SCORES = {
    ("none", "count"): 4,
    ("none", "text"): 2,
    ("random-64", "count"): 2,
    ("random-64", "text"): 2,
    ("divprune-64", "count"): 3,
    ("divprune-64", "text"): 2,
    ("fastv-64", "count"): 2,
    ("fastv-64", "text"): 1,
    ("random-16", "count"): 1,
    ("random-16", "text"): 1,
    ("divprune-16", "count"): 1,
    ("divprune-16", "text"): 2,
    ("fastv-16", "count"): 2,
    ("fastv-16", "text"): 0,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = load_config(write_config(folder, methods=["divprune", "fastv"], budgets=[16, 64]))
    run(config, harness=FakeHarness(scores=SCORES))
    return config.output


@pytest.fixture(scope="module")
def board(directory):
    return Leaderboard.read(directory)


def test_rows_are_grouped_by_budget_the_unpatched_model_on_top(board):
    expected = ["none", "random-64", "divprune-64", "fastv-64", "random-16", "divprune-16", "fastv-16"]
    assert [row.label for row in board.rows] == expected
    assert [len(group) for group in board.budgets()] == [1, 3, 3]


def test_costs_are_budgets_too():
    budgets = [{"equivalent_tokens": 16}, None, 0.1, {"equivalent_tokens": 64}, 64, {"equivalent_tokens": 16}]
    rows = [Row("none", None), *(Row(f"m{i}", budget) for i, budget in enumerate(budgets))]
    board = Leaderboard(rows, [], {}, {})
    assert [[row.label for row in group] for group in board.budgets()][1:2] == [["m0", "m5"]]
    assert rows[1].budget_name == "equivalent_tokens=16"


def test_scores_and_the_average_relative_to_the_unpatched_model(board):
    rows = {row.label: row for row in board.rows}
    low, high = wilson(np.array(0.75), np.array(4.0))
    assert rows["divprune-64"].scores["count"] == Score(0.75, 0.05, 4, round(float(low), 9), round(float(high), 9))
    assert rows["none"].relative == 1
    assert rows["divprune-64"].relative == (0.75 / 1 + 0.5 / 0.5) / 2
    assert rows["fastv-16"].relative == (0.5 / 1 + 0) / 2


def test_cost_is_computed_from_what_was_kept(board):
    rows = {row.label: row for row in board.rows}
    assert (rows["divprune-16"].requested, rows["divprune-16"].kept, rows["divprune-16"].equivalent) == (16, 16, 16)
    assert (rows["none"].requested, rows["none"].kept) == (None, 144)
    assert rows["divprune-16"].flops == prefill_flops(SHAPE, 36)
    assert rows["divprune-16"].flops_ratio == prefill_flops(SHAPE, 36) / prefill_flops(SHAPE, 164)
    assert rows["divprune-16"].kv_bytes == 36 * 4 * 2 * 2 * 16 * 4
    assert rows["random-16"].ttft_ratio is not None
    assert rows["random-16"].selection_ms == 0.5
    assert rows["random-16"].positions == "renumbered"
    assert "sdpa in float32" in render(board, "md")


def test_marks(board):
    assert board.places("count") == {
        "divprune-64": 1,
        "random-64": 2,  # on four questions, nothing is significant
        "fastv-64": 2,
        "fastv-16": 1,
        "random-16": 2,
        "divprune-16": 2,
    }
    text = board.places("text")
    assert (text["random-64"], text["divprune-64"], text["fastv-64"]) == (1, 1, 2)
    assert "none" not in board.places(None)


@pytest.fixture(scope="module")
def decided(tmp_path_factory):
    """60 questions: divprune answers them as the unpatched model does, fastv gets a third, random a sixth."""
    folder = tmp_path_factory.mktemp("decided")
    right = {"none": 54, "divprune-16": 54, "fastv-16": 18, "random-16": 9, "uniform-16": 9}
    scores = {(label, task): count for label, count in right.items() for task in ("count", "text")}
    config = load_config(write_config(folder, methods=["divprune", "fastv"], budgets=[16]))
    run(config, harness=FakeHarness(scores=scores, questions=60))
    return Leaderboard.read(config.output)


def test_significant_differences_decide_marks_and_ranks(decided):
    rows = {row.label: row for row in decided.rows}
    assert decided.places(None) == {"divprune-16": 1}
    assert decided.places("text") == {"divprune-16": 1}
    assert (rows["divprune-16"].rank, rows["fastv-16"].rank, rows["none"].rank) == (1, 2, None)
    assert rows["random-16"].rank >= 2
    assert decided.comparison.pair("fastv-16", "none", "text").difference == pytest.approx((18 - 54) / 60)
    assert decided.comparison.pair("divprune-16", "none", None).p_adjusted == 1


def test_flips_and_loyalty(decided):
    rows = {row.label: row for row in decided.rows}
    assert (rows["divprune-16"].loyalty, rows["divprune-16"].lost, rows["divprune-16"].won) == (1, 0, 0)
    assert (rows["fastv-16"].lost, rows["fastv-16"].won) == (pytest.approx(36 / 60), 0)
    assert rows["fastv-16"].loyalty == pytest.approx(1 - 36 / 60)
    assert rows["none"].loyalty is None


def test_the_pareto_front_spans_budgets():
    values = {"none": (1.0, 144), "a-64": (0.9, 64), "b-64": (0.8, 64), "a-16": (0.95, 16)}
    rows = [Row(label, None, relative=r, equivalent=e, flops_ratio=e / 144) for label, (r, e) in values.items()]
    _add_fronts(rows)
    assert {row.label for row in rows if row.pareto} == {"none", "a-16"}
    assert rows[0].pareto == ["FLOPs", "equivalent tokens"]


def test_groups_of_tasks_are_averaged_apart(decided):
    rows = {row.label: row for row in decided.rows}
    assert rows["fastv-16"].groups == {"general": pytest.approx(18 / 54)}
    assert decided.groups == {"count": "general", "text": "general"}
    rows = [Row("none", None), Row("a", 16)]
    for row, scores in zip(rows, [(0.8, 0.5), (0.4, 0.5)], strict=True):
        row.scores = {"scenes_text": Score(scores[0], None, 9), "gqa": Score(scores[1], None, 9)}
    metrics = {"scenes_text": ("acc", True), "gqa": ("acc", True)}
    _add_ratios(rows, list(metrics), metrics, {"scenes_text": "OCR", "gqa": "general"})
    assert rows[1].groups == {"OCR": 0.5, "general": 1}
    assert list(rows[1].groups) == ["OCR", "general"]


def test_every_row_says_where_it_comes_from(board):
    for row in board.rows:
        assert row.provenance.keys() == {"config_hash", "seed", "versions", "git_commit", "hardware"}
        assert len(row.provenance["config_hash"]) == 64 and row.provenance["seed"] == "0"
        assert "torch=" in row.provenance["versions"] and "vlmslim=" in row.provenance["versions"]
    assert board.rows[2].stages == [{"method": "divprune", "keep": 64}]


def test_where_all_are_alike_nobody_is_marked():
    rows = [Row(label, 1, {"t": Score(0.5, None, 4)}) for label in "ab"]
    assert Leaderboard(rows, ["t"], {"t": ("acc", True)}, {}).places("t") == {}


def test_a_task_the_unpatched_model_fails_is_left_out_of_the_average():
    rows = [Row("none", None, {"t": Score(0.5, None, 4), "u": Score(0.0, None, 4)})]
    rows.append(Row("a", 1, {"t": Score(0.4, None, 4), "u": Score(0.1, None, 4)}))
    _add_ratios(rows, ["t", "u"], {"t": ("acc", True), "u": ("acc", True)}, {"t": "OCR", "u": "OCR"})
    assert [row.relative for row in rows] == [1, 0.8]


def test_tokens_dropped_on_the_way_are_shown():
    rows = [Row("fastv", 16, kept=144.0, last=16.0), Row("divprune", 16, kept=16.0, last=16.0)]
    assert cost_texts(rows)["tokens kept"] == ["144.0 → 16.0", "16.0"]


def cost_texts(rows: list[Row]) -> dict[str, list[str]]:
    return {column.name: column.texts for column in cost_columns(Leaderboard(rows, [], {}, {}))}


def test_the_range_of_kept_tokens_is_shown_where_images_differ():
    rows = [
        Row("tokencorr", None, kept=47.5, last=47.5, kept_low=12, kept_high=98),
        Row("anyres", 0.5, kept=288.0, last=20.0, kept_low=144, kept_high=12240),
        Row("divprune", 16, kept=16.0, last=16.0, kept_low=16, kept_high=16),
        Row("old", 16, kept=16.0, last=16.0),
    ]
    assert cost_texts(rows)["tokens kept"] == ["47.5 (12–98)", "288.0 (144–12240) → 20.0", "16.0", "16.0"]


def test_what_a_cost_came_to_stands_beside_it():
    solved = {"option": "keep", "value": 11, "target": {"equivalent_tokens": 64}, "achieved": 63.9, "prompts": 16}
    share = solved | {"value": 0.11213, "target": {"flops_ratio": 0.15}}
    rows = [
        Row("none", None),
        Row("fastv", {"equivalent_tokens": 64}, solved=solved, spent=63.97, spent_low=63.97, spent_high=63.97),
        Row("aim", {"flops_ratio": 0.15}, solved=share, spent=0.1532, spent_low=0.1488, spent_high=0.1571),
    ]
    texts = cost_texts(rows)
    assert texts["solved"] == ["–", "keep=11", "keep=0.11213"]
    assert texts["spent"] == ["–", "64.0", "0.153 (0.149–0.157)"]
    assert list(texts).index("spent") == list(texts).index("budget") + 2
    assert "solved" not in cost_texts(rows[:1])


class Costly(FakeHarness):
    """Solves every cost by keep=40; on the second task that costs more than on the sample."""

    def solve(self, variant):
        return Solution(({**variant.stages[0], "keep": 40},), "keep", 40, variant.budget, 40.0, 4)

    def evaluate(self, variant, task):
        kept = {"count": 40.0, "text": 44.0}[task]
        return super().evaluate(replace(variant, budget=kept) if isinstance(variant.budget, dict) else variant, task)


def test_costs_from_the_run_to_every_format(tmp_path):
    config = load_config(write_config(tmp_path, budgets=[16, {"equivalent_tokens": 40}]))
    board = run(config, harness=Costly())
    row = next(row for row in board.rows if row.label.startswith("divprune-equivalent"))
    assert row.solved["option"] == "keep" and row.solved["achieved"] == 40
    assert (row.spent, row.spent_low, row.spent_high) == (42, 40, 44)
    markdown = render(board, "md")
    assert "| keep=40 | 42.0 (40.0–44.0) |" in " ".join(markdown.split())
    assert "solved on 4 sample prompts" in markdown
    assert "<td>keep=40</td><td>42.0 (40.0–44.0)</td>" in render(board, "html")
    lines = {line["label"]: line for line in csv.DictReader(io.StringIO(render(board, "csv")))}
    assert (lines[row.label]["solved"], lines[row.label]["spent"]) == ("keep=40", "42.0")
    assert (lines["divprune-16"]["solved"], lines["divprune-16"]["spent"]) == ("", "")
    (read,) = (r for r in json.loads(render(board, "json"))["rows"] if r["label"] == row.label)
    assert read["solved"]["target"] == {"equivalent_tokens": 40} and read["spent_high"] == 44


def test_ranges_come_from_the_receipts_of_all_tasks(tmp_path):
    class Ranged(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            return replace(cell, receipt=cell.receipt | {"kept_range": {"count": [3, 20], "text": [5, 30]}[task]})

    config = load_config(write_config(tmp_path))
    row = run(config, harness=Ranged()).rows[1]
    assert (row.kept_low, row.kept_high) == (3, 30)


def test_a_directory_from_before_ranges_and_costs_were_kept(directory):
    """Its receipts hold no ranges, and its cells neither budgets nor weights."""
    for row in Leaderboard.read(directory).rows:
        assert (row.kept_low, row.solved, row.spent) == (None, None, None)
    assert "spent" not in render(Leaderboard.read(directory), "md")


def test_lower_may_be_better():
    rows = [Row("a", 1, {"loss": Score(2.0, None, 4)}), Row("b", 1, {"loss": Score(1.0, None, 4)})]
    board = Leaderboard(rows, ["loss"], {"loss": ("nll", False)}, {})
    assert board.places("loss") == {"b": 1}
    assert board.scale("loss") == 1


def test_the_same_data_gives_the_same_bytes(directory):
    for format in FORMATS:
        first, second = (render(Leaderboard.read(directory), format) for _ in range(2))
        assert first == second == (directory / f"leaderboard.{format}").read_text()
        assert first.endswith("\n") and not first.endswith("\n\n")


def test_markdown(board):
    text = render(board, "md")
    parts = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("## ")[1:]]
    assert [part.splitlines()[0] for part in text.split("## ")[1:]] == [table.title for table in tables(board)]
    for lines, table in zip(parts, tables(board), strict=True):
        assert len(lines) == 2 + len(table.rows)
        assert len({line.count("|") for line in lines}) == 1
    assert "| **75.0 [30.1, 95.4]** |" in text  # Wilson's, of three right of four
    assert "*50.0 ± " in text
    assert "multiply-add = 2" in text and "seed 0" in text and "all questions" in text
    assert "McNemar" in text and "Holm" in text


def test_a_missing_baseline_is_said(board):
    assert "Not in this run: the baseline uniform, which a method has to beat." in render(board, "md")
    board = Leaderboard([Row("a", 1, stages=[{"method": m}]) for m in ("random", "uniform")], [], {}, board.facts)
    assert "Not in this run" not in render(board, "md")


def test_the_tables(decided):
    built = {table.title: {c.name: c.texts for c in table.columns} for table in tables(decided)}
    against = built["Against the unpatched model"]
    assert "none" not in against["method"]
    at = against["method"].index("fastv-16")
    assert against["count"][at] == "-60.0 ± 12.5†" and against["p"][at] == "<0.001"
    assert against["loyalty %"][against["method"].index("divprune-16")] == "100.0"
    between = built["Between methods at 16"]
    assert between["divprune-16"][between["row minus column"].index("divprune-16")] == "–"
    assert between["divprune-16"][between["row minus column"].index("fastv-16")].startswith("-66.7")
    assert between["fastv-16"][between["row minus column"].index("divprune-16")].startswith("+66.7")
    assert "Task groups, % of unpatched" not in built  # there is only one


def test_numbers_with_intervals():
    assert with_interval(None, None, None) == "–"
    assert with_interval(0.5, None, None) == "50.0"
    assert with_interval(0.5, 0.4, 0.6) == "50.0 ± 10.0"
    assert with_interval(0.5, 0.4, 0.7, sign="+") == "+50.0 [+40.0, +70.0]"
    assert with_interval(1234.5, 1200.0, 1270.0, 1) == "1234.5 ± 35.0"


def test_differences_are_in_the_unit_of_the_questions_scores(tmp_path):
    """A task that reports per cent of questions that score 1: three points less are three points, not 0.03."""

    class InPercent(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            cell.results["results"][task]["acc,none"] *= 100
            return cell

    scores = {("none", "count"): 15, ("random-16", "count"): 6}
    board = run(load_config(write_config(tmp_path, budgets=[16])), harness=InPercent(scores=scores, questions=20))
    built = {table.title: {c.name: c.texts for c in table.columns} for table in tables(board)}
    against = built["Against the unpatched model"]
    assert against["count"][against["method"].index("random-16")].startswith("-45.0")


def test_csv(board):
    rows = list(csv.DictReader(io.StringIO(render(board, "csv"))))
    assert [row["label"] for row in rows] == [row.label for row in board.rows]
    assert float(rows[2]["count:value"]) == 0.75
    assert float(rows[2]["count:stderr"]) == 0.05
    assert float(rows[2]["count:low"]) < 0.75 < float(rows[2]["count:high"])
    assert rows[0]["requested"] == "" and rows[0]["count:p"] == ""
    assert json.loads(rows[2]["stages"]) == [{"method": "divprune", "keep": 64}]
    assert all(row["config_hash"] and row["versions"] and row["hardware"] for row in rows)


def test_json(board):
    data = json.loads(render(board, "json"))
    assert data["tasks"]["count"] == {"metric": "acc", "higher_is_better": True, "group": "general"}
    score = data["rows"][2]["scores"]["count"]
    assert (score["value"], score["stderr"], score["questions"]) == (0.75, 0.05, 4)
    assert data["facts"]["versions"].keys() >= {"torch", "transformers", "lmms_eval", "vlmslim"}
    families = {(pair["task"], pair["first"].split("-")[1]) for pair in data["pairs"]}
    assert families == {(task, budget) for task in ("count", "text", None) for budget in ("64", "16")}
    assert all(0 < pair["p"] <= pair["p_adjusted"] <= 1 for pair in data["pairs"])
    assert len(data["stability"]) == 2 * (len(board.rows) - 1)


def test_html(board):
    text = render(board, "html")
    assert text.count("<tr>") == sum(1 + len(table.rows) for table in tables(board))
    assert '<td class="place1">75.0 [30.1, 95.4]</td>' in text
    assert text.count("<circle") == len(board.rows)
    assert "**" not in text and "http" not in text


def test_html_escapes(board):
    hostile = Leaderboard([Row("<script>", None)], [], {}, board.facts)
    assert "<td><script>" not in render(hostile, "html")


def test_an_unknown_format_is_refused(board):
    with pytest.raises(ValueError, match="unknown format 'xlsx'; choose from md, csv, json, html"):
        render(board, "xlsx")


def test_an_unfinished_run_shows_what_is_there(tmp_path):
    config = load_config(write_config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(config, harness=FakeHarness(fail_at=("divprune-64", "text"), failure=KeyboardInterrupt()))
    board = Leaderboard.read(config.output)
    rows = {row.label: row for row in board.rows}
    assert rows["divprune-64"].scores.keys() == {"count"}
    assert rows["divprune-64"].relative is None
    assert rows["random-64"].relative is not None
    assert rows["divprune-16"].kept is None
    assert rows["random-64"].ttft_ms is None
    assert board.facts["cells"] == "7 of 10"
    for format in FORMATS:
        assert render(board, format)


def test_directories_without_a_run_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no readable run.json"):
        Leaderboard.read(tmp_path)
    config = load_config(write_config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(config, harness=FakeHarness(fail_at=("none", "count"), failure=KeyboardInterrupt()))
    with pytest.raises(ConfigError, match="no finished cell"):
        Leaderboard.read(config.output)


def test_answers_to_different_questions_are_not_compared(tmp_path):
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    store = Store(config.output)
    cell = store.cell("divprune-16", "text")
    store.save_cell("divprune-16", "text", cell | {"questions": "others"}, store.samples("divprune-16", "text"))
    with pytest.raises(ConfigError, match="answered different questions of text"):
        Leaderboard.read(config.output)


def test_cells_of_another_configuration_are_refused(tmp_path):
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    store = Store(config.output)
    cell, samples = store.cell("divprune-16", "text"), store.samples("divprune-16", "text")
    for change in ({"config_hash": "another"}, {"stages": [{"method": "divprune", "keep": 17}]}):
        store.save_cell("divprune-16", "text", cell | change, samples)
        with pytest.raises(ConfigError, match="divprune-16 on text was made under another configuration"):
            Leaderboard.read(config.output)


def test_a_truncated_cell_is_no_result(tmp_path):
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    path = config.output / "cells" / "divprune-16" / "text.jsonl"
    path.write_text(path.read_text()[:-20])
    rows = {row.label: row for row in Leaderboard.read(config.output).rows}
    assert rows["divprune-16"].scores.keys() == {"count"} and rows["divprune-16"].rank is None


def test_the_metric_is_the_first_or_the_one_asked_for():
    results = {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.4, "submission,none": None, "alias": "t"}
    directions = {"submission": True, "f1": True, "acc": True, "loss": False}
    cell = {"lmms_eval": {"results": {"t": results}, "higher_is_better": {"t": directions}}}
    assert metric_of(cell, "t", None) == ("f1", True)  # the task's own order; what gave no number is passed over
    assert metric_of(cell, "t", "acc") == ("acc", True)
    with pytest.raises(ConfigError, match="t reports no metric 'bleu'; it has acc, f1"):
        metric_of(cell, "t", "bleu")


def test_a_missing_standard_error_comes_from_the_samples_if_the_score_is_their_mean():
    samples = [{"acc": {"score": s}} for s in (1, 1, 0, 1)]
    expected = statistics.stdev([1, 1, 0, 1]) / 2
    assert math.isclose(stderr_of_mean(samples, "acc", 0.75), expected)
    assert stderr_of_mean([{"acc": s} for s in (True, True, False, True)], "acc", 0.75) == expected
    assert stderr_of_mean(samples, "acc", 75.0) is None  # points, or F1, or CIDEr
    assert stderr_of_mean(samples, "other", 0.75) is None
    assert stderr_of_mean(samples[:1], "acc", 1.0) is None
    cell = {"label": "none", "lmms_eval": {"results": {"t": {"acc,none": 0.75, "acc_stderr,none": "N/A"}}}}
    score = score_of(cell, "t", "acc", samples)
    assert replace(score, low=None, high=None) == Score(0.75, expected, 4)
    assert (score.low, score.high) == pytest.approx((0.75 - 1.959964 * expected, 0.75 + 1.959964 * expected))
    cell["lmms_eval"]["results"]["t"] = {"acc,none": float("nan")}
    with pytest.raises(ConfigError, match="none on t: lmms-eval gave acc = nan"):
        score_of(cell, "t", "acc", samples)


def test_tasks_of_one_data_set_share_its_pictures():
    def source(**config):
        return source_of({"lmms_eval": {"configs": {"t": config}}}, "t")

    first = source(dataset_path="parquet", dataset_kwargs={"data_files": {"test": "/a/scenes/text.parquet"}})
    assert first == source(dataset_path="parquet", dataset_kwargs={"data_files": ["/a/scenes/count.parquet"]})
    assert first != source(dataset_path="parquet", dataset_kwargs={"data_files": {"test": "/a/pages/text.parquet"}})
    assert source(dataset_path="lmms-lab/POPE") == "lmms-lab/POPE"
    assert source() == "t"


def test_units_follow_the_size(board):
    names = [column.name for column in cost_columns(board)]
    assert "prefill GFLOPs" in names and "KV cache KiB" in names
    big = Row("none", None, flops=8.26e12, flops_ratio=1.0, kv_bytes=311 * 2**20)
    columns = {c.name: c.texts for c in cost_columns(Leaderboard([big], [], {}, {}))}
    assert columns["prefill TFLOPs"] == ["8.26 (1.00x)"]
    assert columns["KV cache MiB"] == ["311.0"]


def test_points_are_not_percentages():
    row = Row("none", None, {"mme": Score(1510.7, None, 9), "cider": Score(1.1, None, 9)})
    metrics = {"mme": ("p", True), "cider": ("c", True)}
    texts = {c.name: c.texts for c in score_columns(Leaderboard([row], ["mme", "cider"], metrics, {}))}
    assert texts["mme"] == ["1510.7"]
    assert texts["cider"] == ["1.100"]


def test_samples_with_line_separators_survive(tmp_path):
    store = Store(tmp_path)
    store.save_cell("none", "t", {}, [{"text": "a\u2028b\nc"}, {"text": "d"}])
    assert [s["text"] for s in store.samples("none", "t")] == ["a\u2028b\nc", "d"]
    assert store.cell("none", "t") is not None


def test_ratios_where_lower_is_better():
    rows = [Row("none", None), Row("a", 16), Row("b", 16)]
    for row, errors in zip(rows, (2.0, 0.0, 3.0), strict=True):
        row.scores = {"t": Score(errors, None, 9), "u": Score(0.5, None, 9)}
    _add_ratios(rows, ["t", "u"], {"t": ("mae", False), "u": ("acc", True)}, {"t": "OCR", "u": "general"})
    assert [row.relative for row in rows] == [1, 1.5, 0.75]
    for row, errors in zip(rows, (0.0, 0.0, 3.0), strict=True):
        row.groups, row.scores["t"] = {}, Score(errors, None, 9)
    _add_ratios(rows, ["t", "u"], {"t": ("mae", False), "u": ("acc", True)}, {"t": "OCR", "u": "general"})
    assert [row.groups for row in rows] == [{"general": 1}] * 3  # it tells nothing about any row


def test_marks_of_the_average_agree_with_its_tests(tmp_path):
    """CIDEr is in the average and cannot be tested; by what is tested the other row is better."""
    accuracy = {"none": 0.9, "random-16": 0.2, "divprune-16": 0.8}
    cider = {"none": 1.0, "random-16": 2.0, "divprune-16": 0.5}

    class Captions(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            if task == "text":
                cell.results["results"][task]["acc,none"] = cider[variant.label]
                return replace(cell, samples=[s | {"acc": {"pred": "a dog"}} for s in cell.samples])
            return cell

    scores = {(label, "count"): round(60 * share) for label, share in accuracy.items()}
    board = run(load_config(write_config(tmp_path, budgets=[16])), harness=Captions(scores=scores, questions=60))
    rows = {row.label: row for row in board.rows}
    assert rows["random-16"].relative > rows["divprune-16"].relative
    assert (rows["divprune-16"].rank, rows["random-16"].rank) == (1, 2)
    assert board.places(None) == {"divprune-16": 1}
    assert board.apart == ["text"]
    assert "by the questions' own scores of: count. The average shown" in render(board, "md")


def test_an_unfinished_row_has_no_share_of_other_prompts_flops(tmp_path):
    config = load_config(write_config(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run(config, harness=FakeHarness(fail_at=("divprune-64", "text"), failure=KeyboardInterrupt()))
    rows = {row.label: row for row in Leaderboard.read(config.output).rows}
    assert rows["divprune-64"].flops and rows["divprune-64"].flops_ratio is None
    assert rows["random-64"].flops_ratio is not None


def test_files_with_other_json_in_them_are_no_record(tmp_path):
    (tmp_path / "timing.json").write_text("[1]")
    assert Store(tmp_path).timing is None


def test_an_unfinished_run_has_a_leaderboard_at_every_moment(tmp_path):
    """A budget of which no row has every task yet is not ranked."""
    config = load_config(write_config(tmp_path))
    cells = [(row.label, task.task) for row in config.variants() for task in config.tasks]
    for place in cells[1:]:
        with pytest.raises(KeyboardInterrupt):
            run(config, harness=FakeHarness(fail_at=place, failure=KeyboardInterrupt()))
        board = Leaderboard.read(config.output)
        assert board.facts["cells"] == f"{cells.index(place)} of {len(cells)}"
        assert all(render(board, format) for format in FORMATS)


@pytest.mark.parametrize("damage", ["[1,2]", "7", "null", '{"seal": 1}', "[" * 100_000, "\x00"])
def test_a_damaged_cell_is_named(tmp_path, damage):
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    (config.output / "cells" / "divprune-16" / "text.json").write_text(damage)
    board = Leaderboard.read(config.output)
    assert "cells 9 of 10 (damaged, will be redone: divprune-16 / text)." in render(board, "md")


def test_a_task_that_changed_between_cells_is_refused(tmp_path):
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    store = Store(config.output)
    cell, samples = store.cell("none", "text"), store.samples("none", "text")
    store.save_cell("none", "text", {k: v for k, v in cell.items() if k != "seal"} | {"definition": {}}, samples)
    with pytest.raises(ConfigError, match="text was changed between .*: its settings, its functions or its data"):
        Leaderboard.read(config.output)
