"""`vlmslim submit`: a run as one file for the public board, with the hashes and receipts of all its cells."""

import json
from pathlib import Path

from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.store import Store, digest, reading
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.notes import BASELINES, protocol
from vlmslim.leaderboard.render import record

FORMAT = 1  # of the file; a change that older readers would misread raises it


def submission(directory: Path | str) -> dict:
    """Check a run, and return what its file holds, ready for JSON.

    Returns:
        `board`: the leaderboard with all facts; `protocol`: in one line; `cells`: for each cell its hash, the hash of
        its samples and its receipt; `sha256`: the hash of all this.

    Raises:
        ConfigError: the run is not complete, a cell is damaged, asked only a part of its questions, does not state
            its protocol or has no baselines; the message lists all of these.
    """
    board, store = Leaderboard.read(directory), Store(directory)
    with reading(directory):
        places = [(row.label, task) for row in board.rows for task in board.tasks]
        cells = {place: cell for place in places if (cell := store.cell(*place)) is not None}
        if problems := _problems(board, store, cells):
            raise ConfigError(f"{directory} cannot be submitted: " + "; ".join(problems))
        content = {
            "format": FORMAT,
            "board": record(board),
            "protocol": protocol(board),
            "cells": [
                {
                    "label": label,
                    "task": task,
                    "sha256": digest(cell),
                    "samples_sha256": cell["samples_sha256"],
                    "questions": cell["questions"],
                    "receipt": cell["receipt"],
                }
                for (label, task), cell in cells.items()
            ],
        }
    content = json.loads(json.dumps(content, default=str))  # as a reader of the file will hash it
    return {**content, "sha256": digest(content)}


def _problems(board: Leaderboard, store: Store, cells: dict[tuple[str, str], dict]) -> list[str]:
    """List what keeps a run off the public board, and what to do about it."""
    run = store.run
    assert run is not None  # the leaderboard was read from it
    planned = [(row["label"], task["task"]) for row in run["config"]["rows"] for task in run["config"]["tasks"]]
    missing = [f"{label} / {task}" for label, task in planned if (label, task) not in cells]
    unstated = [f"{label} / {task}" for (label, task), cell in cells.items() if not cell.get("protocol")]
    used = {stage["method"] for row in board.rows for stage in row.stages}
    problems = []
    if missing:
        problems.append(f"{_some(missing)} not finished or damaged: call vlmslim run again")
    if board.facts["limit"] is not None:
        problems.append(
            f"it asked only the first {board.facts['limit']} questions of each task: run it without 'limit'"
        )
    if unstated:
        problems.append(f"{_some(unstated)} do not state their protocol, as of an older vlmslim: evaluate them again")
    if absent := [name for name in BASELINES if name not in used]:
        problems.append(f"it has no row of {' and '.join(absent)}: add them to 'baselines'")
    return problems


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_submission(file: Path) -> dict:
    """Read the file of a submission.

    Raises:
        ConfigError: the file is no submission, or was changed after `vlmslim submit` wrote it.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        seal = content.pop("sha256")
    except (OSError, ValueError, RecursionError, AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is no submission; vlmslim submit writes them") from error
    if seal != digest(content):
        raise ConfigError(f"{file} was changed after it was written; write it again with vlmslim submit")
    if content["format"] != FORMAT:
        raise ConfigError(f"{file} has format {content['format']}, and this vlmslim reads {FORMAT}")
    return {**content, "sha256": seal}
