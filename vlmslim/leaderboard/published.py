"""Published results next to ours: the papers' tables, and the cells that are really comparable.

The tables lie in `vlmslim/leaderboard/papers/*.yaml`, one file a paper, with the source of every number. A published
cell is compared with one of ours only if checkpoint, task, metric, method with its options, and budget are the same,
and if the whole task was run.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmslim.evaluation.config import ConfigError
from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.tables import Column, Table, number, score_text

DIRECTORY = Path(__file__).parent / "papers"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Benchmark(_Strict):
    """A column of a published table; `tasks` are the lmms-eval tasks that ask the same, none where no task does."""

    tasks: list[str] = []
    metric: str | None = None
    unit: str

    @model_validator(mode="after")
    def _both(self):
        if bool(self.tasks) != bool(self.metric):
            raise ValueError("give 'tasks' and 'metric' together")
        return self


class PublishedRow(_Strict):
    """A line of a published table.

    name   : as the paper calls it
    method : vlmslim's name, if it is a method of vlmslim with these `options`; none for the unpruned model
    keep   : visual tokens kept per image, as in vlmslim
    share, equivalent_tokens : a budget that is not vlmslim's `keep`
    tflops, prefill_ms : as printed; see the table's convention
    scores : one per column
    """

    name: str
    method: str | None = None
    options: dict = {}
    keep: Annotated[int | float, Field(gt=0)] | None = None
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    equivalent_tokens: Annotated[float, Field(gt=0)] | None = None
    tflops: float | None = None
    prefill_ms: float | None = None
    note: str | None = None
    scores: list[float | None]


class PublishedTable(_Strict):
    """A published table, or the part of it that is about one model.

    source        : who printed the numbers that were read
    checkpoints   : on the hub, with the same weights; none where there is none, and then nothing is matched
    visual_tokens : of an image before compression
    protocol      : the evaluation code
    convention    : how budgets and costs are counted
    also          : options under which a method is the table's too: ways of the release that are not our default
    columns       : names of the paper's `benchmarks`
    """

    table: str
    source: Literal["paper", "poster", "readme", "notes", "third party"]
    model: str
    checkpoints: list[str]
    visual_tokens: int | None = None
    protocol: str
    convention: str
    also: list[dict] = []
    columns: list[str]
    rows: list[PublishedRow]

    @model_validator(mode="after")
    def _rectangular(self):
        for row in self.rows:
            if len(row.scores) != len(self.columns):
                raise ValueError(f"{self.table}, {row.name}: {len(row.scores)} scores for {len(self.columns)} columns")
        return self

    @property
    def original(self) -> PublishedRow | None:
        """The unpruned model."""
        return next((row for row in self.rows if row.method == UNPATCHED), None)


class Paper(_Strict):
    """A paper's tables; `read` says how they came here."""

    title: str
    arxiv: Annotated[str, Field(pattern=r"^\d{4}\.\d{5}$")]
    venue: str | None = None
    read: str
    benchmarks: dict[str, Benchmark]
    tables: list[PublishedTable]

    @model_validator(mode="after")
    def _known_columns(self):
        used = {column for table in self.tables for column in table.columns}
        if used != self.benchmarks.keys():
            odd = ", ".join(sorted(used ^ self.benchmarks.keys()))
            raise ValueError(f"'benchmarks' and the tables' columns differ in: {odd}")
        return self


def load_papers(directory: Path | str = DIRECTORY) -> list[Paper]:
    """Read and check all published tables.

    Raises:
        ConfigError: the directory holds none, or a file does not follow the schema.
    """
    paths = sorted(Path(directory).glob("*.yaml"))
    if not paths:
        raise ConfigError(
            f"no published tables (*.yaml) in {directory}; leave out --published-tables to use those of vlmslim"
        )
    papers = []
    for path in paths:
        try:
            papers.append(Paper.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))))
        except (yaml.YAMLError, ValidationError) as error:
            raise ConfigError(f"{path}: {error}") from error
    return papers


