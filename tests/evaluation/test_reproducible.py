"""The same command gives the same answers, scores, intervals and p values; after an edit of a method it gives none."""

import json
import os
import subprocess
import sys

import pytest
import yaml
from method_files import NORM, write

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

CONFIG = {
    "model": {"pretrained": "bundled/tiny-llava", "device": "cpu"},
    "tasks": ["scenes_text", "scenes_choice"],
    "budgets": [16],
    "methods": ["divprune", "fastv"],
    "batch_size": 4,
    "limit": 8,
    "timing": None,  # times are measured, not computed
}


def command_line(path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "vlmslim.cli", "run", str(path)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(tmp_path):
    """Two processes, from the checkpoint to the leaderboard; every answer and every number."""
    outputs = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(CONFIG | {"output": str(tmp_path / name)}))
        done = command_line(path)
        assert done.returncode == 0, done.stderr
        assert "## Against the unpatched model" in done.stdout
        outputs.append(tmp_path / name)
    first, second = outputs
    labels = sorted(path.name for path in (first / "cells").iterdir())
    assert labels == ["blind", "divprune-16", "downsample-16", "fastv-16", "none", "random-16", "uniform-16"]
    for label in labels:
        for task in CONFIG["tasks"]:
            samples = [(folder / "cells" / label / f"{task}.jsonl").read_text() for folder in outputs]
            assert samples[0] == samples[1]
    boards = [json.loads((folder / "leaderboard.json").read_text()) for folder in outputs]
    for board in boards:
        assert [row.pop("selection_ms") is not None for row in board["rows"]] == [True] * len(labels)  # measured, too
    assert boards[0] == boards[1]


@pytest.mark.slow
def test_an_edited_method_is_refused_and_a_remark_is_not(tmp_path):
    """The loop that the author of a method lives in: run, edit, run again. Each call is a process of its own."""
    norm = tmp_path / "norm.py"
    changes = {
        "tasks": ["scenes_count"],
        "methods": [f"{write(norm)}:Norm", "drop_visual"],
        "baselines": False,
        "limit": 2,
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes | {"output": str(tmp_path / "out")}))
    first = command_line(path)
    assert first.returncode == 0 and "| norm-16" in first.stdout, first.stderr
    assert first.stdout == (tmp_path / "out" / "leaderboard.md").read_text()  # warnings go elsewhere
    assert "stage 1 (drop_visual, before layer 7) acted on 0 of 2 prompts" in first.stderr
    write(norm, NORM.replace("More follows.", "Much more follows."))
    again = command_line(path)
    assert again.returncode == 0 and "3 of 3 cells are finished" in again.stderr
    assert again.stdout == first.stdout
    write(norm, NORM.replace("argsort()", "argsort(descending=True)"))
    edited = command_line(path)
    assert edited.returncode == 2 and edited.stdout == ""
    assert "vlmslim: the method norm-16 changed in the middle of the run (norm.py): " in edited.stderr
