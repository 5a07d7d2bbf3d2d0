"""The papers' tables: that they are well-formed, and that only what is really comparable is set against ours."""

import copy
import csv
import io
import json
import subprocess
import sys

import pytest
import yaml
from evaluation_doubles import FakeHarness, write_config
from typer.testing import CliRunner

from vlmslim.cli import app
from vlmslim.evaluation.config import ConfigError, load_config
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.published import Paper, Published, load_papers
from vlmslim.leaderboard.render import FORMATS, render
from vlmslim.leaderboard.scores import Score
from vlmslim.registry import method, method_names

LLAVA = "llava-hf/llava-1.5-7b-hf"


class LlavaHarness(FakeHarness):
    """The double with LLaVA-1.5's 576 visual tokens, and metrics named as lmms-eval names them."""

    def __init__(self, tokens=576, **options):
        super().__init__(**options)
        self.tokens = tokens

    def evaluate(self, variant, task):
        cell = super().evaluate(variant, task)
        name = {"pope": "pope_f1_score", "gqa": "exact_match"}.get(task, "acc")
        results = cell.results["results"][task]
        results[f"{name},none"] = results.pop("acc,none")
        results[f"{name}_stderr,none"] = results.pop("acc_stderr,none")
        cell.results["higher_is_better"][task] = {name: True}
        for sample in cell.samples:
            sample[name] = sample.pop("acc")
        cell.receipt["visual_tokens"] = float(self.tokens)
        if isinstance(variant.budget, float):
            cell.receipt["requested"] = cell.receipt["kept"] = round(variant.budget * self.tokens)
            cell.receipt["visual_tokens_per_layer"] = [cell.receipt["kept"]] * 4
        return cell


def board(folder, harness=None, **changes):
    settings = {
        "model": {"pretrained": LLAVA},
        "tasks": ["pope", "gqa"],
        "methods": ["divprune", "aim"],
        "budgets": [64, 0.098],
    }
    config = load_config(write_config(folder, **settings | changes))
    scores = {("none", "pope"): 90, ("divprune-64", "pope"): 80, ("divprune-0.098", "gqa"): 50, ("none", "gqa"): 60}
    run(config, harness=harness or LlavaHarness(scores=scores, questions=100))
    return Leaderboard.read(config.output)


@pytest.fixture(scope="module")
def llava_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llava")


@pytest.fixture(scope="module")
def llava(llava_folder):
    return board(llava_folder)


@pytest.fixture(scope="module")
def papers():
    return load_papers()


# ---------------------------------------------------------------------- the files


def test_every_paper_with_a_specification_is_there(papers):
    known = {"2412.03248", "2412.00447", "2503.02175", "2501.05179", "2409.01179", "2505.18757", "2407.14439"}
    assert {paper.arxiv for paper in papers} == known | {"2504.03154"}


def test_every_number_has_its_source(papers):
    for paper in papers:
        assert paper.title and paper.read and paper.tables
        for table in paper.tables:
            assert table.table and table.model and table.protocol and table.convention
            assert any(score is not None for row in table.rows for score in row.scores)


def test_methods_and_budgets_of_the_tables_exist(papers):
    for paper in papers:
        for table in paper.tables:
            for row in table.rows:
                if row.method not in (None, "none"):
                    assert row.method in method_names()
                    method(row.method, **row.options, **({} if row.keep is None else {"keep": row.keep}))
                given = [row.keep, row.share, row.equivalent_tokens]
                assert sum(budget is not None for budget in given) <= 1


def test_spot_checks_against_the_papers(papers):
    """Cells that the papers' own sentences repeat."""
    divprune = next(paper for paper in papers if paper.arxiv == "2503.02175").tables[0]
    rows = {row.name: dict(zip(divprune.columns, row.scores, strict=True)) for row in divprune.rows[:4]}
    assert rows["original"]["GQA"] - rows["DivPrune"]["GQA"] == pytest.approx(5.1, abs=0.05)
    assert rows["original"]["MMBench EN"] - rows["DivPrune"]["MMBench EN"] == pytest.approx(4.9, abs=0.05)
    assert divprune.rows[3].keep == 0.098
    flex = next(paper for paper in papers if paper.arxiv == "2504.03154").tables[0]
    for row in flex.rows:
        assert sum(row.scores[:8]) / 8 == pytest.approx(row.scores[8], abs=0.06)


