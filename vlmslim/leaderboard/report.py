"""The leaderboard as a page that can be clicked: one folder, or one file, without a server and without a network.

report/index.html          the tables, the chart, the questions and the notes
report/report.{css,js}     how they look and what they do
report/chart.js            how the chart is drawn
report/data/*.js           rows and axes; the questions of each task; each question with recorded tokens; Plotly, packed
"""

import base64
import json
import zlib
from collections.abc import Iterator
from functools import cache
from importlib.resources import files
from itertools import groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.store import Store
from vlmslim.io.files import write_atomically
from vlmslim.leaderboard.axes import Axis, cost_axes, front, quality_axes
from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.notes import protocol
from vlmslim.leaderboard.published import Published
from vlmslim.leaderboard.questions import Questions
from vlmslim.leaderboard.render import FORMATS, render, with_published
from vlmslim.leaderboard.tables import Column, Table

BASELINES = ("random", "uniform", "pool", "downsample", "blind")  # drawn as open circles

_SCRIPTS = ("chart.js", "report.js")
_TEMPLATES = files("vlmslim.leaderboard") / "templates"


def write_all(board: Leaderboard, directory: Path) -> None:
    """Write the leaderboard into the output directory of its run: every format of text, and the page as a folder."""
    for format in FORMATS:
        write_atomically(directory / f"leaderboard.{format}", render(board, format))
    write_folder(board, directory / "report")


def write_folder(board: Leaderboard, folder: Path, published: Published | None = None) -> Path:
    """Write the page as a folder, and return its index.html.

    Raises:
        ConfigError: the folder holds other files; or as `Leaderboard.questions`.
        ModuleNotFoundError: plotly or jinja2 is not installed.
    """
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "report.js").exists():
        raise ConfigError(f"{folder} holds other files; give a new folder, or an empty one")
    for old in folder.glob("data/*.js"):  # of tasks and questions that may be gone
        old.unlink()
    for name, data in _parts(board):
        script = f"(window.parts ??= {{}})[{json.dumps(name)}] = {json.dumps(data, ensure_ascii=False)};\n"
        write_atomically(folder / "data" / f"{name}.js", script)
    for name in ("report.css", *_SCRIPTS):
        write_atomically(folder / name, (_TEMPLATES / name).read_text(encoding="utf-8"))
    write_atomically(folder / "index.html", _page(board, published))
    return folder / "index.html"


def write_single(board: Leaderboard, file: Path, published: Published | None = None) -> Path:
    """Write the page as one file, with everything inside, and return the file.

    Raises:
        ConfigError, ModuleNotFoundError: as `write_folder`.
    """
    from markupsafe import Markup

    css, *scripts = (Markup((_TEMPLATES / name).read_text(encoding="utf-8")) for name in ("report.css", *_SCRIPTS))
    parts = [{"name": name, "data": data} for name, data in _parts(board)]
    write_atomically(file, _page(board, published, parts=parts, css=css, scripts=scripts))
    return file


