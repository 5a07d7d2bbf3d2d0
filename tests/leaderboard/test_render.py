"""The tables, the notes, and the formats of text."""

import csv
import html
import io
import json
import re

import pytest
from boards import Costly, costs, row_of, scored_rows, staged
from evaluation_doubles import FakeHarness, write_config
from markdown_it import MarkdownIt

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.comparison import Pair
from vlmslim.leaderboard.notes import notes
from vlmslim.leaderboard.render import FORMATS, render
from vlmslim.leaderboard.rows import Row, Solved
from vlmslim.leaderboard.scores import Estimate, Score
from vlmslim.leaderboard.tables import cost_columns, p_text, score_columns, tables, with_interval


def texts(columns) -> dict[str, list[str]]:
    return {column.name: column.texts for column in columns}


def cost_texts(*rows: Row) -> dict[str, list[str]]:
    return texts(cost_columns(Leaderboard(list(rows), [], {}, {})))


def titled(board: Leaderboard) -> dict[str, dict[str, list[str]]]:
    return {table.title: texts(table.columns) for table in tables(board)}


def csv_lines(board: Leaderboard) -> dict[str, dict[str, str]]:
    return {line["label"]: line for line in csv.DictReader(io.StringIO(render(board, "csv")))}


# ---------------------------------------------------------------------- tables


def test_numbers_with_intervals():
    assert with_interval(None) == "–"
    assert with_interval(Estimate(0.5)) == "50.0"
    assert with_interval(Estimate(0.5, 0.4, 0.6)) == "50.0 ± 10.0"
    assert with_interval(Estimate(0.5, 0.4, 0.7), sign="+") == "+50.0 [+40.0, +70.0]"
    assert with_interval(Estimate(1234.5, 1200.0, 1270.0), 1) == "1234.5 ± 35.0"
    assert with_interval(Estimate(-0.0001, -0.1, 0.1), sign="+") == "+0.0 ± 10.0"  # never -0.0


def test_points_are_not_percentages():
    board = Leaderboard(
        scored_rows(none={"mme": 1510.7, "cider": 1.1}),
        ["mme", "cider"],
        {"mme": ("p", True), "cider": ("c", True)},
        {},
    )
    found = texts(score_columns(board))
    assert (found["mme"], found["cider"]) == (["1510.7"], ["1.100"])


@pytest.mark.parametrize(
    "kept, text",
    [
        ({"kept": 144.0, "last": 16.0}, "144.0 → 16.0"),
        ({"kept": 16.0, "last": 16.0}, "16.0"),
        ({"kept": 47.5, "last": 47.5, "kept_low": 12, "kept_high": 98}, "47.5 (12–98)"),
        ({"kept": 288.0, "last": 20.0, "kept_low": 144, "kept_high": 12240}, "288.0 (144–12240) → 20.0"),
        ({"kept": 16.0, "last": 16.0, "kept_low": 16, "kept_high": 16}, "16.0"),
    ],
)
def test_tokens_kept_with_their_range_and_what_is_left_in_the_last_layer(kept, text):
    assert cost_texts(Row("m", 16, cost=costs(**kept)))["tokens kept"] == [text]


def test_units_follow_the_size(board):
    assert {"prefill GFLOPs", "KV cache KiB"} <= texts(cost_columns(board)).keys()
    assert texts(cost_columns(board))["method GFLOPs"][:2] == ["0.000", "0.001"]
    big = cost_texts(Row("none", None, cost=costs(flops=8.26e12, kv_bytes=311 * 2**20), flops_ratio=1.0))
    assert big["method TFLOPs"] == ["–"]
    assert big["prefill TFLOPs"] == ["8.26 (1.00x)"]
    assert big["KV cache MiB"] == ["311.0"]


def test_what_a_cost_came_to_stands_beside_it():
    solution = {"option": "keep", "value": 11, "target": {"equivalent_tokens": 64}, "achieved": 63.9, "prompts": 16}
    ratio = solution | {"value": 0.11213, "target": {"flops_ratio": 0.15}}
    rows = [
        Row("none", None),
        Row("fastv", {"equivalent_tokens": 64}, solved=Solved(solution, 63.97, 63.97, 63.97)),
        Row("aim", {"flops_ratio": 0.15}, solved=Solved(ratio, 0.1532, 0.1488, 0.1571)),
    ]
    found = cost_texts(*rows)
    assert found["solved"] == ["–", "keep=11", "keep=0.11213"]
    assert found["spent"] == ["–", "64.0", "0.153 (0.149–0.157)"]
    assert list(found).index("spent") == list(found).index("budget") + 2
    assert "solved" not in cost_texts(rows[0])


