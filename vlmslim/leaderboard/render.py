"""The leaderboard as Markdown, CSV or JSON."""

import csv
import io
import json
import re
from dataclasses import asdict, fields

from vlmslim.io.files import markdown_table
from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.comparison import Stability
from vlmslim.leaderboard.notes import notes
from vlmslim.leaderboard.published import Line, Published
from vlmslim.leaderboard.rows import PROVENANCE, Cost, Row, Times
from vlmslim.leaderboard.tables import Table, tables

FORMATS = ("md", "csv", "json")
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")  # the last four in full width


def render(board: Leaderboard, format: str, published: Published | None = None) -> str:
    """Write the leaderboard as text.

    Args:
        board: the leaderboard.
        format: one of `FORMATS`.
        published: published numbers to show with the leaderboard; CSV then holds these alone.

    Raises:
        ValueError: `format` is not one of `FORMATS`.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; use one of {', '.join(FORMATS)}")
    return {"md": _markdown, "csv": _csv, "json": _json}[format](board, published)


def with_published(board: Leaderboard, published: Published | None) -> tuple[list[Table], list[str]]:
    """Collect all tables and notes."""
    built, remarks = tables(board), notes(board)
    if published is not None:
        built, remarks = built + published.tables(board), published.notes + remarks
    return built, remarks


# ---------------------------------------------------------------------- Markdown


def _markdown(board: Leaderboard, published: Published | None) -> str:
    built, remarks = with_published(board, published)
    parts = [f"# {escaped(board.facts['model'])}", *map(_titled, built), *map(_paragraph, remarks)]
    return "\n\n".join(parts) + "\n"


def _titled(table: Table) -> str:
    """Write a table with its title; the best values are bold, values that are not significantly worse are italic."""
    marks = {1: "**{}**", 2: "*{}*"}
    cells = []
    for column in table.columns:
        medals = [column.medals.get(row.label, 0) for row in table.rows]
        texts = zip(medals, map(escaped, column.texts), strict=True)
        cells.append([marks.get(medal, "{}").format(text) for medal, text in texts])
    names = [escaped(column.name) for column in table.columns]
    return f"## {escaped(table.title)}\n\n" + markdown_table(names, zip(*cells, strict=True))


#: Marks of Markdown in a line: emphasis, code, cells, tags, links, bare addresses and entities.
_MARKS = re.compile(
    r"[\\|*`~]|<(?=[A-Za-z/!?])|(?<!\w)_|_(?!\w)|\](?=[(\[:])|:(?=//)|(?<=\bwww)\.|&(?=#?\w+;)|#(?=#*$)"
)


def escaped(text: str) -> str:
    """Escape what Markdown would read as a mark: names of labels, tasks and models may hold anything."""
    return _MARKS.sub(r"\\\g<0>", " ".join(text.split()))


def _paragraph(text: str) -> str:
    """Escape a text that stands by itself, so that it begins no list and no heading."""
    return re.sub(r"^(\d{0,9})(?=[-+>#=\[.)])", r"\1\\", escaped(text))


# ---------------------------------------------------------------------- CSV and JSON


def _csv(board: Leaderboard, published: Published | None) -> str:
    """Write one line per row of the leaderboard, in full precision; or one line per published number."""
    if published is not None:
        return csv_lines([asdict(line) for line in published.lines], [f.name for f in fields(Line)])
    lines = []
    for row in board.rows:
        line: dict[str, object] = {"label": row.label, "budget": row.budget_name, "stages": json.dumps(row.stages)}
        for task in board.tasks:
            score = row.scores.get(task)
            for part in ("value", "stderr", "questions", "low", "high"):
                line[f"{task}:{part}"] = getattr(score, part, None)
            pair = board.comparison.pair(row.label, UNPATCHED, task)
            line[f"{task}:p"] = None if pair is None else pair.p_adjusted
        line |= {f"group:{name}": getattr(row.groups.get(name), "value", None) for name in sorted(_groups(board))}
        line |= _numbers(row)
        line["pareto"] = "; ".join(row.pareto)
        line["activity"] = json.dumps([asdict(stage) for stage in row.activity])
        line["solved"] = None if row.solved is None else row.solved.text()
        lines.append(line | {name: row.provenance.get(name) for name in PROVENANCE})
    return csv_lines(lines, list(lines[0]))


def _groups(board: Leaderboard) -> set[str]:
    return set(board.groups.values())


def csv_lines(lines: list[dict], header: list[str]) -> str:
    """Write CSV: every cell of the header and of the lines, so that a spreadsheet runs none of them."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_harmless, header))
    writer.writerows([_harmless(line[name]) for name in header] for line in lines)
    return text.getvalue()


def _harmless(value: object) -> object:
    """Put an apostrophe before text that a spreadsheet would run as a formula, also after blanks."""
    return f"'{value}" if isinstance(value, str) and value.lstrip().startswith(_FORMULA) else value


def _json(board: Leaderboard, published: Published | None) -> str:
    data = record(board)
    if published is not None:
        data["published"] = asdict(published)
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def record(board: Leaderboard) -> dict:
    """Collect everything that a leaderboard holds, ready for JSON."""
    comparison = board.comparison
    return {
        "facts": board.facts,
        "scale": board.ranked_by,
        "vision_tasks": board.vision_tasks,
        "hard_questions": comparison.hard_questions,
        "tasks": {
            task: {"metric": name, "higher_is_better": up, "group": board.groups.get(task)}
            for task, (name, up) in board.metrics.items()
        },
        "rows": [
            {
                "label": row.label,
                "budget": row.budget,
                "stages": row.stages,
                "scores": {task: asdict(score) for task, score in row.scores.items()},
                "groups": {name: mean.value for name, mean in row.groups.items()},
                **_numbers(row),
                "pareto": row.pareto,
                "activity": [asdict(stage) for stage in row.activity],
                "solved": None if row.solved is None else row.solved.solution,
                "provenance": row.provenance,
            }
            for row in board.rows
        ],
        "pairs": [asdict(pair) for pair in comparison.pairs.values()],
        "stability": [
            {"label": label, "task": task, **asdict(one)} for (label, task), one in comparison.stability.items()
        ],
    }


def _numbers(row: Row) -> dict[str, object]:
    """Collect the single numbers of a row under the keys of CSV and JSON; None where a number is not known."""
    numbers: dict[str, object] = {
        "rank": row.rank,
        "flops_ratio": row.flops_ratio,
        "work_ratio": row.work_ratio,
        "nominal": None if row.cost is None else row.cost.nominal,
    }
    for scale in ("relative", "vision", "hard"):
        for end, name in (("", "value"), ("_low", "low"), ("_high", "high")):
            numbers[scale + end] = getattr(getattr(row, scale), name, None)
    for part, kind in ((row.stability, Stability), (row.cost, Cost), (row.times, Times)):
        numbers |= {f.name: getattr(part, f.name, None) for f in fields(kind)}
    return numbers | {name: getattr(row.solved, name, None) for name in ("spent", "spent_low", "spent_high")}
