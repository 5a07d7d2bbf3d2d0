"""The leaderboard as Markdown, CSV, JSON or HTML."""

import csv
import io
import json
from dataclasses import asdict
from pathlib import Path

from vlmslim.io.files import markdown_table, write_atomically
from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.published import Line, Published
from vlmslim.leaderboard.rows import PROVENANCE, Row
from vlmslim.leaderboard.tables import Table, notes, tables

FORMATS = ("md", "csv", "json", "html")


def render(board: Leaderboard, format: str, published: Published | None = None) -> str:
    """The leaderboard as text.

    Args:
        board: the leaderboard.
        format: one of `FORMATS`.
        published: published numbers to show with it; CSV then holds them alone.

    Raises:
        ValueError: `format` is not one of `FORMATS`.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose from {', '.join(FORMATS)}")
    return {"md": _markdown, "csv": _csv, "json": _json, "html": _html}[format](board, published)


def write_all(board: Leaderboard, directory: Path) -> None:
    """Write the leaderboard in every format."""
    for format in FORMATS:
        write_atomically(Path(directory) / f"leaderboard.{format}", render(board, format))


def _titled(table: Table) -> str:
    """A table with its title; best values are bold, those that tie with them slanted."""
    marks = {1: "**{}**", 2: "*{}*"}
    cells = [
        [marks.get(c.places.get(r.label), "{}").format(text) for r, text in zip(table.rows, c.texts, strict=True)]
        for c in table.columns
    ]
    return f"## {table.title}\n\n" + markdown_table([c.name for c in table.columns], zip(*cells, strict=True))


def _with_published(board: Leaderboard, published: Published | None) -> tuple[list[Table], list[str]]:
    """All tables and notes."""
    built, remarks = tables(board), notes(board)
    if published is not None:
        table = published.table(board)
        built, remarks = built + ([] if table is None else [table]), published.notes + remarks
    return built, remarks


def _markdown(board: Leaderboard, published: Published | None) -> str:
    built, remarks = _with_published(board, published)
    return "\n\n".join([f"# {board.facts['model']}", *map(_titled, built), *remarks]) + "\n"


def _csv(board: Leaderboard, published: Published | None) -> str:
    """One line per row of the leaderboard, in full precision; or per published number."""
    if published is not None:
        return _lines_of([asdict(line) for line in published.lines], list(Line.__dataclass_fields__))
    nested = ("scores", "groups", "stages", "provenance", "budget", "pareto", "solved")
    plain = [name for name in Row.__dataclass_fields__ if name not in nested]
    parts = ("value", "stderr", "questions", "low", "high")
    lines = []
    for row in board.rows:
        line = {"label": row.label, "budget": row.budget_name, "stages": json.dumps(row.stages)}
        for task in board.tasks:
            score = row.scores.get(task)
            line |= {f"{task}:{part}": getattr(score, part, None) for part in parts}
            pair = board.comparison.pair(row.label, UNPATCHED, task)
            line[f"{task}:p"] = None if pair is None else pair.p_adjusted
        line |= {f"group:{name}": row.groups.get(name) for name in sorted(set(board.groups.values()))}
        line |= {name: getattr(row, name) for name in plain} | {"pareto": "; ".join(row.pareto)}
        line["solved"] = None if row.solved is None else f"{row.solved['option']}={row.solved['value']}"
        lines.append(line | {name: row.provenance.get(name) for name in PROVENANCE})
    return _lines_of(lines, list(lines[0]))


def _lines_of(lines: list[dict], header: list[str]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _json(board: Leaderboard, published: Published | None) -> str:
    comparison = board.comparison
    data = {
        "facts": board.facts,
        "tasks": {
            task: {"metric": name, "higher_is_better": up, "group": board.groups.get(task)}
            for task, (name, up) in board.metrics.items()
        },
        "rows": [asdict(row) for row in board.rows],
        "pairs": [asdict(pair) for pair in comparison.pairs.values()],
        "stability": [
            {"label": label, "task": task, **asdict(one)} for (label, task), one in comparison.stability.items()
        ],
    }
    if published is not None:
        data["published"] = asdict(published)
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _html(board: Leaderboard, published: Published | None) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmslim.leaderboard"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    template = environment.get_template("leaderboard.html")
    built, remarks = _with_published(board, published)
    plain = [note.replace("*", "") for note in remarks]
    return template.render(board=board, tables=built, notes=plain, points=_points(board)) + "\n"


def _points(board: Leaderboard) -> list[dict]:
    """Where the rows lie in the picture of average against FLOPs, as shares of its width and height."""
    placed = [row for row in board.rows if row.relative is not None and row.flops_ratio is not None]
    top = max([1.0, *(row.relative for row in placed)])
    return [
        {
            "label": row.label,
            "x": round(row.flops_ratio, 4),
            "y": round(1 - row.relative / top, 4),
            "text": f"{row.label}: {row.relative:.1%} of unpatched at {row.flops_ratio:.1%} of the FLOPs",
            "front": "FLOPs" in row.pareto,
        }
        for row in sorted(placed, key=lambda row: row.flops_ratio)
    ]
