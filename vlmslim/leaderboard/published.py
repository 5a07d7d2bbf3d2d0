"""The cells of published tables that can be compared with ours.

A published cell is compared with one of ours only if checkpoint, task, metric, method and budget are the same, if the
run asked all questions of the task, and if our row has the options that the paper used. A row with our default options
stands beside it too, with a mark, and says how it differs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.published_tables import DIRECTORY, Paper, PublishedRow, PublishedTable, load_papers
from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.spreads import Spread, spreads_of
from vlmslim.leaderboard.tables import Column, Table, name_columns, number, score_text, with_interval

__all__ = ["DIRECTORY", "Line", "Paper", "Published", "Spread", "load_papers", "spreads_of"]

DIFFERS = "≠"  # marks a row of ours with other options than the paper's
OTHER_PROTOCOL = "†"  # marks a row of ours that saw other pictures or prompts than the paper's


@dataclass(frozen=True)
class Line:
    """A published number and ours, in the paper's unit.

    paper      : its number on arXiv, or its short name
    *_relative : relative to the unpatched model of the same table, and of our run
    differs    : the options of our row that are not the paper's; empty if all are
    protocol   : both protocols where ours is not the paper's; empty if it is
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
    paper: str
    table: str
    source: str
    differs: str = ""
    protocol: str = ""


@dataclass(frozen=True)
class Published:
    """The cells that can be compared, with notes on conventions or on why nothing can be compared.

    spreads : label of one of our rows -> what papers report for its method and budget
    """

    lines: list[Line]
    notes: list[str]
    spreads: dict[str, Spread] = field(default_factory=dict)

    @classmethod
    def compare(cls, board: Leaderboard, papers: list[Paper]) -> "Published":
        """Find the published cells that can be compared with the cells of a leaderboard."""
        model, limit = board.facts["model"], board.facts["limit"]
        if limit is not None:
            note = f"Published numbers are on whole tasks, but this run asked the first {limit} questions of each task."
            return cls([], [note])
        tables = [(paper, table) for paper in papers for table in paper.tables if model in table.checkpoints]
        if not tables:
            known = sorted({name for paper in papers for table in paper.tables for name in table.checkpoints})
            return cls([], [f"No published table is about {model}; there are tables about {', '.join(known)}."])
        lines, notes = [], []
        ours = spreads_of(papers, model)
        spreads = {row.label: ours[key] for row in board.rows if (key := _same_row(row)) in ours}
        for paper, table in tables:
            where = f"{paper.cited}, {table.table} ({table.source})"
            notes += [f"{where} {mismatch}" for mismatch in _mismatches(board, paper, table)]
            if found := [line for row in table.rows for line in _lines(board, paper, table, row)]:
                lines += found
                notes.append(f"{where}: {table.protocol}; {table.convention}. Read from {paper.read}.")
        if any(line.differs for line in lines):
            notes.append(
                f"{DIFFERS} marks a row of ours that runs with our default options, which are not those of the paper: "
                "its difference is not one between two runs of the same method."
            )
        if any(line.protocol for line in lines):
            notes.append(
                f"{OTHER_PROTOCOL} marks a row of ours that saw other pictures or prompts than the paper's. Give the "
                "model 'protocol: original' in the configuration, and run into another directory, to see the paper's."
            )
        for label, spread in spreads.items():
            if len(spread.reports) > 1:
                notes.append(f"{label} in {spread.text()}")
        if not lines:
            notes.append(
                f"No published cell about {model} has a task, metric, method and budget of this run. "
                f"{_available(tables)}"
            )
        return cls(lines, notes, spreads)

    def tables(self, board: Leaderboard) -> list[Table]:
        """Build the tables that have content."""
        return [table for table in (self.averages(board), self.table(board)) if table is not None]

    def averages(self, board: Leaderboard) -> Table | None:
        """Build the table of our averages beside those of all papers that have the row; None if there are none."""
        rows = [row for row in board.rows if row.label in self.spreads]
        if not rows:
            return None
        spreads = [self.spreads[row.label] for row in rows]
        columns = [
            *name_columns(rows),
            Column("here, % of unpatched", [with_interval(row.relative) for row in rows]),
            Column("lowest published", [f"{spread.low:.1f}" for spread in spreads]),
            Column("highest published", [f"{spread.high:.1f}" for spread in spreads]),
            Column("spread", [f"{spread.high - spread.low:.1f}" for spread in spreads]),
            Column("papers", [spread.listed() for spread in spreads]),
        ]
        return Table("Averages that papers report", rows, columns)

    def table(self, board: Leaderboard) -> Table | None:
        """Build the table of the compared cells; None if there are none."""
        if not self.lines:
            return None
        rows = {row.label: row for row in board.rows}
        own = [rows[line.label] for line in self.lines]
        names, budgets = name_columns(own)
        marked = [
            " ".join([name, *[DIFFERS] * bool(line.differs), *[OTHER_PROTOCOL] * bool(line.protocol)])
            for name, line in zip(names.texts, self.lines, strict=True)
        ]
        columns = [
            Column(names.name, marked),
            budgets,
            Column("benchmark", [line.benchmark for line in self.lines]),
            Column("published", [f"{line.theirs:g}" for line in self.lines]),
            Column("here", [_ours(board, row, line) for row, line in zip(own, self.lines, strict=True)]),
            Column("difference", [f"{line.difference:+.{_digits(line)}f}" for line in self.lines]),
            Column("published, % of unpatched", [number(line.theirs_relative, 100, 1) for line in self.lines]),
            Column("here, % of unpatched", [number(line.ours_relative, 100, 1) for line in self.lines]),
            Column("source", [f"{line.paper}, {line.table} ({line.source})" for line in self.lines]),
        ]
        if any(line.differs for line in self.lines):
            columns.insert(2, Column("options", [line.differs or "the paper's" for line in self.lines]))
        if any(line.protocol for line in self.lines):
            columns.append(Column("protocol", [line.protocol or "the paper's" for line in self.lines]))
        return Table("Published and here", own, columns)


