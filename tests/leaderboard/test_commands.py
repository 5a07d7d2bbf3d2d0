"""The commands that read finished runs: leaderboard, compare, submit, and the trackers of `run --log`."""

import json
import sys
from types import SimpleNamespace

import pandas as pd
import pytest
import render_submissions
from evaluation_doubles import FakeHarness, write_config
from typer.testing import CliRunner

from vlmslim.cli import app
from vlmslim.evaluation import harness
from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.notes import BASELINES
from vlmslim.leaderboard.submission import read_submission
from vlmslim.leaderboard.trackers import PROJECT, send


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


class Stating(FakeHarness):
    """Records the protocol, as `vlmslim run` does."""

    protocol = {"protocol": "hf", "image_aspect_ratio": "crop", "conversation": "none"}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    config = load_config(write_config(tmp_path_factory.mktemp("run"), baselines=list(BASELINES)))
    run(config, harness=Stating())
    return config.output


def test_the_page_and_the_frames_are_written_where_they_are_asked_for(output, tmp_path):
    assert call("leaderboard", output, "-f", "html").stdout.strip() == str(output / "report/index.html")
    assert call("leaderboard", output, "-f", "html", "--single").stdout.strip() == str(output / "leaderboard.html")
    assert call("leaderboard", output, "-f", "html", "-o", tmp_path / "new").exit_code == 0
    assert (tmp_path / "new/index.html").is_file()
    shown = call("leaderboard", output, "-f", "parquet", "-o", tmp_path / "frames")
    assert shown.stdout.splitlines() == [
        str(tmp_path / f"frames/{n}.parquet") for n in ("rows", "cells", "samples", "pairs")
    ]
    assert len(pd.read_parquet(tmp_path / "frames/rows.parquet")) == 10


@pytest.mark.parametrize(
    "options, message",
    [
        (["--single"], "--single is for --format html"),
        (["-f", "csv", "-o", "x.csv"], "csv goes to standard output, so write > x.csv"),
    ],
)
def test_options_that_do_not_go_together(output, options, message):
    shown = call("leaderboard", output, *options)
    assert shown.exit_code == 2 and message in shown.stderr


def test_compare(output, tmp_path):
    shown = call("compare", output, output)
    assert shown.exit_code == 0 and shown.stdout.startswith("# Two runs, question by question")
    refused = call("compare", output, tmp_path / "none")
    assert refused.exit_code == 2 and "does not exist; give the output directory" in refused.stderr


def test_a_fresh_run_leaves_nothing_of_the_old_one(tmp_path):
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    for options in (["-f", "html", "--single"], ["-f", "parquet"]):
        assert call("leaderboard", config.output, *options).exit_code == 0
    Store(config.output).clear()
    assert [path.name for path in config.output.iterdir()] == [".lock"]


# ---------------------------------------------------------------------- submissions


def test_a_submission_holds_hashes_and_receipts(output, tmp_path):
    shown = call("submit", output, "-o", tmp_path / "mine.json")
    assert shown.exit_code == 0, shown.stderr
    content = read_submission(tmp_path / "mine.json")
    assert content["sha256"] in shown.stdout and len(content["cells"]) == 20
    cell = next(one for one in content["cells"] if (one["label"], one["task"]) == ("divprune-64", "text"))
    stored = json.loads((output / "cells/divprune-64/text.json").read_text())
    assert (cell["sha256"], cell["samples_sha256"]) == (stored["seal"], stored["samples_sha256"])
    assert cell["receipt"]["kept"] == 64
    assert content["protocol"].startswith("Protocol: hf (pictures cut to squares, conversation none)")


def test_a_changed_submission_is_refused(output, tmp_path):
    file = tmp_path / "mine.json"
    call("submit", output, "-o", file)
    file.write_text(file.read_text().replace('"kept": 64.0', '"kept": 16.0', 1))
    with pytest.raises(ValueError, match="was changed after it was written"):
        read_submission(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no submission"):
        read_submission(file)


def test_everything_that_keeps_a_run_off_the_board_is_said_at_once(tmp_path):
    config = load_config(write_config(tmp_path, limit=2))
    with pytest.raises(KeyboardInterrupt):
        run(config, harness=FakeHarness(fail_at=("divprune-16", "text"), failure=KeyboardInterrupt()))
    shown = call("submit", config.output)
    assert shown.exit_code == 2 and not (config.output / "submission.json").exists()
    for said in (
        "divprune-16 / text not finished or damaged: call vlmslim run again",
        "it asked only the first 2 questions of each task: run it without 'limit'",
        "none / count, none / text, random-64 / count and 6 more do not state their protocol",
        "it has no row of uniform and blind and downsample: add them to 'baselines'",
    ):
        assert said in " ".join(shown.stderr.split())


def test_lines_stand_in_one_table_if_they_answered_the_same(output, tmp_path):
    folder = tmp_path / "submissions"
    call("submit", output, "-o", folder / "first.json")
    other = load_config(write_config(tmp_path, baselines=list(BASELINES), methods=["fastv"]))
    run(other, harness=Stating())
    call("submit", other.output, "-o", folder / "second.json")
    longer = load_config(write_config(tmp_path, baselines=list(BASELINES), output=str(tmp_path / "longer")))
    run(longer, harness=Stating(questions=8))
    call("submit", longer.output, "-o", folder / "third.json")
    text = render_submissions.render(folder)
    parts = text.split("\n## ")[1:]
    assert ["divprune-64" in part and "fastv-64" in part for part in parts] == [True, False]
    assert "[third](../assets/submissions/third.json)" in parts[1]


def test_the_public_board_is_that_of_the_submissions():
    assert render_submissions.PAGE.read_text() == render_submissions.render(render_submissions.SUBMISSIONS)


# ---------------------------------------------------------------------- trackers


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_tables_and_figures(tmp_path, monkeypatch, name):
    calls = []
    tracker = SimpleNamespace(
        init=lambda **options: (
            calls.append(options) or SimpleNamespace(log=calls.append, finish=lambda: calls.append(0))
        ),
        Table=lambda dataframe: dataframe,
        __spec__=SimpleNamespace(),
    )
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setattr(harness, "Harness", FakeHarness())
    shown = call("run", write_config(tmp_path), "--log", name)
    assert shown.exit_code == 0, shown.output
    begun, sent, end = calls
    assert (begun["project"], begun["name"], begun["config"]["model"], end) == (PROJECT, "out", "tiny", 0)
    assert list(sent["rows"].label) == ["none", "random-64", "divprune-64", "random-16", "divprune-16"]
    figure = sent["average, % of unpatched against equivalent tokens"]
    points = {label: x for trace in figure.data[1:] for label, x in zip(trace.text, trace.x, strict=True)}
    assert points == {"none": 144, "random-64": 64, "divprune-64": 64, "random-16": 16, "divprune-16": 16}


def test_a_tracker_that_takes_nothing_is_said(output, monkeypatch):
    def init(**options):
        raise RuntimeError("no key\nlog in first")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    with pytest.raises(ConfigError, match="--log wandb: no key; the results are kept"):
        send(Leaderboard.read(output), "wandb", "mine")


def test_a_tracker_that_is_not_installed_is_said_before_the_run(tmp_path, monkeypatch):
    double = FakeHarness()
    monkeypatch.setattr(harness, "Harness", double)
    monkeypatch.setattr("vlmslim.leaderboard.trackers.find_spec", lambda name: None)
    shown = call("run", write_config(tmp_path), "--log", "trackio")
    assert shown.exit_code == 2 and 'pip install "vlmslim[trackio]"' in shown.stderr
    assert double.evaluated == []
