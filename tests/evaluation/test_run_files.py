"""Files of a run: damaged, moved, foreign, locked; `vlmslim run` on a stand-in for lmms-eval."""

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml
from evaluation_doubles import FakeHarness, rewrite

from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.io.files import write_atomically


@pytest.mark.parametrize("damage", ["cut", "changed", "samples cut", "samples gone", "empty", "not text"])
def test_damaged_cells_are_done_again(config, damage):
    before = run(config(), harness=FakeHarness())
    path = config().output / "cells" / "random-16" / "text.json"
    samples = path.with_suffix(".jsonl")
    match damage:
        case "cut":
            path.write_text(path.read_text()[:-40])
        case "changed":
            path.write_text(path.read_text().replace('"images": 4', '"images": 5'))
        case "samples cut":
            samples.write_text(samples.read_text()[:-10])
        case "samples gone":
            samples.unlink()
        case "empty":
            path.write_text("")
        case "not text":
            path.write_bytes(b"\xff\xfe\x00")
    harness = FakeHarness()
    assert run(config(), harness=harness) == before
    assert harness.evaluated == [("random-16", "text")]


def test_no_file_is_ever_half_written(config, monkeypatch):
    run(config(), harness=FakeHarness())
    path = config().output / "run.json"
    before = path.read_text()

    def crash(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert path.read_text() == before
    assert not list(path.parent.glob(".*.part"))


@pytest.mark.parametrize("place", ["file", "file/in/it"])
def test_an_output_that_cannot_be_written(config, tmp_path, place):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="output: .* cannot be written to"):
        run(config(output=str(tmp_path / place)), harness=FakeHarness())


def test_a_run_without_a_cell_does_not_lock_its_directory(config):
    with pytest.raises(KeyboardInterrupt):
        run(config(seed=1), harness=FakeHarness(fail_at=("none", "count"), failure=KeyboardInterrupt()))
    run(config(), harness=FakeHarness())
    assert Store(config().output).run["shared"]["seed"] == 0
    with pytest.raises(ConfigError, match="seed: 0 there, 1 now"):
        run(config(seed=1), harness=FakeHarness())


def test_two_runs_do_not_write_to_one_directory(config):
    config().output.mkdir(parents=True)
    hold = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print(flush=True); input()"
    command = [sys.executable, "-c", hold, str(config().output / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()  # it holds the lock now
        with pytest.raises(ConfigError, match="another run is writing"):
            run(config(), harness=FakeHarness())
        other.communicate(b"\n")


def test_what_a_cell_records(config):
    run(config(), harness=FakeHarness())
    cell = Store(config().output).cell("divprune-16", "text")
    assert cell["stages"] == [{"method": "divprune", "keep": 16}]
    assert cell["seed"] == 0
    assert {"vlmslim", "torch", "transformers", "pillow", "lmms_eval"} <= cell["versions"].keys()
    assert cell["hardware"] and cell["config_hash"] and cell["seconds"] >= 0
    assert "git_commit" in cell
    assert cell["receipt"]["kept"] == 16
    assert len(Store(config().output).samples("divprune-16", "text")) == 4


def test_fresh_spares_other_files(config):
    config().output.mkdir(parents=True)
    (config().output / "notes.txt").write_text("mine")
    run(config(), fresh=True, harness=FakeHarness())
    assert (config().output / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "leaderboard.md", "timing.json", "cells/mine/notes.json"])
@pytest.mark.parametrize("fresh", [True, False])
def test_files_that_no_run_wrote_are_not_replaced(name, fresh, config):
    file = config().output / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(ConfigError, match=f"holds {name}, and nothing there says that vlmslim wrote it"):
        run(config(), fresh=fresh, harness=FakeHarness())
    assert file.read_text() == "mine"


def test_fresh_spares_files_between_the_cells(config):
    run(config(), harness=FakeHarness())
    mine = [config().output / "cells" / "none" / name for name in ("notes.txt", "notes.json")]
    for file in mine:
        file.write_text("mine")
    run(config(), fresh=True, harness=(harness := FakeHarness()))
    assert all(file.read_text() == "mine" for file in mine) and harness.evaluated


def test_a_cell_that_was_moved_is_done_again(config):
    run(config(), harness=FakeHarness())
    cells = config().output / "cells"
    for suffix in (".json", ".jsonl"):
        shutil.copy(cells / "none" / f"text{suffix}", cells / "divprune-16" / f"text{suffix}")
    run(config(), harness=(harness := FakeHarness()))
    assert harness.evaluated == [("divprune-16", "text")]


def test_a_fresh_run_leaves_no_old_leaderboard_behind(config):
    run(config(), harness=FakeHarness())
    with pytest.raises(KeyboardInterrupt):
        run(config(), fresh=True, harness=FakeHarness(fail_at=("none", "text"), failure=KeyboardInterrupt()))
    assert not list(config().output.glob("leaderboard.*"))


def test_cells_without_a_run_are_not_trusted(config):
    run(config(), harness=FakeHarness())
    (config().output / "run.json").unlink()
    with pytest.raises(ConfigError, match="no readable run.json"):
        run(config(), harness=FakeHarness())


def test_the_files_of_a_run_are_plain_json_and_yaml(config):
    run(config(), harness=FakeHarness())
    written = config().output
    assert json.loads((written / "leaderboard.json").read_text())["facts"]["model"] == "tiny"
    assert SimpleNamespace(**json.loads((written / "cells/none/text.json").read_text())).task == "text"
    assert not yaml.safe_load((written / "leaderboard.json").read_text())["facts"]["limit"]


def test_a_cell_of_another_run_is_told_from_a_changed_method(config):
    run(config(), harness=FakeHarness())
    rewrite(Store(config().output), "random-16", "text", config_hash="0" * 64)
    with pytest.raises(ConfigError, match="cell random-16 / text of another run .configuration 000000000000, now "):
        run(config(), harness=FakeHarness())