def _mismatches(board: Leaderboard, paper: Paper, table: PublishedTable) -> Iterator[str]:
    """Say which tasks of a table were run with another metric, or with images of another size."""
    benchmarks = [paper.benchmarks[column] for column in table.columns]
    run = list(dict.fromkeys(t for benchmark in benchmarks for t in benchmark.tasks if t in board.tasks))
    for task in run:
        metrics = {benchmark.metric for benchmark in benchmarks if benchmark.metric and task in benchmark.tasks}
        if board.metrics[task][0] not in metrics:
            yield (
                f"reports {task} by {' or '.join(sorted(metrics))}, but this run by {board.metrics[task][0]}: give the "
                "task that 'metric' in the configuration and call vlmslim run again."
            )
    if odd := [task for task in run if not _same_size(board, table, task)]:
        seen = ", ".join(f"{board.tokens[task]:.1f} here ({task})" for task in odd)
        yield f"is left out: an image has {table.visual_tokens} visual tokens there, and {seen}."


def _available(tables: list[tuple[Paper, PublishedTable]]) -> str:
    """List what the tables of a model hold."""
    tasks = sorted({task for p, table in tables for name in table.columns for task in p.benchmarks[name].tasks})
    budgets = {f"{row.method} at {row.keep}" for _, table in tables for row in table.rows if row.method and row.keep}
    return f"Tasks: {', '.join(tasks) or 'none'}; methods: {', '.join(sorted(budgets)) or 'none'}."


def _lines(board: Leaderboard, paper: Paper, table: PublishedTable, published: PublishedRow) -> list[Line]:
    """Compare a published row with our rows: those with the paper's options first, then those with our defaults."""
    told = {row.label: _difference(row, published, table, board) for row in board.rows}
    lines: list[Line] = []
    for differs in sorted({text for text in told.values() if text is not None}):
        same = [row for row in board.rows if told[row.label] == differs]
        # A count and a share may give the same number of tokens; the row whose budget is written as there comes first.
        written_alike = [row for row in same if type(row.budget) is type(published.keep)]
        lines += [
            line for row in written_alike or same for line in _lines_of(board, paper, table, published, row, differs)
        ]
    return lines


def _same_size(board: Leaderboard, table: PublishedTable, task: str) -> bool:
    """Compare the visual tokens of an image before compression, in a task and in a published table."""
    return table.visual_tokens is None or abs(board.tokens[task] - table.visual_tokens) <= 0.01 * table.visual_tokens


def _lines_of(
    board: Leaderboard, paper: Paper, table: PublishedTable, published: PublishedRow, row: Row, differs: str
) -> Iterator[Line]:
    """Compare the cells of a published row with those of one of our rows."""
    base = next((row for row in board.rows if row.label == UNPATCHED), None)
    for column, theirs in zip(table.columns, published.scores, strict=True):
        benchmark = paper.benchmarks[column]
        task = next((t for t in benchmark.tasks if t in row.scores and board.metrics[t][0] == benchmark.metric), None)
        if theirs is None or task is None or not _same_size(board, table, task):
            continue
        ours = row.scores[task].value * _scale(board, task, benchmark.unit)
        reference = None if table.unpatched is None else table.unpatched.scores[table.columns.index(column)]
        unpatched = base.scores[task].value if base is not None and task in base.scores else None
        yield Line(
            label=row.label,
            benchmark=column,
            task=task,
            theirs=theirs,
            ours=round(ours, 9),
            difference=round(ours - theirs, 9),
            unit=benchmark.unit,
            theirs_relative=theirs / reference if reference else None,
            ours_relative=row.scores[task].value / unpatched if unpatched else None,
            source=table.source,
            paper=paper.cited,
            table=table.table,
            differs=differs,
            protocol=_other_protocol(board, table),
        )


