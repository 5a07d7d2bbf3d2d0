"""A leaderboard as pandas data frames, and as Parquet files."""

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pandas as pd

from vlmslim.io.files import atomically
from vlmslim.leaderboard.comparison import Pair
from vlmslim.leaderboard.render import record

if TYPE_CHECKING:
    from vlmslim.leaderboard.board import Leaderboard


class Frames(NamedTuple):
    """Data frames of a leaderboard, with one line for each row, cell, answer or pair.

    rows    : label, budget, stages, the average and its interval, rank, cost, times, provenance
    cells   : label, task, metric, and the score with its interval, the questions lost and won, the loyalty
    samples : task, question, picture, prompt, target, and each label's answer and score
    pairs   : first and second label, task (missing for the average), their difference with its interval and p values
    """

    rows: pd.DataFrame
    cells: pd.DataFrame
    samples: pd.DataFrame
    pairs: pd.DataFrame

    def write(self, directory: Path) -> list[Path]:
        """Write each frame to a Parquet file of its name, and return the files."""
        paths = [directory / f"{name}.parquet" for name in self._fields]
        for frame, path in zip(self, paths, strict=True):
            with atomically(path) as part:
                frame.to_parquet(part, index=False)
        return paths


def to_frames(board: "Leaderboard") -> Frames:
    """Make data frames of a leaderboard; `Leaderboard.to_frames` is the same."""
    data = record(board)
    stability = {(one["label"], one["task"]): one for one in data["stability"]}
    cells = [
        {"label": row["label"], "task": task, "metric": data["tasks"][task]["metric"], **score}
        | stability.get((row["label"], task), {})
        for row in data["rows"]
        for task, score in row["scores"].items()
    ]
    samples = [
        {
            "task": asked.task,
            "question": asked.ids[i],
            "picture": asked.pictures[i],
            "prompt": asked.prompts[i],
            "target": asked.targets[i],
            "label": label,
            "answer": answers[i],
            "score": asked.scores[label][i],
        }
        for asked in board.questions()
        for label, answers in asked.answers.items()
        for i in range(len(asked.ids))
    ]
    rows = [_line({name: value for name, value in row.items() if name != "scores"}) for row in data["rows"]]
    pairs = pd.DataFrame(data["pairs"], columns=[field.name for field in fields(Pair)])  # there may be none
    return Frames(pd.DataFrame(rows), pd.DataFrame(cells), pd.DataFrame(samples), pairs)


def _line(row: dict) -> dict:
    """Give every number and text of a row a column of its own; lists and options become JSON."""
    line: dict[str, object] = {}
    for name, value in row.items():
        if name in ("groups", "provenance"):
            line |= {f"{name}:{part}": one for part, one in value.items()}
        else:
            line[name] = json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value
    line["budget"] = None if row["budget"] is None else str(line["budget"])
    return line
