"""Published numbers and ours: only cells that can be compared are set side by side."""

import copy
import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from boards import row_of
from evaluation_doubles import FakeHarness, write_config
from papers import LLAVA, PAPER, changed
from typer.testing import CliRunner

from vlmslim.cli import app
from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.published import Paper, Published
from vlmslim.leaderboard.render import FORMATS, render
from vlmslim.leaderboard.report import write_single
from vlmslim.leaderboard.scores import Score

OTHER_METRIC = {"benchmarks": {"GQA": {"tasks": ["gqa"], "metric": "f1", "unit": "percent"}}}


class LlavaHarness(FakeHarness):
    """The double with LLaVA-1.5's 576 visual tokens and the papers' protocol, and metrics as lmms-eval names them."""

    protocol = {"protocol": "original", "image_aspect_ratio": "pad", "conversation": "vicuna_v1"}

    def evaluate(self, variant, task):
        cell = super().evaluate(variant, task)
        name = {"pope": "pope_f1_score", "gqa": "exact_match"}.get(task, "acc")
        results = cell.results["results"][task]
        results[f"{name},none"] = results.pop("acc,none")
        results[f"{name}_stderr,none"] = results.pop("acc_stderr,none")
        cell.results["higher_is_better"][task] = {name: True}
        for sample in cell.samples:
            sample[name] = sample.pop("acc")
        cell.receipt["visual_tokens"] = 576.0
        if isinstance(variant.budget, float):
            cell.receipt["requested"] = cell.receipt["kept"] = round(variant.budget * 576)
            cell.receipt["visual_tokens_per_layer"] = [cell.receipt["kept"]] * 4
        return cell


class HfHarness(LlavaHarness):
    """The double with the protocol of HF's conversions."""

    protocol = {"protocol": "hf", "image_aspect_ratio": "crop", "conversation": "of the checkpoint"}


class OldHarness(LlavaHarness):
    """The double of a vlmslim that did not record its protocol."""

    protocol = {}


def board(folder, harness=LlavaHarness, **changes):
    settings = {
        "model": {"pretrained": LLAVA},
        "tasks": ["pope", "gqa"],
        "methods": ["divprune", "aim"],
        "budgets": [64, 0.098],
    }
    scores = {("none", "pope"): 90, ("divprune-64", "pope"): 80, ("divprune-0.098", "gqa"): 50, ("none", "gqa"): 60}
    config = load_config(write_config(folder, **settings | changes))
    return run(config, harness=harness(scores=scores, questions=100))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("llava")


@pytest.fixture(scope="module")
def llava(folder):
    return board(folder)


# --- the comparison ---------------------------------------------------------------------------------------------------


def matches(board, **changes):
    """Compare a board with a paper of one number, DivPrune's at 64 tokens: the lines that match."""
    return Published.compare(board, [Paper.model_validate(changed(**changes))]).lines


def test_the_same_model_task_method_and_budget_are_side_by_side(llava, papers):
    result = Published.compare(llava, papers)
    cells = {(line.label, line.task, line.paper, line.table): line for line in result.lines}
    line = cells["divprune-64", "pope", "2503.02175", "main table of the EADP paper"]
    assert (line.theirs, line.ours, line.difference) == (85.5, 80, -5.5)
    assert line.theirs_relative == 85.5 / 85.9 and line.ours_relative == pytest.approx(8 / 9)
    assert line.source == "third party"
    line = cells["divprune-0.098", "gqa", "2503.02175", "Table 1"]
    assert (line.theirs, line.ours, line.differs) == (56.85, 50, "order: raster here, selection there")
    assert ("none", "pope", "2412.03248", "image table of the ICCV poster") in cells
    labels = {line.label for line in result.lines}
    assert labels == {"none", "divprune-64", "divprune-0.098", "random-0.098"}  # AIM was published at 72 and 252
    assert any("multiply-add = 1" in note for note in result.notes)


@pytest.mark.parametrize(
    "keep, labels", [(64, ["divprune-64"]), (56, ["divprune-0.098"]), (57, []), (1 / 9, ["divprune-64"])]
)
def test_a_fraction_and_a_count_that_give_the_same_number_of_tokens_match(llava, keep, labels):
    assert [line.label for line in matches(llava, row={"keep": keep})] == labels