def _other_protocol(board: Leaderboard, table: PublishedTable) -> str:
    """Say which protocols a run and a table have, if they are not the same."""
    told = board.facts["protocol"]
    ours = "not recorded" if told is None else told["protocol"]
    return "" if ours == table.prompts else f"{ours} here, {table.prompts} there"


def _difference(row: Row, published: PublishedRow, table: PublishedTable, board: Leaderboard) -> str | None:
    """Say in which options and positions one of our rows differs from a published row; None if they do not compare."""
    options = _different_options(row, published, table, board)
    if options is None or row.label == UNPATCHED or row.cost is None or not row.activity or row.activity[0].layers:
        return options
    here, there = row.cost.positions.partition(",")[0], table.positions  # what follows is about layers
    positions = "" if here == there else f"positions: {here} here, {there} there"
    return "; ".join(filter(None, [options, positions]))


def _different_options(row: Row, published: PublishedRow, table: PublishedTable, board: Leaderboard) -> str | None:
    """Say in which options one of our rows differs from a published row.

    Returns:
        An empty text if the options are the paper's; a text such as "order: raster here, selection there" if they are
        our defaults; None if the rows cannot be compared.
    """
    name = published.method
    if name is None or len(row.stages) != 1 or row.stages[0]["method"] != name:
        return None
    if name == UNPATCHED:
        return ""
    if not _is_same_budget(row, published, table.visual_tokens or board.facts["visual_tokens"]):
        return None
    ours, theirs = (
        _options(row.stages[0]),
        [_options(own | published.options) for own in table.ran_with.get(name, [{}])],
    )
    if ours in theirs:
        return ""
    defaults = _defaults(name)
    ours, first, *others = (defaults | options for options in (ours, *theirs))
    if ours in (first, *others):
        return ""
    if ours != defaults | _options(published.options):
        return None
    return "; ".join(
        f"{option}: {ours[option]} here, {first[option]} there" for option in first if ours[option] != first[option]
    )


def _is_same_budget(row: Row, published: PublishedRow, tokens: float) -> bool:
    """Compare budgets: the same `keep`, or a share and a count that give the same number of tokens."""
    ours, theirs = row.stages[0].get("keep"), published.keep
    if theirs is None:
        return ours is None and published.fraction is None and published.equivalent_tokens is None
    if isinstance(row.budget, dict):  # solved for a cost, and the paper's budget is no cost
        return False
    if type(ours) is type(theirs):
        return ours == theirs
    requested = None if row.cost is None else row.cost.requested
    return requested is not None and abs(requested - (theirs * tokens if isinstance(theirs, float) else theirs)) < 0.5


def _same_row(row: Row) -> tuple[str, int | float | None]:
    """Return the method and the budget by which papers' averages are found, whatever options they ran with."""
    if len(row.stages) != 1 or isinstance(row.budget, dict):
        return "", None
    return str(row.stages[0]["method"]), row.stages[0].get("keep")


def _options(stage: dict) -> dict:
    """Return the options of a stage other than its budget, its seed, and its positions, which the receipt tells."""
    return {name: value for name, value in stage.items() if name not in ("method", "keep", "seed", "positions")}


def _defaults(method: str) -> dict:
    """Return a method's default options.

    The registry loads torch, so it is imported only for a row whose options are not written as in the table.
    """
    from vlmslim.registry import options_of

    return options_of(method)


def _scale(board: Leaderboard, task: str, unit: str) -> int:
    """Return the factor that turns our score into the paper's unit."""
    return board.scale(task) if unit == "percent" else 1


def _digits(line: Line) -> int:
    """Return as many decimals as the paper prints, but at most two."""
    return min(2, max(1 if abs(line.theirs) >= 10 else 2, len(f"{line.theirs:g}".partition(".")[2])))


def _ours(board: Leaderboard, row: Row, line: Line) -> str:
    """Write our score with its interval, in the paper's unit."""
    return score_text(row.scores[line.task], _scale(board, line.task, line.unit))
