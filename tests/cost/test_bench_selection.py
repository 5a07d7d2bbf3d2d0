"""`scripts/bench_selection.py`: it compares equal picks, names missed targets, and its page is that of its record."""

import json
from pathlib import Path

import bench_selection as bench
import pytest
import torch

RECORD = Path(__file__).parents[2] / "assets" / "bench" / "selection_cpu.json"


def test_every_search_is_timed_beside_its_product_and_the_loop():
    rows = bench.time_searches(40, 7, 16, "cpu", repeats=2)
    assert [row["name"] for row in rows] == ["max-min", "max-sum", "relevance", "determinant", "coverage"]
    assert all(row[f"{part}_ms"] > 0 for row in rows for part in ("product", "whole", "search", "loop"))


def test_other_picks_are_seen(monkeypatch):
    monkeypatch.setattr(bench, "greedy", lambda rule, k, first: torch.arange(k)[None])
    with pytest.raises(RuntimeError, match="differ in"):
        bench.time_searches(40, 7, 16, "cpu", repeats=1)


def test_targets_are_met_or_missed():
    row = {"name": "max-min", "n": 576, "k": 64, "over_product": 1.2, "search_ms": 0.2, "batch_over_one": 2.5}
    assert [line.rpartition(" ")[2] for line in bench.targets([row], "cpu")] == ["MISSED"]
    assert [line.rpartition(" ")[2] for line in bench.targets([row], "cuda")] == ["met", "MISSED"]


def test_the_committed_page_is_that_of_its_record():
    record = json.loads(RECORD.read_text())
    assert RECORD.with_suffix(".md").read_text() == bench.markdown(record)
    assert {(row["n"], row["k"]) for row in record["searches"]} == set(bench.SIZES)
    assert not [line for line in bench.targets(record["searches"], "cpu") if line.endswith("MISSED")]