@pytest.mark.parametrize(
    "changes",
    [
        {"row": {"method": "fastv"}},
        {"row": {"method": None}},
        {"row": {"options": {"order": "selection"}}},
        {"row": {"keep": None, "equivalent_tokens": 64.0}},
        {"row": {"keep": None, "fraction": 0.1}},
        {"checkpoints": ["llava-hf/llava-1.5-13b-hf"]},
        {"visual_tokens": 2880},
    ],
)
def test_what_differs_does_not_match(llava, changes):
    assert not matches(llava, **changes)


@pytest.mark.parametrize(
    "order, ran_with, expected",
    [
        ("selection", {}, []),  # an option of ours that the paper does not have
        ("selection", {"divprune": [{"order": "selection"}]}, [""]),
        ("raster", {}, [""]),  # our default, written out
        ("raster", {"divprune": [{"order": "selection"}]}, ["order: raster here, selection there"]),
        ("raster", {"divprune": [{"order": "selection"}, {"order": "raster"}]}, [""]),
        ("raster", {"aim": [{"order": "released"}]}, [""]),  # of another method
    ],
)
def test_options_are_compared_with_the_defaults_filled_in(tmp_path, order, ran_with, expected):
    entry = {"method": "divprune", "keep": 64, "order": order}
    lines = matches(board(tmp_path, methods=[entry], budgets=[], baselines=False), ran_with=ran_with)
    assert [line.differs for line in lines] == expected


def test_a_default_row_is_marked_and_stands_after_the_papers_own(tmp_path):
    default = {"method": "divprune", "keep": 0.098}
    own = {"method": "divprune", "keep": 0.098, "order": "selection", "label": "own"}
    ours = board(tmp_path, methods=[default, own], budgets=[], baselines=False)
    changes = {"ran_with": {"divprune": [{"order": "selection"}]}, "row": {"keep": 0.098}}
    result = Published.compare(ours, [Paper.model_validate(changed(**changes))])
    shown = {column.name: column.texts for column in result.table(ours).columns}
    assert shown["method"] == ["own", "divprune-0.098 ≠"]
    assert shown["options"] == ["the paper's", "order: raster here, selection there"]
    assert "≠ marks a row of ours that runs with our default options" in result.notes[-1]
    assert "order: raster here, selection there" in render(ours, "csv", result)
    alone = Published.compare(ours, [Paper.model_validate(changed(row={"keep": 0.098}))])
    assert [line.label for line in alone.lines] == ["divprune-0.098"] and "≠" not in render(ours, "md", alone)


@pytest.mark.parametrize(
    "harness, prompts, expected",
    [
        (LlavaHarness, {}, ""),
        (HfHarness, {"prompts": "hf"}, ""),
        (HfHarness, {}, "hf here, original there"),
        (LlavaHarness, {"prompts": "hf"}, "original here, hf there"),
        (OldHarness, {}, "not recorded here, original there"),
    ],
)
def test_a_row_of_another_protocol_is_marked(tmp_path, harness, prompts, expected):
    ours = board(tmp_path, harness, methods=["divprune"], budgets=[64], baselines=False)
    result = Published.compare(ours, [Paper.model_validate(changed(**prompts))])
    assert [line.protocol for line in result.lines] == [expected]
    shown = {column.name: column.texts for column in result.table(ours).columns}
    assert shown["method"] == ["divprune-64 †" if expected else "divprune-64"]
    assert shown.get("protocol") == ([expected] if expected else None)
    assert any("† marks a row of ours that saw other pictures" in note for note in result.notes) == bool(expected)
    assert ("protocol" in json.loads(render(ours, "json", result))["published"]["lines"][0]) and expected in render(
        ours, "csv", result
    )


def test_the_authors_checkpoints_are_those_of_the_papers(tmp_path, papers):
    ours = board(tmp_path, model={"pretrained": "liuhaotian/llava-v1.5-7b"})
    assert {line.label for line in Published.compare(ours, papers).lines} >= {"none", "divprune-64"}


