"""Data frames of a leaderboard, and their Parquet files."""

import json

import pandas as pd
import pytest
from boards import RIGHT, interrupted
from evaluation_doubles import rewrite, write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.leaderboard.board import Leaderboard


@pytest.fixture(scope="module")
def frames(board):
    return board.to_frames()


def test_one_line_for_each_row(board, frames):
    assert list(frames.rows.label) == [row.label for row in board.rows]
    line = frames.rows.set_index("label").loc["divprune-64"]
    assert json.loads(line.stages) == [{"method": "divprune", "keep": 64}]
    assert (line.budget, line.kept, line.relative, line["groups:general"]) == ("64", 64.0, 0.875, 0.875)
    assert line["provenance:config_hash"] == board.facts["config_hashes"][0]


def test_one_line_for_each_cell(frames):
    found = frames.cells.set_index(["label", "task"])
    assert len(found) == 2 * len(RIGHT)
    for label, right in RIGHT.items():
        assert [found.value[label, task] for task in ("count", "text")] == [n / 4 for n in right]
    assert found.lost["fastv-16", "count"] == 0.5 and pd.isna(found.lost["none", "count"])


def test_one_line_for_each_answer(frames):
    assert len(frames.samples) == 2 * 4 * len(RIGHT)
    sums = frames.samples.groupby(["label", "task"]).score.sum()
    assert {label: (sums[label, "count"], sums[label, "text"]) for label in RIGHT} == RIGHT
    first = frames.samples.iloc[0]
    assert (first.prompt, first.target, first.answer, first.picture) == ("count 0?", "yes", "yes", "question 0")


def test_one_line_for_each_pair(board, frames):
    assert len(frames.pairs) == len(board.comparison.pairs)
    assert frames.pairs.p_adjusted.between(0, 1).all()


def test_parquet_files_hold_the_frames(frames, tmp_path):
    for path, frame in zip(frames.write(tmp_path), frames, strict=True):
        pd.testing.assert_frame_equal(pd.read_parquet(path), frame, check_dtype=False)


def test_an_unfinished_run_has_frames(tmp_path):
    frames = interrupted(load_config(write_config(tmp_path)), ("random-64", "count")).to_frames()
    assert len(frames.cells) == 1 and len(frames.samples) == 4
    assert frames.pairs.empty and "p_adjusted" in frames.pairs


def test_a_board_without_a_directory_has_no_samples(board):
    by_hand = Leaderboard(board.rows, board.tasks, board.metrics, board.facts)
    with pytest.raises(ConfigError, match="was not read from the directory of a run"):
        by_hand.to_frames()


def test_samples_that_changed_since_are_refused(finished):
    board = Leaderboard.read(finished.directory)
    rewrite(finished, "none", "count")
    board.to_frames()  # the same cell again
    (finished.directory / "cells/none/count.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match="samples of count in .* have changed"):
        board.to_frames()