@dataclass(frozen=True)
class Line:
    """A published number and ours, in the paper's unit.

    unit       : of both numbers, as the paper's benchmark has it
    *_relative : over the unpruned model of the same table, and of our run
    """

    label: str
    benchmark: str
    task: str
    theirs: float
    ours: float
    difference: float
    unit: str
    theirs_relative: float | None
    ours_relative: float | None
    arxiv: str
    table: str
    source: str


@dataclass(frozen=True)
class Published:
    """The comparable cells, and what a reader must know: conventions, or why nothing is comparable."""

    lines: list[Line]
    notes: list[str]

    @classmethod
    def compare(cls, board: Leaderboard, papers: list[Paper]) -> "Published":
        """Find the published cells that are comparable with a leaderboard's."""
        model, limit = board.facts["model"], board.facts["limit"]
        if limit is not None:
            return cls(
                [], [f"Published numbers are on whole tasks; this run asked the first {limit} questions of each."]
            )
        tables = [(paper, table) for paper in papers for table in paper.tables if model in table.checkpoints]
        if not tables:
            known = sorted({name for paper in papers for table in paper.tables for name in table.checkpoints})
            return cls([], [f"Nothing is published here for {model}; there are tables for {', '.join(known)}."])
        lines, notes = [], []
        for paper, table in tables:
            where = f"{paper.arxiv}, {table.table} ({table.source})"
            benchmarks = [paper.benchmarks[column] for column in table.columns]
            run = list(dict.fromkeys(t for benchmark in benchmarks for t in benchmark.tasks if t in board.tasks))
            for task in run:
                metric = {b.metric for b in benchmarks if task in b.tasks}
                if board.metrics[task][0] not in metric:
                    notes.append(
                        f"{where} has {task} by {' or '.join(sorted(metric))}, this run by {board.metrics[task][0]}: "
                        "give the task that 'metric' in the configuration and call vlmslim run again."
                    )
            if odd := [task for task in run if not _same_size(board, table, task)]:
                seen = ", ".join(f"{board.tokens[task]:.1f} here ({task})" for task in odd)
                notes.append(f"{where} is left out: {table.visual_tokens} visual tokens an image there, {seen}.")
            if found := [line for row in table.rows for line in _lines(board, paper, table, row)]:
                lines += found
                notes.append(f"{where}: {table.protocol}; {table.convention}. Read from {paper.read}.")
        if not lines:
            notes.append(
                f"No published cell for {model} has a task, metric, method and budget of this run. {_has(tables)}"
            )
        return cls(lines, notes)

    def table(self, board: Leaderboard) -> Table | None:
        """The lines as a table; None if there are none."""
        if not self.lines:
            return None
        rows = {row.label: row for row in board.rows}
        own = [rows[line.label] for line in self.lines]
        columns = [
            Column("method", [row.label for row in own]),
            Column("budget", [row.budget_name for row in own]),
            Column("benchmark", [line.benchmark for line in self.lines]),
            Column("published", [f"{line.theirs:g}" for line in self.lines]),
            Column("here", [_ours(board, row, line) for row, line in zip(own, self.lines, strict=True)]),
            Column("difference", [f"{line.difference:+.{_digits(line)}f}" for line in self.lines]),
            Column("published, % of unpruned", [number(line.theirs_relative, 100, 1) for line in self.lines]),
            Column("here, % of unpatched", [number(line.ours_relative, 100, 1) for line in self.lines]),
            Column("source", [f"{line.arxiv}, {line.table} ({line.source})" for line in self.lines]),
        ]
        return Table("Published and here", own, columns)


def _has(tables: list[tuple[Paper, PublishedTable]]) -> str:
    """What there is for a model."""
    tasks = sorted({task for p, table in tables for name in table.columns for task in p.benchmarks[name].tasks})
    budgets = {f"{row.method} at {row.keep}" for _, table in tables for row in table.rows if row.method and row.keep}
    return f"Tasks: {', '.join(tasks) or 'none'}; methods: {', '.join(sorted(budgets)) or 'none'}."


def _lines(board: Leaderboard, paper: Paper, table: PublishedTable, published: PublishedRow) -> list[Line]:
    """A published row's cells against those of our rows that are the same."""
    same = [row for row in board.rows if _is_same(row, published, table, board)]
    asked = [row for row in same if type(row.budget) is type(published.keep)]  # not only as many tokens, as it happens
    return [line for row in asked or same for line in _lines_of(board, paper, table, published, row)]


