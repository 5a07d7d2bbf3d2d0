"""The command line: fast help, clear errors, exit statuses, and what goes to stdout."""

import errno
import os
import signal
import subprocess
import sys

import pytest
import yaml
from evaluation_doubles import FakeHarness, write_config
from method_files import write
from typer.testing import CliRunner

from vlmslim.cli import app
from vlmslim.evaluation import harness
from vlmslim.registry import method_names


def call(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def fake(monkeypatch):
    """Puts the stand-in where the real harness is."""

    def put(**behaviour):
        double = FakeHarness(**behaviour)
        monkeypatch.setattr(harness, "Harness", double)
        return double

    return put


def test_help_needs_no_heavy_library():
    code = (
        "import sys; from typer.testing import CliRunner; from vlmslim.cli import app;"
        "r = CliRunner().invoke(app, ['run', '--help']); assert r.exit_code == 0 and '--export' in r.output, r.output;"
        "print([m for m in ('torch', 'transformers', 'lmms_eval', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_methods_lists_all(built_in):
    built_in("norm.py")
    built_in("broken.py", "import [nowhere]")
    shown = call("methods")
    assert shown.exit_code == 0
    lines = {line.split()[0]: line for line in shown.stdout.splitlines() if line[0] != " "}
    assert set(lines) == {"method", *method_names()}
    for text in ("between decoder layers", "arXiv 2403.06764", "Before decoder layer K", "built-in"):
        assert text in lines["fastv"]
    assert "Keep the tokens with the largest norm.  " in lines["norm"]
    assert "broken " in lines["broken"] and "the method broken cannot be imported: SyntaxError" in lines["broken"]


def test_methods_describes_one(tmp_path):
    shown = call("methods", "fastv")
    assert shown.exit_code == 0
    assert shown.stdout.startswith("FastV:") and "section 4.1" in shown.stdout
    assert shown.stdout.endswith("options:\n  keep  (must be given)\n  layer = 2\n")
    file = write(tmp_path / "norm.py")
    assert "options:\n  keep = 16\n" in call("methods", file).stdout
    for name, message in (("fastw", "Did you mean 'fastv'"), (f"{file}:Nrm", "has no class Nrm. Did you mean 'Norm'")):
        shown = call("methods", name)
        assert shown.exit_code == 2 and shown.stderr.startswith("vlmslim: ") and message in shown.stderr


def test_run_prints_the_leaderboard_and_only_that(tmp_path, fake):
    fake()
    path = write_config(tmp_path)
    shown = call("run", path)
    assert shown.exit_code == 0, shown.output
    assert shown.stdout == (tmp_path / "out" / "leaderboard.md").read_text()
    for format in ("md", "csv", "json"):
        again = call("leaderboard", tmp_path / "out", "--format", format)
        assert again.exit_code == 0
        assert again.stdout == (tmp_path / "out" / f"leaderboard.{format}").read_text()


def test_the_receipt_of_a_row(tmp_path, fake):
    fake()
    shown = call("run", write_config(tmp_path))
    assert f"vlmslim receipt {tmp_path / 'out'} LABEL" in shown.stderr
    assert len(call("receipt", tmp_path / "out").stdout.splitlines()) == 10
    one = call("receipt", tmp_path / "out", "divprune-64")
    assert one.exit_code == 0 and [line.split(":")[0] for line in one.stdout.splitlines()] == [
        "divprune-64, count",
        "divprune-64, text",
    ]
    assert "144.0 -> 64.0 visual tokens" in one.stdout
    wrong = call("receipt", tmp_path / "out", "divprun-64")
    assert wrong.exit_code == 2 and "no finished row 'divprun-64'. Did you mean 'divprune-64'?" in wrong.stderr


def test_options_replace_the_file(tmp_path, fake):
    fake()
    assert call("run", write_config(tmp_path), "--limit", 2, "--output", tmp_path / "other").exit_code == 0
    assert "first 2 questions" in (tmp_path / "other" / "leaderboard.md").read_text()
    assert not (tmp_path / "out").exists()


def test_a_changed_config_is_refused_and_fresh_starts_over(tmp_path, fake):
    path = write_config(tmp_path)
    fake()
    call("run", path)
    refused = call("run", path, "--limit", 2)
    assert refused.exit_code == 2
    assert "limit: None there, 2 now" in refused.stderr and refused.stdout == ""
    assert call("run", path, "--limit", 2, "--fresh").exit_code == 0


def test_a_failing_cell_ends_with_status_1(tmp_path, fake):
    fake(fail_at=("random-16", "text"), failure=RuntimeError("out of memory"))
    shown = call("run", write_config(tmp_path))
    assert shown.exit_code == 1
    assert "random-16 on text failed: RuntimeError: out of memory" in shown.stderr
    assert "Finished cells are kept" in shown.stderr


def test_an_interruption_says_how_to_go_on(tmp_path, fake):
    fake(fail_at=("random-16", "text"), failure=KeyboardInterrupt())
    shown = call("run", write_config(tmp_path))
    assert shown.exit_code == 130
    assert "the same command goes on" in shown.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)])
def test_a_signal_ends_a_run_in_one_line(number, status, tmp_path, fake, monkeypatch):
    double = fake()
    handler = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    inherited = signal.signal(number, handler)  # a test run in the background inherits that SIGINT is ignored
    monkeypatch.setattr(double, "evaluate", lambda *_: os.kill(os.getpid(), number))
    try:
        shown = call("run", write_config(tmp_path))
        restored = signal.getsignal(number)
    finally:
        signal.signal(number, inherited)
    assert shown.exit_code == status
    word = "interrupted" if number == signal.SIGINT else f"stopped by {number.name}"
    assert shown.stderr.splitlines()[-1] == f"vlmslim: {word}; the same command goes on where it stopped"
    assert restored == handler