@pytest.mark.slow
def test_the_tasks_and_metrics_that_are_named_exist(papers, tmp_path):
    from vlmslim.evaluation.config import TaskConfig
    from vlmslim.evaluation.harness import Tasks

    benchmarks = [benchmark for paper in papers for benchmark in paper.benchmarks.values() if benchmark.tasks]
    named = [TaskConfig(task=task) for benchmark in benchmarks for task in benchmark.tasks]
    registry = Tasks(load_config(write_config(tmp_path)).model_copy(update={"tasks": named}))
    for benchmark in benchmarks:
        for task in benchmark.tasks:
            assert benchmark.metric in registry.metrics(task), task


PAPER = {
    "title": "T",
    "arxiv": "2501.00001",
    "read": "a test",
    "benchmarks": {"GQA": {"tasks": ["gqa"], "metric": "exact_match", "unit": "percent"}},
    "tables": [
        {
            "table": "Table 1",
            "source": "paper",
            "model": "M",
            "checkpoints": [LLAVA],
            "protocol": "p",
            "convention": "c",
            "columns": ["GQA"],
            "rows": [{"name": "D", "method": "divprune", "keep": 64, "scores": [50.0]}],
        }
    ],
}


def changed(**table):
    row = table.pop("row", {})
    first = PAPER["tables"][0] | table
    return PAPER | {"tables": [first | {"rows": [first["rows"][0] | row]}]}


@pytest.mark.parametrize(
    "data, message",
    [
        (PAPER | {"arxiv": "DivPrune"}, "arxiv"),
        (changed(source="memory"), "source"),
        (changed(row={"scores": [1.0, 2.0]}), "2 scores for 1 columns"),
        (changed(columns=["POPE"]), "columns differ in: GQA, POPE"),
        (changed(row={"budget": 64}), "budget"),
        (PAPER | {"benchmarks": {"GQA": {"tasks": ["gqa"], "unit": "percent"}}}, "together"),
    ],
)
def test_malformed_tables_are_refused(tmp_path, data, message):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(data))
    with pytest.raises(ConfigError, match=message) as caught:
        load_papers(tmp_path)
    assert "bad.yaml" in str(caught.value)


def test_a_missing_directory_says_what_to_type(tmp_path):
    with pytest.raises(ConfigError, match="--published-tables"):
        load_papers(tmp_path / "nowhere")


# ---------------------------------------------------------------------- the comparison


def test_the_same_model_task_method_and_budget_are_side_by_side(llava, papers):
    result = Published.compare(llava, papers)
    cells = {(line.label, line.task, line.arxiv, line.table): line for line in result.lines}
    line = cells["divprune-64", "pope", "2503.02175", "main table of the EADP paper"]
    assert (line.theirs, line.ours, line.difference) == (85.5, 80, -5.5)
    assert line.theirs_relative == 85.5 / 85.9 and line.ours_relative == pytest.approx(8 / 9)
    assert line.source == "third party"
    line = cells["divprune-0.098", "gqa", "2503.02175", "Table 1"]
    assert (line.theirs, line.ours) == (56.85, 50)
    assert ("none", "pope", "2412.03248", "image table of the ICCV poster") in cells
    labels = {line.label for line in result.lines}
    assert labels == {"none", "divprune-64", "divprune-0.098", "random-0.098"}  # AIM was published at 72 and 252
    assert any("multiply-add = 1" in note for note in result.notes)


def match(llava, **changes):
    return Published.compare(llava, [Paper.model_validate(changed(**changes))]).lines


def test_a_share_and_a_count_that_come_to_the_same_match(llava):
    assert [line.label for line in match(llava, row={"keep": 56})] == ["divprune-0.098"]
    assert match(llava, row={"keep": 57}) == []
    assert [line.label for line in match(llava, row={"keep": 1 / 9})] == ["divprune-64"]


def test_a_score_of_nothing_is_shown_in_the_papers_unit(llava):
    board = copy.deepcopy(llava)
    row = next(row for row in board.rows if row.label == "divprune-64")
    row.scores["gqa"] = Score(0.0, None, 90, 0.0, 0.04)
    table = Published.compare(board, [Paper.model_validate(changed())]).table(board)
    texts = {column.name: column.texts for column in table.columns}
    assert texts["here"] == ["0.0 [0.0, 4.0]"]  # per cent


def test_what_differs_is_not_matched(llava):
    assert len(match(llava)) == 1
    assert not match(llava, row={"method": "fastv"})
    assert not match(llava, row={"method": None})
    assert not match(llava, row={"options": {"order": "selection"}})
    assert not match(llava, row={"keep": None, "equivalent_tokens": 64.0})
    assert not match(llava, checkpoints=["llava-hf/llava-1.5-13b-hf"])
    other_metric = changed() | {"benchmarks": {"GQA": {"tasks": ["gqa"], "metric": "f1", "unit": "percent"}}}
    assert not Published.compare(llava, [Paper.model_validate(other_metric)]).lines