def test_the_papers_own_rows_of_the_configurations_run_as_the_papers_did(papers):
    """A row with "paper" in its label has the options of that paper's tables, where vlmslim ships them."""
    checked = 0
    for path in Path("eval_configs").glob("llava*.yaml"):
        config = load_config(path)
        of_model = [t for p in papers for t in p.tables if config.model.pretrained in t.checkpoints]
        for row in config.variants():
            name = row.stages[0]["method"]
            used = [options for table in of_model for options in table.ran_with.get(name, [])]
            if "paper" in row.label and any(r.method == name for t in of_model for r in t.rows):
                assert any(options.items() <= row.stages[0].items() for options in used), (path, row.label)
                assert any(r.method == name and r.keep == row.budget for t in of_model for r in t.rows), row.label
                checked += 1
    assert checked == 10


def test_every_row_that_is_the_same_is_shown(tmp_path):
    methods = [{"method": "random", "keep": 64, "seed": seed, "label": f"seed-{seed}"} for seed in (1, 2)]
    lines = matches(board(tmp_path, methods=methods, budgets=[], baselines=False), row={"method": "random"})
    assert [line.label for line in lines] == ["seed-1", "seed-2"]


def test_a_score_of_zero_is_shown_in_the_papers_unit(llava):
    zero = copy.deepcopy(llava)
    row_of(zero, "divprune-64").scores["gqa"] = Score(0.0, 0.0, 0.04)
    table = Published.compare(zero, [Paper.model_validate(changed())]).table(zero)
    assert {column.name: column.texts for column in table.columns}["here"] == ["0.0 [0.0, 4.0]"]  # per cent


# --- what a reader is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "paper, words",
    [
        (changed(visual_tokens=2880), ["left out: an image has 2880 visual tokens there, and 576.0 here (gqa)"]),
        (changed() | OTHER_METRIC, ["reports gqa by f1, but this run by exact_match", "'metric'"]),
        (changed(checkpoints=["another"]), [f"No published table is about {LLAVA}; there are tables about another"]),
        (changed(row={"keep": 32}), ["No published cell about", "Tasks: gqa; methods: divprune at 32."]),
    ],
)
def test_a_note_says_why_nothing_is_compared(llava, paper, words):
    result = Published.compare(llava, [Paper.model_validate(paper)])
    assert not result.lines
    assert all(word in "\n".join(result.notes) for word in words)


def test_a_part_of_the_questions_is_not_compared(tmp_path, papers):
    result = Published.compare(board(tmp_path, limit=100), papers)
    assert not result.lines and "first 100 questions" in result.notes[0]


def test_formats(llava, papers, tmp_path):
    result = Published.compare(llava, papers)
    text = render(llava, "md", result)
    assert "## Published and here" in text and "| 85.5 |" in " ".join(text.split())
    assert json.loads(render(llava, "json", result))["published"]["lines"][0]["paper"]
    lines = list(csv.DictReader(io.StringIO(render(llava, "csv", result))))
    assert len(lines) == len(result.lines)
    assert "Published and here" in write_single(llava, tmp_path / "board.html", result).read_text()
    nothing = Published([], ["Nothing."])
    assert all("Published and here" not in render(llava, format, nothing) for format in FORMATS)


def test_the_command(llava, folder, tmp_path):
    def call(*options):
        return CliRunner().invoke(app, ["leaderboard", str(folder / "out"), *map(str, options)])

    assert "Published and here" in call("--published").output
    assert "Published and here" not in call().output
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(PAPER))
    result = call("--published-tables", tmp_path)
    assert "2501.00001, Table 1" in result.output and "2503.02175" not in result.output
    assert call("--published-tables", tmp_path / "none").exit_code == 2


def test_reading_and_rendering_load_no_torch(llava, folder):
    """Neither a board nor the papers' tables need torch, unless a row's options are written otherwise than there."""
    script = """
import sys
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.published import Published, load_papers
from vlmslim.leaderboard.render import FORMATS, render
from vlmslim.leaderboard.report import write_single

board = Leaderboard.read(sys.argv[1])
published = Published.compare(board, [paper for paper in load_papers() if paper.arxiv == "2412.03248"])
assert published.lines
assert all(render(board, format, published) for format in FORMATS)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script, folder / "out"], check=True)