def test_the_tables(decided):
    built = titled(decided)
    against = built["Against the unpatched model"]
    assert "none" not in against["method"]
    at = against["method"].index("fastv-16")
    assert against["count"][at] == "-60.0 ± 12.8†" and against["p"][at] == "<0.001"
    assert against["loyalty %"][against["method"].index("divprune-16")] == "100.0"
    between = built["Between methods at 16"]
    divprune, fastv = map(between["row minus column"].index, ("divprune-16", "fastv-16"))
    assert between["divprune-16"][divprune] == "–"
    assert between["divprune-16"][fastv].startswith("-66.7") and between["fastv-16"][divprune].startswith("+66.7")
    assert "Task groups, % of unpatched" not in built  # all tasks are in one group


@pytest.mark.parametrize(
    "p, at_limit, text",
    [
        (0.0039, False, "0.004"),
        (0.0039, True, "<0.005"),
        (0.0003, False, "<0.001"),
        (0.005, True, "<0.005"),
        (0.13, True, "<0.2"),
        (1.0, True, "1.000"),
    ],
)
def test_a_p_value_that_the_swaps_cannot_resolve_is_an_upper_bound(p, at_limit, text):
    pair = Pair("a", "none", None, -0.5, p / 78, p, better=False, at_limit=at_limit)
    assert p_text(pair) == text


