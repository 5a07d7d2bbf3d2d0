"""`scripts/analysis/bench_selection.py`: every core function agrees with its formula, and a wrong one would be seen."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

import bench_selection as bench  # noqa: E402

RECORD = Path(__file__).parents[2] / "assets" / "bench" / "selection_cpu.json"


def test_every_core_function_agrees_with_its_formula(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_selection.py", "--quick", "--output", str(tmp_path / "out")])
    assert bench.main() == 0, capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert {r["n"] for r in record["results"]} == {60}
    assert {r["k"] for r in record["results"]} == {0, 20, 7}
    assert all(r["agrees"] and r["ours_ms"] > 0 and r["plain_ms"] > 0 for r in record["results"])
    assert record["hardware"] and record["versions"]["torch"] == torch.__version__.split("+")[0]
    text = (tmp_path / "out.md").read_text()
    assert all(r["name"] in text for r in record["results"])


def test_a_wrong_result_is_seen(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "farthest_points", lambda x, k: torch.arange(k))
    line = ["bench_selection.py", "--quick", "--only", "max-min", "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", line)
    assert bench.main() == 1
    assert "no: " in capsys.readouterr().out
    assert not any(r["agrees"] for r in json.loads((tmp_path / "out.json").read_text())["results"])


@pytest.mark.parametrize(
    "ours, plain, difference",
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, -float("inf")], [1.0, -float("inf")], 0.0),
        ([1.0, 2.0], [1.0, 4.0], 0.5),
        ([1, 2], [1, 3], 0.5),
        ([True, False], [True, False], 0.0),
        ([1, 2, 3], [1, 2], float("inf")),
    ],
)
def test_difference(ours, plain, difference):
    assert bench.compare(torch.tensor(ours), torch.tensor(plain)) == difference


def test_the_committed_figures_are_the_scripts():
    """The page in assets/bench is what the script makes of the record beside it, and names every case."""
    record = json.loads(RECORD.read_text())
    assert RECORD.with_suffix(".md").read_text() == bench.markdown(record)
    assert {(r["n"], r["k"]) for r in record["results"] if r["k"]} == {
        (n, k) for n, budgets in bench.BUDGETS.items() for k in budgets
    }
    assert all(r["agrees"] for r in record["results"])
