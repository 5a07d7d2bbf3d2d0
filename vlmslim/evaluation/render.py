"""The leaderboard as Markdown, CSV, JSON or HTML."""

import csv
import io
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from vlmslim.evaluation.leaderboard import Leaderboard, Row, Score
from vlmslim.evaluation.store import write_atomically

FORMATS = ("md", "csv", "json", "html")


@dataclass(frozen=True)
class Column:
    """A column of a rendered table: one formatted text per row, and the places that are marked."""

    name: str
    texts: list[str]
    places: dict[str, int] = field(default_factory=dict)


def score_columns(board: Leaderboard) -> list[Column]:
    """Method, budget, each task's score with its standard error, and the average relative to the unpatched model."""
    columns = _name_columns(board)
    for task in board.tasks:
        scale = board.scale(task)
        texts = [_score_text(row.scores.get(task), scale) for row in board.rows]
        columns.append(Column(task, texts, board.places(task)))
    relative = [_number(row.relative, 100, 1) for row in board.rows]
    return [*columns, Column("average, % of unpatched", relative, board.places(None))]


def cost_columns(board: Leaderboard) -> list[Column]:
    """Method, budget, visual tokens, FLOPs, measured times and KV-cache bytes."""
    rows = board.rows
    tera = max((row.flops or 0) for row in rows) >= 1e11
    unit, name = (1e12, "TFLOPs") if tera else (1e9, "GFLOPs")
    mebi = max((row.kv_bytes or 0) for row in rows) >= 2**20
    bytes_, bytes_name = (2**20, "MiB") if mebi else (2**10, "KiB")
    return [
        *_name_columns(board),
        Column("tokens asked", [_number(r.requested, 1, 1) for r in rows]),
        Column("tokens kept", [_kept_text(r) for r in rows]),
        Column("equivalent tokens", [_number(r.equivalent, 1, 1) for r in rows]),
        Column(f"prefill {name}", [_with_ratio(r.flops, r.flops_ratio, 1 / unit, 2) for r in rows]),
        Column("prefill ms", [_with_ratio(r.prefill_ms, r.prefill_ratio, 1, 1) for r in rows]),
        Column("decode ms/token", [_with_ratio(r.decode_ms, r.decode_ratio, 1, 2) for r in rows]),
        Column(f"KV cache {bytes_name}", [_number(r.kv_bytes, 1 / bytes_, 1) for r in rows]),
    ]


def _name_columns(board: Leaderboard) -> list[Column]:
    budgets = ["all" if row.budget is None else str(row.budget) for row in board.rows]
    return [Column("method", [row.label for row in board.rows]), Column("keep", budgets)]


def _number(value: float | None, scale: float, digits: int) -> str:
    return "–" if value is None else f"{value * scale:.{digits}f}"


def _with_ratio(value: float | None, ratio: float | None, scale: float, digits: int) -> str:
    return _number(value, scale, digits) + ("" if ratio is None else f" ({ratio:.2f}x)")


def _kept_text(row: Row) -> str:
    """Tokens that enter the language model, and those left in its last layer if some are dropped on the way."""
    entering, leaving = _number(row.kept, 1, 1), _number(row.last, 1, 1)
    return entering if entering == leaving else f"{entering} → {leaving}"


def _score_text(score: Score | None, scale: int) -> str:
    if score is None:
        return "–"
    digits = 1 if scale == 100 or abs(score.value) >= 10 else 3
    error = "" if score.stderr is None else f" ± {score.stderr * scale:.{digits}f}"
    return f"{score.value * scale:.{digits}f}{error}"


def _short(hash: str) -> str:
    """The first digits of a hash, and the mark of a changed working tree."""
    return hash[:12] + ("+" if hash.endswith("+") else "")