def test_differences_are_in_the_unit_of_the_questions_scores(tmp_path):
    """The task reports per cent of questions that score 1: 45 points less are 45 points, not 0.45."""

    class InPercent(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            cell.results["results"][task]["acc,none"] *= 100
            return cell

    scores = {("none", "count"): 15, ("random-16", "count"): 6}
    board = run(load_config(write_config(tmp_path, budgets=[16])), harness=InPercent(scores=scores, questions=20))
    against = titled(board)["Against the unpatched model"]
    assert against["count"][against["method"].index("random-16")].startswith("-45.0")


def test_task_groups_have_intervals(tmp_path):
    tasks = [{"task": "count", "group": "mine"}, "scenes_text"]
    scores = {(label, "count"): n for label, n in (("none", 50), ("random-16", 30), ("divprune-16", 50))}
    config = load_config(write_config(tmp_path, tasks=tasks, budgets=[16]))
    groups = titled(run(config, harness=FakeHarness(scores=scores, questions=60)))["Task groups, % of unpatched"]
    assert list(groups)[2:] == ["OCR", "mine"]
    assert re.fullmatch(r"60\.0 (±|\[).*", groups["mine"][groups["method"].index("random-16")])


# ---------------------------------------------------------------------- stages that decide themselves


def test_a_stage_that_never_acted_is_never_shown_as_if_it_had(tmp_path):
    board = staged(tmp_path, count=0, text=0)
    text = render(board, "md")
    assert "both: stage 2 (drop_visual, before layer 6) acted on 0 of 700 prompts." in text
    assert "‡ marks a row with a stage that never acted" in text
    for table in titled(board).values():
        names = table.get("method") or table["row minus column"]
        assert [name for name in names if "‡" in name] == ["both ‡"]
    recorded = {"name": "drop_visual", "layers": [6], "acted": 0, "prompts": 700, "decides": True, "keeps_all": False}
    assert json.loads(csv_lines(board)["both"]["activity"])[1] == recorded
    assert next(row for row in json.loads(render(board, "json"))["rows"] if row["label"] == "both")["activity"][1] == (
        recorded
    )


def test_a_stage_that_acts_sometimes_is_counted_but_not_marked(tmp_path):
    board = staged(tmp_path, count=3, text=0)
    assert "both: stage 2 (drop_visual, before layer 6) acted on 3 of 700 prompts." in render(board, "md")
    assert "‡" not in render(board, "md")


# ---------------------------------------------------------------------- notes


def test_the_protocol_line(tmp_path):
    class Harness(FakeHarness):
        protocol = {"protocol": "original", "image_aspect_ratio": "pad", "conversation": "vicuna_v1"}

        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            hints = {"count": {"pre_prompt": ""}, "text": {"default": {"ocr": True}}}[task]
            cell.results["configs"] = {task: {"test_split": "val", "lmms_eval_specific_kwargs": hints}}
            return cell

    board = run(load_config(write_config(tmp_path, batch_size=8)), harness=Harness())
    assert (
        "Protocol: original (pictures padded to squares, conversation vicuna_v1); batch size 8; sdpa in float32. "
        "count: acc, 4 questions of val; text: acc, 4 questions of val, with OCR hints."
    ) in notes(board)
    assert Store(tmp_path / "out").cell("none", "text")["protocol"]["conversation"] == "vicuna_v1"


def test_a_protocol_that_was_not_recorded(board):
    assert any(note.startswith("Protocol: not recorded; batch size 1; sdpa in float32. ") for note in notes(board))


def test_the_notes(board):
    text = "\n".join(notes(board))
    for words in ("Metric: acc, in per cent for all tasks, on all questions", "multiply-add = 2", "seed 0"):
        assert words in text
    assert "McNemar" in text and "Holm" in text and "sdpa in float32" in text


@pytest.mark.parametrize("missing", [[], ["uniform"], ["blind", "downsample"]])
def test_a_missing_baseline_is_said(board, missing):
    used = {"random", "uniform", "blind", "downsample"} - set(missing)
    rows = [Row("a", 1, stages=[{"method": method}]) for method in used]
    found = [note for note in notes(Leaderboard(rows, [], {}, board.facts)) if "baseline" in note]
    assert [note.partition(". ")[0] for note in found] == [f"Missing baseline: {name}" for name in missing]


def test_the_notes_say_what_is_tested(captions):
    text = "\n".join(notes(captions))
    assert "use the questions' own scores of count. The average in the table contains other scores too" in text
    assert "Not tested, because single questions have no scores: text." in text


# ---------------------------------------------------------------------- formats


def test_the_same_data_gives_the_same_bytes(directory):
    for format in FORMATS:
        first, second = (render(Leaderboard.read(directory), format) for _ in range(2))
        assert first == second == (directory / f"leaderboard.{format}").read_text()
        assert first.endswith("\n") and not first.endswith("\n\n")


def test_an_unknown_format_is_refused(board):
    with pytest.raises(ValueError, match="unknown format 'xlsx'; use one of md, csv, json"):
        render(board, "xlsx")


def test_markdown(board):
    text = render(board, "md")
    parts = [[line for line in part.splitlines() if line.startswith("|")] for part in text.split("## ")[1:]]
    assert [part.splitlines()[0] for part in text.split("## ")[1:]] == [table.title for table in tables(board)]
    for lines, table in zip(parts, tables(board), strict=True):
        assert len(lines) == 2 + len(table.rows)
        assert len({line.count("|") for line in lines}) == 1
    assert "| **75.0 [30.1, 95.4]** |" in text  # Wilson's, of three right of four
    assert "*50.0 ± " in text


def test_csv(board):
    lines = csv_lines(board)
    assert list(lines) == [row.label for row in board.rows]
    line = lines["divprune-64"]
    assert float(line["count:value"]) == 0.75 and float(line["count:stderr"]) == 0.05
    assert float(line["count:low"]) < 0.75 < float(line["count:high"])
    assert float(line["method_flops"]) == 1e6 and float(line["work_ratio"]) > float(line["flops_ratio"])
    assert float(line["relative"]) == 0.875 and float(line["group:general"]) == 0.875
    assert json.loads(line["stages"]) == [{"method": "divprune", "keep": 64}]
    assert lines["none"]["requested"] == "" and lines["none"]["count:p"] == ""
    assert all(line["config_hash"] and line["versions"] and line["hardware"] for line in lines.values())


def test_json(board):
    data = json.loads(render(board, "json"))
    assert data["tasks"]["count"] == {"metric": "acc", "higher_is_better": True, "group": "general"}
    row = data["rows"][2]
    score = row["scores"]["count"]
    assert (score["value"], score["stderr"], score["questions"]) == (0.75, 0.05, 4)
    assert (row["kept"], row["relative"], row["ttft_ms"]) == (64, 0.875, board.rows[2].times.ttft_ms)
    assert row["method_flops"] == 1e6 and row["work_ratio"] == board.rows[2].work_ratio
    assert data["facts"]["versions"].keys() >= {"torch", "transformers", "lmms_eval", "vlmslim"}
    families = {(pair["task"], pair["first"].split("-")[1]) for pair in data["pairs"]}
    assert families == {(task, budget) for task in ("count", "text", None) for budget in ("64", "16")}
    assert all(0 < pair["p"] <= pair["p_adjusted"] <= 1 for pair in data["pairs"])
    assert not any(pair["at_limit"] for pair in data["pairs"])  # four questions: all patterns are tried
    assert len(data["stability"]) == 2 * (len(board.rows) - 1)


def test_costs_from_the_run_to_every_format(tmp_path):
    board = run(load_config(write_config(tmp_path, budgets=[16, {"equivalent_tokens": 40}])), harness=Costly())
    row = row_of(board, "divprune-equivalent_tokens=40")
    assert (row.solved.spent, row.solved.spent_low, row.solved.spent_high) == (42, 40, 44)
    markdown = render(board, "md")
    assert "| keep=40 | 42.0 (40.0–44.0) |" in " ".join(markdown.split())
    assert "solved on 4 sample prompts" in markdown
    lines = csv_lines(board)
    assert (lines[row.label]["solved"], lines[row.label]["spent"]) == ("keep=40", "42.0")
    assert (lines["divprune-16"]["solved"], lines["divprune-16"]["spent"]) == ("", "")
    (read,) = (r for r in json.loads(render(board, "json"))["rows"] if r["label"] == row.label)
    assert read["solved"]["target"] == {"equivalent_tokens": 40} and read["spent_high"] == 44


def named(board, label="l", task="t", model="m"):
    """Make a board of one row in which a label, a task and a model have these names."""
    row = Row(label, 1, scores={task: Score(0.5)})
    return Leaderboard([row], [task], {task: ("acc", True)}, board.facts | {"model": model})


def test_names_cannot_break_a_format(board):
    label, task = "=cmd|*a*<b>_c_", "t|u`"
    hostile = named(board, label, task, "m|<script>")
    markdown = render(hostile, "md")
    assert r"=cmd\|\*a\*\<b>\_c\_" in markdown and r"t\|u\`" in markdown and r"# m\|\<script>" in markdown
    assert list(csv_lines(hostile)) == [f"'{label}"]  # a spreadsheet runs no formula


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", " =1", "\t=1", "\uff1d1", '=HYPERLINK("x")'])
def test_no_cell_of_a_csv_file_is_a_formula(board, text):
    lines = [*csv.reader(io.StringIO(render(named(board, text, text, text), "csv")))]
    cells = [cell for line in lines for cell in line]
    assert [cell for cell in cells if cell.lstrip().startswith(tuple("=+-@\uff1d"))] == []
    assert f"'{text}" in lines[1] and {f"'{text}:value", f"'{text}:p"} <= set(lines[0])


MARKDOWN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


def seen(text: str) -> tuple[list[str], str]:
    """Return the tags of a page in Markdown in order, and its text."""
    page = MARKDOWN.render(text)
    return re.findall("<[^>]*>", page), html.unescape(re.sub("<[^>]*>", "", page))


@pytest.mark.parametrize(
    "name",
    [
        *("[a](http://b)", "![a](http://b)", "[a][b]", "[a]: /b", "a|b", "&lt;b&gt;", "~~a~~", "- a", "1. a", "# a #"),
        *("> a", "<b>", "<!-- a", "*a*", "`a`", "\\|a", "\\", "_a_", "a\nb", "http://b.c", "www.b.c", "=", "---"),
    ],
)
@pytest.mark.parametrize("place", ["label", "task", "model"])
def test_a_reader_of_the_markdown_sees_names_as_they_are(board, place, name):
    markdown = render(named(board, **{place: name}), "md")
    tags, text = seen(markdown)
    assert tags == seen(render(named(board), "md"))[0]
    assert " ".join(name.split()) in text
    assert not re.search(r"(?<!\\)://|www\.", markdown)  # GitHub would make links of addresses
