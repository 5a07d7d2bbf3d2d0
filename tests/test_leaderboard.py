"""The leaderboard: numbers, marks, formats, and the same bytes from the same data."""

import csv
import io
import json
import math
import statistics

import pytest
from evaluation_doubles import SHAPE, FakeHarness, write_config

from vlmslim.efficiency import prefill_flops
from vlmslim.evaluation.config import ConfigError, load_config
from vlmslim.evaluation.leaderboard import Leaderboard, Row, Score, _add_ratios, _metric, _score, _stderr_of_mean
from vlmslim.evaluation.render import FORMATS, cost_columns, render, score_columns
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store

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
    assert [len(group) for group in board.groups()] == [1, 3, 3]


def test_scores_and_the_average_relative_to_the_unpatched_model(board):
    rows = {row.label: row for row in board.rows}
    assert rows["divprune-64"].scores["count"] == Score(0.75, 0.05, 4)
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
    assert rows["random-16"].prefill_ratio is not None


def test_marks(board):
    assert board.places("count") == {
        "divprune-64": 1,
        "random-64": 2,
        "fastv-64": 2,  # ties share a place
        "fastv-16": 1,
        "random-16": 2,
        "divprune-16": 2,
    }
    text = board.places("text")
    assert (text["random-64"], text["divprune-64"]) == (1, 1)
    assert "fastv-64" not in text  # two firsts leave no second
    assert "none" not in board.places(None)


def test_where_all_are_alike_nobody_is_marked():
    rows = [Row(label, 1, {"t": Score(0.5, None, 4)}) for label in "ab"]
    assert Leaderboard(rows, ["t"], {"t": ("acc", True)}, {}).places("t") == {}


def test_a_task_the_unpatched_model_fails_is_left_out_of_the_average():
    rows = [Row("none", None, {"t": Score(0.5, None, 4), "u": Score(0.0, None, 4)})]
    rows.append(Row("a", 1, {"t": Score(0.4, None, 4), "u": Score(0.1, None, 4)}))
    _add_ratios(rows, ["t", "u"], {"t": ("acc", True), "u": ("acc", True)})
    assert [row.relative for row in rows] == [1, 0.8]


def test_tokens_dropped_on_the_way_are_shown():
    rows = [Row("fastv", 16, kept=144.0, last=16.0), Row("divprune", 16, kept=16.0, last=16.0)]
    columns = {c.name: c.texts for c in cost_columns(Leaderboard(rows, [], {}, {}))}
    assert columns["tokens kept"] == ["144.0 → 16.0", "16.0"]


def test_lower_may_be_better():
    rows = [Row("a", 1, {"loss": Score(2.0, None, 4)}), Row("b", 1, {"loss": Score(1.0, None, 4)})]
    board = Leaderboard(rows, ["loss"], {"loss": ("nll", False)}, {})
    assert board.places("loss") == {"b": 1, "a": 2}
    assert board.scale("loss") == 1


def test_the_same_data_gives_the_same_bytes(directory):
    for format in FORMATS:
        first, second = (render(Leaderboard.read(directory), format) for _ in range(2))
        assert first == second == (directory / f"leaderboard.{format}").read_text()
        assert first.endswith("\n") and not first.endswith("\n\n")


def test_markdown(board):
    text = render(board, "md")
    tables = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("## ")[1:]]
    for table in tables:
        assert len(table) == 2 + len(board.rows)
        assert len({line.count("|") for line in table}) == 1
    assert "| **75.0 ± 5.0** |" in text
    assert "*50.0 ± 5.0*" in text
    assert "multiply-add = 2" in text and "seed 0" in text and "all questions" in text


def test_csv(board):
    rows = list(csv.DictReader(io.StringIO(render(board, "csv"))))
    assert [row["label"] for row in rows] == [row.label for row in board.rows]
    assert float(rows[2]["count"]) == 0.75
    assert float(rows[2]["count:stderr"]) == 0.05
    assert rows[0]["requested"] == ""


def test_json(board):
    data = json.loads(render(board, "json"))
    assert data["tasks"]["count"] == {"metric": "acc", "higher_is_better": True}
    assert data["rows"][2]["scores"]["count"] == {"value": 0.75, "stderr": 0.05, "questions": 4}
    assert data["facts"]["versions"].keys() >= {"torch", "transformers", "lmms_eval", "vlmslim"}


def test_html(board):
    text = render(board, "html")
    assert text.count("<tr>") == 2 * (1 + len(board.rows))
    assert '<td class="place1">75.0 ± 5.0</td>' in text
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
    assert rows["random-64"].prefill_ms is None
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


def test_the_metric_is_the_first_or_the_one_asked_for():
    results = {"acc,none": 0.5, "acc_stderr,none": 0.1, "f1,none": 0.4, "submission,none": None, "alias": "t"}
    directions = {"submission": True, "f1": True, "acc": True, "loss": False}
    cells = {("none", "t"): {"lmms_eval": {"results": {"t": results}, "higher_is_better": {"t": directions}}}}
    assert _metric(cells, "t", None) == ("f1", True)  # the task's own order; what gave no number is passed over
    assert _metric(cells, "t", "acc") == ("acc", True)
    with pytest.raises(ConfigError, match="t reports no metric 'bleu'; it has acc, f1"):
        _metric(cells, "t", "bleu")


def test_a_missing_standard_error_comes_from_the_samples_if_the_score_is_their_mean(tmp_path):
    samples = [{"acc": {"score": s}} for s in (1, 1, 0, 1)]
    expected = statistics.stdev([1, 1, 0, 1]) / 2
    assert math.isclose(_stderr_of_mean(samples, "acc", 0.75), expected)
    assert _stderr_of_mean([{"acc": s} for s in (True, True, False, True)], "acc", 0.75) == expected
    assert _stderr_of_mean(samples, "acc", 75.0) is None  # points, or F1, or CIDEr
    assert _stderr_of_mean(samples, "other", 0.75) is None
    assert _stderr_of_mean(samples[:1], "acc", 1.0) is None
    store = Store(tmp_path)
    store.save_cell("none", "t", {}, samples)
    cell = {"lmms_eval": {"results": {"t": {"acc,none": 0.75, "acc_stderr,none": "N/A"}}}}
    assert _score(store, "none", "t", "acc", cell) == Score(0.75, expected, 4)
    cell = {"lmms_eval": {"results": {"t": {"acc,none": float("nan")}}}}
    with pytest.raises(ConfigError, match="none on t: lmms-eval gave acc = nan"):
        _score(store, "none", "t", "acc", cell)


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