@cache
def _plotly() -> str:
    """Return the library that the plotly package brings: compressed, because it is most of the page, and in base64."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(zlib.compress(get_plotlyjs().encode())).decode()


def _page(board: Leaderboard, published: Published | None, **inside: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmslim.leaderboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    built, remarks = with_published(board, published)
    told = protocol(board)
    page = environment.get_template("report.html").render(
        title=board.facts["model"],
        protocol=told,
        tables=[_table(board, number, table) for number, table in enumerate(built)],
        budgets=_budgets(board),
        notes=[note for note in remarks if note != told],
        single=bool(inside),
        **inside,
    )
    return page + "\n"


def _table(board: Leaderboard, number: int, table: Table) -> dict:
    """Lay out a table: its lines, in blocks of one budget, with a link from a score to its questions."""

    def cell(column: Column, line: int) -> dict:
        row = table.rows[line]
        link = ""
        if column.task is not None and column.task in row.scores and board.directory is not None:
            link = "#" + urlencode({"task": column.task, "row": row.label, "against": UNPATCHED, "outcome": "lost"})
        return {"text": column.texts[line], "medal": column.medals.get(row.label, 0), "link": link}

    blocks = [
        [
            {
                "label": table.rows[line].label,
                "budget": table.rows[line].budget_name,
                "cells": [cell(column, line) for column in table.columns],
            }
            for line in block
        ]
        for block in table.blocks()
    ]
    names = [column.name for column in table.columns]
    return {"id": f"table-{number}", "title": table.title, "names": names, "blocks": blocks}


def _budgets(board: Leaderboard) -> list[str]:
    return list(dict.fromkeys(row.budget_name for row in board.rows))


# ---------------------------------------------------------------------- data


def _parts(board: Leaderboard) -> Iterator[tuple[str, Any]]:
    """Yield the data of the page, part by part, ready for JSON."""
    yield "plotly", _plotly()
    yield "board", _board(board)
    if board.directory is None:
        return
    store = Store(board.directory)
    for number, questions in enumerate(board.questions()):
        hashes = {label: store.samples_hash(label, questions.task) for label in questions.answers}
        drawn = []
        for question in store.questions_with_tokens(questions.task):
            recorded = store.tokens(questions.task, question)
            if recorded is not None and question in questions.ids:
                position = questions.ids.index(question)
                yield f"tokens-{number}-{position}", _tokens(board, recorded, hashes)
                drawn.append(position)
        yield f"questions-{number}", _questions(board, questions, drawn)


def _board(board: Leaderboard) -> dict:
    costs, qualities = cost_axes(board), quality_axes(board)
    fronts = [[[i for i, best in enumerate(front(cost, one)) if best] for one in qualities] for cost in costs]
    return {
        "unpatched": UNPATCHED,
        "hasQuestions": board.directory is not None,
        "rows": [
            {
                "label": row.label,
                "budget": row.budget_name,
                "unpatched": row.label == UNPATCHED,
                "baseline": bool(row.stages) and all(stage["method"] in BASELINES for stage in row.stages),
            }
            for row in board.rows
        ],
        "budgets": _budgets(board),
        "tasks": [_task(board, task) for task in board.tasks],
        "costs": [
            {"name": axis.name, "values": [None if value is None else value.value for value in axis.values]}
            for axis in costs
        ],
        "qualities": [{"name": axis.name, "values": _with_ends(axis)} for axis in qualities],
        "fronts": fronts,
    }


def _with_ends(axis: Axis) -> list[list[float | None] | None]:
    return [None if value is None else [value.value, value.low, value.high] for value in axis.values]


def _task(board: Leaderboard, task: str) -> dict:
    metric, higher_is_better = board.metrics[task]
    return {"name": task, "metric": metric, "sign": 1 if higher_is_better else -1}


def _questions(board: Leaderboard, questions: Questions, drawn: list[int]) -> dict:
    """Arrange the questions of a task. Rows often give the same answer, so each answer stands there once."""
    options = [list(dict.fromkeys(given)) for given in zip(*questions.answers.values(), strict=True)]
    place = [{text: i for i, text in enumerate(texts)} for texts in options]
    scores = [score for own in questions.scores.values() for score in own if score is not None]
    return {
        "ids": questions.ids,
        "prompts": questions.prompts,
        "targets": questions.targets,
        "pictures": questions.pictures,
        "options": options,
        "given": [
            None if given is None else [place[i][text] for i, text in enumerate(given)]
            for given in (questions.answers.get(row.label) for row in board.rows)
        ],
        "scores": [questions.scores.get(row.label) for row in board.rows],
        "half": max([1.0, *scores]) / 2,
        "drawn": drawn,
    }


def _tokens(board: Leaderboard, recorded: dict, hashes: dict[str, str | None]) -> dict:
    """Arrange what was recorded of a question; a row that was evaluated again since has nothing to show."""

    def row(label: str) -> dict | None:
        own = recorded["rows"].get(label)
        if own is None or recorded["samples_sha256"].get(label) != hashes.get(label, ""):
            return None
        return {"images": own["images"], "receipt": _receipt(own["prefill"]), "ledger": _ledger(own["flops"])}

    return {"images": recorded["images"], "rows": [row(one.label) for one in board.rows]}


def _receipt(prefill: dict) -> list[tuple[str, str]]:
    """Tell what a prefill of one prompt did, as pairs of a name and a value."""
    images, visual = prefill["images"][0], [rows[0] for rows in prefill["visual"]]
    requested = [str(image["requested"]) for image in images if image["requested"] is not None]
    runs = [(layers[0], layers[-1], count) for count, layers in _runs(visual)]
    told = [
        ("visual tokens", ", ".join(str(image["tokens"]) for image in images)),
        ("requested", ", ".join(requested)),
        ("sent to the language model", ", ".join(str(image["kept"]) for image in images)),
        ("in decoder layers", "; ".join(f"{first} to {last}: {count}" for first, last, count in runs)),
        ("text tokens", str(prefill["text"][0])),
        ("KV cache, tokens over all layers", str(sum(prefill["kv"])) if prefill["kv"] else ""),
    ]
    return [(name, value) for name, value in told if value]


def _runs(numbers: list[int]) -> list[tuple[int, list[int]]]:
    """Group consecutive equal numbers: each with its places."""
    grouped = groupby(range(len(numbers)), key=numbers.__getitem__)
    return [(number, list(places)) for number, places in grouped]


def _ledger(flops: dict[str, int]) -> list[tuple[str, str, str]]:
    """Write the FLOPs of a prefill by part, in billions and as shares."""
    total = sum(flops.values())
    parts = {part.replace("_", " "): value for part, value in flops.items() if value} | {"total": total}
    return [(part, f"{value / 1e9:.3f}", f"{value / total:.1%}") for part, value in parts.items()]