def test_a_full_disk_is_one_line_and_the_details_are_in_the_log(tmp_path, fake, monkeypatch):
    fake()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vlmslim.evaluation.store.Store.save_cell", full)
    shown = call("run", write_config(tmp_path))
    assert shown.exit_code == 1
    assert "No space left on device" in shown.stderr and "Traceback" not in shown.stderr
    assert "Traceback" in (tmp_path / "out" / "run.log").read_text()


@pytest.mark.parametrize("error", [RuntimeError("first\nsecond"), KeyError("key"), AssertionError(), MemoryError()])
@pytest.mark.parametrize(
    ("command", "broken"),
    [
        (["doctor", "bundled/tiny-llava"], "vlmslim.loading.load"),
        (["bench", "bundled/tiny-llava"], "vlmslim.cost.bench.arguments.load_model"),
        (["leaderboard", "x"], "vlmslim.leaderboard.board.Leaderboard.read"),
        (["methods"], "vlmslim.registry.listings"),
        (["run", "x.yaml"], "vlmslim.evaluation.config.load_config"),
    ],
)
def test_an_unexpected_error_is_one_line_and_its_place_is_shown_on_request(command, broken, error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr(broken, fails)
    shown = call(*command)
    name, first = type(error).__name__, str(error).partition("\n")[0]
    (line,) = shown.stderr.strip().splitlines()
    assert shown.exit_code == 1 and shown.stdout == ""
    assert line.startswith(f"vlmslim: {name}: {first or name}")
    assert line.endswith(f"; vlmslim --traceback {command[0]} ... shows where")
    shown = call("--traceback", *command)
    assert shown.exit_code == 1 and "Traceback" in shown.stderr and ", in fails" in shown.stderr


def test_the_place_of_a_mistake_is_shown_on_request():
    for flag in ([], ["--traceback"]):
        shown = call(*flag, "doctor", "bundled/nothing")
        assert shown.exit_code == 2 and ("Traceback" in shown.stderr) == bool(flag)
        assert "no bundled checkpoint" in shown.stderr.splitlines()[-1]
    assert call("--traceback", "run", "--nonsense").exit_code == 2


@pytest.mark.parametrize("size", ["abc", "2", "-1"])
def test_a_world_of_several_processes_is_refused(size, tmp_path, fake, monkeypatch):
    fake()
    monkeypatch.setenv("WORLD_SIZE", size)
    shown = call("run", write_config(tmp_path))
    assert shown.exit_code == 2 and f"WORLD_SIZE is '{size}' here: unset it" in shown.stderr


def test_mistakes_end_with_status_2(tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(yaml.safe_dump({"model": {"pretraned": "x"}}))
    shown = call("run", path)
    assert shown.exit_code == 2
    assert "Did you mean 'pretrained'?" in shown.stderr
    assert call("run", tmp_path / "none.yaml").exit_code == 2
    assert "no readable run.json" in call("leaderboard", tmp_path).stderr
    assert call("leaderboard", tmp_path, "--format", "xlsx").exit_code == 2


@pytest.mark.parametrize(
    "pretrained, message",
    [
        ("bundled/tiny-lava", "no bundled checkpoint 'bundled/tiny-lava'; there are: bundled/tiny-"),
        ("/nonexist/x", "the path /nonexist/x does not exist"),
        ("{here}", "the folder {here} holds no model: there is no config.json in it"),
        ("{here}/config.yaml", "{here}/config.yaml is a file; give the folder of a checkpoint"),
    ],
)
def test_checkpoints_that_are_not_there(tmp_path, pretrained, message):
    path = write_config(tmp_path, tasks=["scenes_count"], model={"pretrained": pretrained.format(here=tmp_path)})
    shown = call("run", path)
    assert shown.exit_code == 2
    assert f"vlmslim: model.pretrained: {message.format(here=tmp_path)}" in shown.stderr


def test_places_that_cannot_be_written(tmp_path):
    path = write_config(tmp_path, tasks=["scenes_count"])
    for option in ("--output", "--export"):
        shown = call("run", path, option, path)
        assert shown.exit_code == 2
        assert shown.stderr.endswith("config.yaml cannot be written to: File exists\n")
    shown = call("run", tmp_path)
    assert shown.exit_code == 2 and "is a directory" in shown.stderr
    shown = call("leaderboard", path)
    assert shown.exit_code == 2 and "is a file; give the output directory" in shown.stderr


def test_export_runs_nothing(tmp_path):
    path = write_config(tmp_path, tasks=["scenes_count", "scenes_choice"], model={"pretrained": "bundled/tiny-llava"})
    shown = call("run", path, "--export", tmp_path / "plain", "--limit", 3)
    assert shown.exit_code == 0, shown.output
    files = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert len(files) == 10 and "divprune-16__scenes_choice.yaml" in files
    plain = yaml.safe_load((tmp_path / "plain" / "divprune-16__scenes_choice.yaml").read_text())
    assert plain["model_args"] == "pretrained=bundled/tiny-llava,method=divprune,keep=16"
    assert plain["limit"] == 3
    assert not (tmp_path / "out").exists()