def _same_size(board: Leaderboard, table: PublishedTable, task: str) -> bool:
    """Whether the images of a task have as many visual tokens as in a published table, before compression."""
    return table.visual_tokens is None or abs(board.tokens[task] - table.visual_tokens) <= 0.01 * table.visual_tokens


def _lines_of(board: Leaderboard, paper: Paper, table: PublishedTable, published: PublishedRow, row: Row) -> list[Line]:
    """A published row's cells against those of one of ours."""
    base = next((row for row in board.rows if row.label == UNPATCHED), None)
    lines = []
    for column, theirs in zip(table.columns, published.scores, strict=True):
        benchmark = paper.benchmarks[column]
        task = next((t for t in benchmark.tasks if t in row.scores and board.metrics[t][0] == benchmark.metric), None)
        if theirs is None or task is None or not _same_size(board, table, task):
            continue
        ours = row.scores[task].value * _scale(board, task, benchmark.unit)
        original = None if table.original is None else table.original.scores[table.columns.index(column)]
        unpatched = base.scores[task].value if base is not None and task in base.scores else None
        lines.append(
            Line(
                label=row.label,
                benchmark=column,
                task=task,
                theirs=theirs,
                ours=round(ours, 9),
                difference=round(ours - theirs, 9),
                unit=benchmark.unit,
                theirs_relative=theirs / original if original else None,
                ours_relative=row.scores[task].value / unpatched if unpatched else None,
                arxiv=paper.arxiv,
                table=table.table,
                source=table.source,
            )
        )
    return lines


def _is_same(row: Row, published: PublishedRow, table: PublishedTable, board: Leaderboard) -> bool:
    """Whether a published row is about the method, the options and the budget of one of ours."""
    if published.method is None or len(row.stages) != 1 or row.stages[0]["method"] != published.method:
        return False
    if published.method == UNPATCHED:
        return True
    asked, ours = _options(row.stages[0])
    ways = [_options({"method": published.method, **published.options, **also})[1] for also in ({}, *table.also)]
    return _is_same_budget(asked, row, published, table.visual_tokens or board.facts["visual_tokens"]) and any(
        ours == way or _differ_by_defaults(published.method, ours, way) for way in ways
    )


def _is_same_budget(asked, row: Row, published: PublishedRow, tokens: float) -> bool:
    """The same `keep`, or a share and a count that come to the same number of tokens."""
    keep = published.keep
    if keep is None:
        return asked is None and published.share is None and published.equivalent_tokens is None
    if isinstance(row.budget, dict):  # solved for a cost, which the paper did not
        return False
    if type(asked) is type(keep):
        return asked == keep
    return row.requested is not None and abs(row.requested - (keep * tokens if isinstance(keep, float) else keep)) < 0.5


def _options(stage: dict) -> tuple[int | float | None, dict]:
    """The `keep` of a stage, and its other options; the seed is no option."""
    return stage.get("keep"), {name: value for name, value in stage.items() if name not in ("method", "keep", "seed")}


def _differ_by_defaults(method: str, ours: dict, theirs: dict) -> bool:
    """Whether options are the same once the method's defaults are filled in.

    The registry loads torch, so it is imported only for a row whose options are not written as in the table.
    """
    from vlmslim.registry import options_of

    defaults = options_of(method)
    return defaults | ours == defaults | theirs


def _scale(board: Leaderboard, task: str, unit: str) -> int:
    """What our score is multiplied by to be in the paper's unit."""
    return board.scale(task) if unit == "percent" else 1


def _digits(line: Line) -> int:
    """As many as were published, but not more than two."""
    return min(2, max(1 if abs(line.theirs) >= 10 else 2, len(f"{line.theirs:g}".partition(".")[2])))


def _ours(board: Leaderboard, row: Row, line: Line) -> str:
    """Our score with its interval, in the paper's unit."""
    return score_text(row.scores[line.task], _scale(board, line.task, line.unit))