def notes(board: Leaderboard) -> list[str]:
    """What a reader must know to use the numbers."""
    facts = board.facts
    shares = [task for task in board.tasks if board.scale(task) == 100]
    limit = "all questions" if facts["limit"] is None else f"the first {facts['limit']} questions of each task"
    names = {board.metrics[task][0] for task in board.tasks}
    metrics = ", ".join(names if len(names) == 1 else [f"{task} = {board.metrics[task][0]}" for task in board.tasks])
    in_percent = "all" if len(shares) == len(board.tasks) else ", ".join(shares)
    lines = [
        f"Scores: {metrics}; in per cent: {in_percent or 'none'}; ± one standard error; {limit}. "
        "Best and second best of each budget are marked (**best**, *second*).",
        f"An image has {facts['visual_tokens']:.1f} visual tokens. Kept: entering the language model → in its last "
        "layer. Equivalent: of a prompt, averaged over the decoder layers. Prefill FLOPs: language model alone, "
        "multiply-add = 2, three-matrix MLP, attention in full; the vision tower adds "
        f"{facts['tower_flops'] / 1e9:.2f} GFLOPs a crop.",
    ]
    if facts["timing"]:
        t = facts["timing"]
        lines.append(
            f"Prefill: time to first token, image encoding and compression included. Medians of {t['prompts']} prompts "
            f"x {t['repeats']} repetitions at batch 1 and {t['new_tokens']} new tokens, all rows in turn in one "
            "process; in brackets the median ratio to the unpatched model. KV cache: of a prompt, after prefill."
        )
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    commits, configs = (", ".join(map(_short, facts[name])) for name in ("git_commits", "config_hashes"))
    checkpoint = f" ({_short(facts['checkpoint'])})" if facts["checkpoint"] else ""
    lines.append(
        f"{facts['model']}{checkpoint}; seed {facts['seed']}; {versions}; {'; '.join(facts['hardware'])}; "
        f"commit {commits}; config {configs}; cells {facts['cells']}."
    )
    return lines


def render(board: Leaderboard, format: str) -> str:
    """The leaderboard as text.

    Raises:
        ValueError: `format` is not one of `FORMATS`.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; choose from {', '.join(FORMATS)}")
    return {"md": _markdown, "csv": _csv, "json": _json, "html": _html}[format](board)


def write_all(board: Leaderboard, directory: Path) -> None:
    """Write the leaderboard in every format."""
    for format in FORMATS:
        write_atomically(Path(directory) / f"leaderboard.{format}", render(board, format))


def _markdown(board: Leaderboard) -> str:
    def table(columns: list[Column]) -> str:
        marks = {1: "**{}**", 2: "*{}*"}
        cells = [
            [marks.get(c.places.get(r.label), "{}").format(text) for r, text in zip(board.rows, c.texts, strict=True)]
            for c in columns
        ]
        widths = [max(len(c.name), *map(len, texts)) for c, texts in zip(columns, cells, strict=True)]
        pad = [str.ljust] + [str.rjust] * (len(columns) - 1)

        def line(texts) -> str:
            return "| " + " | ".join(p(t, w) for p, t, w in zip(pad, texts, widths, strict=True)) + " |"

        rule = [("-" * w if p is str.ljust else "-" * (w - 1) + ":") for p, w in zip(pad, widths, strict=True)]
        return "\n".join([line([c.name for c in columns]), line(rule), *map(line, zip(*cells, strict=True))])

    tables = [f"## Scores\n\n{table(score_columns(board))}", f"## Cost\n\n{table(cost_columns(board))}"]
    return "\n\n".join([f"# {board.facts['model']}", *tables, *notes(board)]) + "\n"


def _csv(board: Leaderboard) -> str:
    plain = [name for name in Row.__dataclass_fields__ if name != "scores"]
    header = plain[:2] + [f"{task}{part}" for task in board.tasks for part in ("", ":stderr", ":questions")] + plain[2:]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in board.rows:
        scores = [row.scores.get(task) for task in board.tasks]
        values = [value for s in scores for value in ((s.value, s.stderr, s.questions) if s else (None, None, None))]
        writer.writerow([getattr(row, n) for n in plain[:2]] + values + [getattr(row, n) for n in plain[2:]])
    return text.getvalue()


def _json(board: Leaderboard) -> str:
    metrics = {task: {"metric": name, "higher_is_better": up} for task, (name, up) in board.metrics.items()}
    data = {"facts": board.facts, "tasks": metrics, "rows": [asdict(row) for row in board.rows]}
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _html(board: Leaderboard) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("vlmslim.evaluation"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    tables = {"Scores": score_columns(board), "Cost": cost_columns(board)}
    plain = [note.replace("(**best**, *second*)", "(bold, italic)") for note in notes(board)]
    return environment.get_template("leaderboard.html").render(board=board, tables=tables, notes=plain) + "\n"