def test_another_number_of_tokens_an_image_is_another_budget(llava):
    result = Published.compare(llava, [Paper.model_validate(changed(visual_tokens=2880))])
    assert not result.lines
    assert "left out: 2880 visual tokens an image there, 576.0 here" in result.notes[0]


def test_an_option_of_ours_is_another_method(tmp_path, papers):
    entry = {"method": "divprune", "keep": 64, "order": "selection"}
    lines = Published.compare(board(tmp_path, methods=[entry], budgets=[]), papers).lines
    assert {line.label for line in lines} == {"none"}


def test_the_papers_own_way_is_compared_though_it_is_not_our_default(tmp_path):
    entry = {"method": "divprune", "keep": 64, "order": "selection"}
    own = board(tmp_path, methods=[entry], budgets=[])
    label = next(row.label for row in own.rows if row.stages[0]["method"] == "divprune")
    assert not match(own)
    assert [line.label for line in match(own, also=[{"order": "selection"}])] == [label]


def test_every_row_that_is_the_same_is_shown(tmp_path):
    methods = [{"method": "random", "keep": 64, "seed": seed, "label": f"seed-{seed}"} for seed in (1, 2)]
    lines = match(board(tmp_path, methods=methods, budgets=[], baselines=False), row={"method": "random"})
    assert [line.label for line in lines] == ["seed-1", "seed-2"]


def test_a_metric_that_the_run_did_not_report_is_named(llava):
    other = changed() | {"benchmarks": {"GQA": {"tasks": ["gqa"], "metric": "f1", "unit": "percent"}}}
    notes = Published.compare(llava, [Paper.model_validate(other)]).notes
    assert any("gqa by f1" in note and "'metric'" in note for note in notes)


def test_a_part_of_the_questions_is_not_compared(tmp_path, papers):
    result = Published.compare(board(tmp_path, limit=100), papers)
    assert not result.lines and "first 100 questions" in result.notes[0]


def test_an_unknown_model_is_told_what_there_is(tmp_path, papers):
    result = Published.compare(board(tmp_path, model={"pretrained": "bundled/tiny-llava"}), papers)
    assert not result.lines
    assert result.notes == [note for note in result.notes if "Nothing is published here for bundled/tiny-llava" in note]
    assert LLAVA in result.notes[0]


def test_a_run_without_a_common_cell_is_told_what_there_is(tmp_path, papers):
    result = Published.compare(board(tmp_path, tasks=["count"]), papers)
    assert not result.lines
    assert "pope" in result.notes[-1] and "divprune at 0.098" in result.notes[-1]


def test_formats(llava, papers):
    result = Published.compare(llava, papers)
    text = render(llava, "md", result)
    assert "## Published and here" in text and "| 85.5 |" in " ".join(text.split())
    assert json.loads(render(llava, "json", result))["published"]["lines"][0]["arxiv"]
    lines = list(csv.DictReader(io.StringIO(render(llava, "csv", result))))
    assert len(lines) == len(result.lines)
    assert "Published and here" in render(llava, "html", result)
    nothing = Published([], ["Nothing."])
    for format in FORMATS:
        assert "Published and here" not in render(llava, format, nothing)


def test_the_command(tmp_path):
    board(tmp_path)
    runner = CliRunner()
    result = runner.invoke(app, ["leaderboard", str(tmp_path / "out"), "--published"])
    assert result.exit_code == 0 and "Published and here" in result.output
    assert "Published and here" not in runner.invoke(app, ["leaderboard", str(tmp_path / "out")]).output
    own = tmp_path / "tables"
    own.mkdir()
    (own / "one.yaml").write_text(yaml.safe_dump(PAPER))
    result = runner.invoke(app, ["leaderboard", str(tmp_path / "out"), "--published-tables", str(own)])
    assert "2501.00001, Table 1" in result.output and "2503.02175" not in result.output
    result = runner.invoke(app, ["leaderboard", str(tmp_path / "out"), "--published-tables", str(tmp_path / "none")])
    assert result.exit_code == 2


def test_reading_and_rendering_load_no_torch(llava, llava_folder):
    """Neither a board nor the papers' tables need torch, unless a row's options are written otherwise than there."""
    script = """
import sys
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.published import Published, load_papers
from vlmslim.leaderboard.render import FORMATS, render

board = Leaderboard.read(sys.argv[1])
published = Published.compare(board, load_papers())
assert published.lines
assert all(render(board, format, published) for format in FORMATS)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, llava_folder / "out"], check=True)
