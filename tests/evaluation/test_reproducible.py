"""The same command gives the same answers, scores, intervals and p values."""

import json
import os
import subprocess
import sys

import pytest
import yaml

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


@pytest.mark.slow
def test_two_runs_give_the_same_bytes(tmp_path):
    """Two processes, from the checkpoint to the leaderboard; every answer and every number."""
    outputs = []
    for name in ("first", "second"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(CONFIG | {"output": str(tmp_path / name)}))
        command = [sys.executable, "-m", "vlmslim.cli", "run", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr
        assert "## Against the unpatched model" in done.stdout
        outputs.append(tmp_path / name)
    first, second = outputs
    labels = sorted(path.name for path in (first / "cells").iterdir())
    assert labels == ["divprune-16", "fastv-16", "none", "random-16", "uniform-16"]
    for label in labels:
        for task in CONFIG["tasks"]:
            samples = [(folder / "cells" / label / f"{task}.jsonl").read_text() for folder in outputs]
            assert samples[0] == samples[1]
    boards = [json.loads((folder / "leaderboard.json").read_text()) for folder in outputs]
    for board in boards:
        assert [row.pop("selection_ms") is not None for row in board["rows"]] == [True] * len(labels)  # measured, too
    assert boards[0] == boards[1]
