"""The leaderboard as tables of text, before any file format."""

from collections.abc import Callable
from dataclasses import dataclass, field

from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.comparison import Pair, Stability
from vlmslim.leaderboard.costs import fronts
from vlmslim.leaderboard.rows import Cost, Row, Solved, Times
from vlmslim.leaderboard.scores import Estimate, Score
from vlmslim.leaderboard.task_groups import GROUPS

NOTHING = "–"
STAR = "†"  # marks a significant difference; Markdown would read an asterisk as emphasis
_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1)  # of p values that are upper bounds
IDLE = "‡"  # marks a row with a stage that never acted


@dataclass(frozen=True)
class Column:
    """One column of a table.

    texts  : one text per row
    medals : label -> 1 for the best row, 2 for a row that is not significantly worse
    task   : the task whose questions the texts are about; None if they are not about one task
    """

    name: str
    texts: list[str]
    medals: dict[str, int] = field(default_factory=dict)
    task: str | None = None


@dataclass(frozen=True)
class Table:
    """A table with a title; line i is about `rows[i]` of the leaderboard."""

    title: str
    rows: list[Row]
    columns: list[Column]

    def blocks(self) -> list[list[int]]:
        """Return the numbers of the lines, one list for each budget."""
        blocks: dict[str, list[int]] = {}
        for number, row in enumerate(self.rows):
            blocks.setdefault(row.block, []).append(number)
        return list(blocks.values())


def tables(board: Leaderboard) -> list[Table]:
    """Build all tables that have content."""
    built = [
        Table("Scores", board.rows, score_columns(board)),
        Table("Cost", board.rows, cost_columns(board)),
        against_unpatched(board),
        task_groups(board),
        *between_methods(board),
    ]
    return [table for table in built if table is not None]


def score_columns(board: Leaderboard) -> list[Column]:
    """Build the columns of scores, of the average relative to the unpatched model's, and of the rank."""
    columns = [*name_columns(board.rows), positions_column(board.rows)]
    for task in board.tasks:
        scale = board.scale(task)
        texts = [score_text(row.scores.get(task), scale) for row in board.rows]
        columns.append(Column(task, texts, board.medals(task), task))
    averages = {
        "unpatched": ("average, % of unpatched", [row.relative for row in board.rows]),
        "vision-retained": ("vision-retained, %", [row.vision for row in board.rows]),
        "hard": ("hard subset, % of unpatched", [row.hard for row in board.rows]),
    }
    for kind, (name, values) in averages.items():
        if kind == "unpatched" or any(values):
            medals = board.medals(None) if kind == board.ranked_by else {}
            columns.append(Column(name, list(map(with_interval, values)), medals))
    return [*columns, Column("rank", [NOTHING if row.rank is None else str(row.rank) for row in board.rows])]


def cost_columns(board: Leaderboard) -> list[Column]:
    """Build the columns of solved budgets, visual tokens, FLOPs, times, KV-cache bytes and the Pareto front."""
    rows = board.rows
    most_flops = max((row.cost.flops for row in rows if row.cost), default=0.0)
    most_bytes = max((row.cost.kv_bytes for row in rows if row.cost), default=0.0)
    flops, flops_name = (1e12, "TFLOPs") if most_flops >= 1e11 else (1e9, "GFLOPs")
    size, size_name = (2**20, "MiB") if most_bytes >= 2**20 else (2**10, "KiB")

    def cost(name: str, text: Callable[[Cost], str]) -> Column:
        return Column(name, [NOTHING if row.cost is None else text(row.cost) for row in rows])

    def times(name: str, text: Callable[[Times], str]) -> Column:
        return Column(name, [NOTHING if row.times is None else text(row.times) for row in rows])

    prefill = [NOTHING if r.cost is None else _with_ratio(r.cost.flops / flops, r.flops_ratio, 2) for r in rows]
    return [
        *name_columns(rows),
        *_solved_columns(rows),
        cost("nominal tokens", lambda cost: number(cost.nominal, 1, 1)),
        cost("tokens kept", kept_text),
        cost("equivalent tokens", lambda cost: number(cost.equivalent, 1, 1)),
        Column(f"prefill {flops_name}", prefill),
        cost(f"method {flops_name}", lambda cost: number(cost.method_flops, 1 / flops, 3)),
        times("TTFT ms", lambda times: _with_ratio(times.ttft_ms, times.ttft_ratio, 1)),
        times("decode ms/token", lambda times: _with_ratio(times.decode_ms, times.decode_ratio, 2)),
        cost("selection ms", lambda cost: number(cost.selection_ms, 1, 2)),
        cost(f"KV cache {size_name}", lambda cost: number(cost.kv_bytes / size, 1, 1)),
        Column("Pareto front", _front_texts(rows)),
    ]


def _front_texts(rows: list[Row]) -> list[str]:
    """Name the costs by which each row is on the Pareto front."""
    every = fronts(rows)
    return ["all" if len(every) > 1 and row.pareto == every else ", ".join(row.pareto) or NOTHING for row in rows]


def against_unpatched(board: Leaderboard) -> Table | None:
    """Build the table of each method minus the unpatched model, with loyalty and flips."""
    known = [(row, row.stability) for row in board.rows if row.stability is not None]
    if not known:
        return None
    rows = [row for row, _ in known]
    columns = name_columns(rows)
    for task in board.tasks:
        pairs = [board.comparison.pair(row.label, UNPATCHED, task) for row in rows]
        texts = [difference_text(pair, board.question_scale(task)) for pair in pairs]
        columns.append(Column(task, texts, task=task))
    average = [board.comparison.pair(row.label, UNPATCHED, None) for row in rows]

    def per_cent(name: str, share: Callable[[Stability], float | None]) -> Column:
        return Column(name, [number(share(stability), 100, 1) for _, stability in known])

    columns += [
        Column("average", [difference_text(pair, 100) for pair in average]),
        Column("p", [p_text(pair) for pair in average]),
        per_cent("loyalty %", lambda stability: stability.loyalty),
        per_cent("lost %", lambda stability: stability.lost),
        per_cent("won %", lambda stability: stability.won),
    ]
    return Table("Against the unpatched model", rows, columns)


def task_groups(board: Leaderboard) -> Table | None:
    """Build the table of averages over the tasks of each group; None where all tasks are in one group."""
    present = set(board.groups.values())
    names = [name for name in GROUPS if name in present] + sorted(present - set(GROUPS))
    rows = [row for row in board.rows if row.groups]
    if len(names) < 2 or not rows:
        return None
    columns = [Column(name, [with_interval(row.groups.get(name)) for row in rows]) for name in names]
    return Table("Task groups, % of unpatched", rows, name_columns(rows) + columns)


def between_methods(board: Leaderboard) -> list[Table]:
    """Build one table for each budget: every method's average minus every other's."""
    built = []
    for group in board.budgets():
        rows = [row for row in group if row.rank is not None]
        if len(rows) < 2:
            continue
        columns = [Column("row minus column", list(map(_name, rows)))]
        for other in rows:
            pairs = [board.comparison.pair(row.label, other.label, None) for row in rows]
            columns.append(Column(_name(other), [difference_text(pair, 100) for pair in pairs]))
        built.append(Table(f"Between methods at {rows[0].budget_name}", rows, columns))
    return built


def name_columns(rows: list[Row]) -> list[Column]:
    """Build the two columns that identify a row."""
    return [Column("method", list(map(_name, rows))), Column("budget", [row.budget_name for row in rows])]


def positions_column(rows: list[Row]) -> Column:
    """Build the column of the rotary positions that the language model saw; nothing where nothing was dropped."""
    known = [NOTHING if row.cost is None or row.label == UNPATCHED else row.cost.positions for row in rows]
    return Column("positions", known)


def _name(row: Row) -> str:
    """Write the label of a row, with a mark if one of its stages never acted."""
    return row.label + (f" {IDLE}" if any(stage.never_acted for stage in row.activity) else "")


def _solved_columns(rows: list[Row]) -> list[Column]:
    """Build the columns of budgets that are costs; none where no budget is a cost."""
    solved = [row.solved for row in rows]
    if not any(solved):
        return []
    options = [NOTHING if one is None else one.text("g") for one in solved]
    return [Column("solved", options), Column("spent", [NOTHING if one is None else _spent(one) for one in solved])]


# ---------------------------------------------------------------------- texts


def number(value: float | None, scale: float, digits: int) -> str:
    """Write a number in a unit, or a dash."""
    return NOTHING if value is None else f"{value * scale:z.{digits}f}"


def score_text(score: Score | None, scale: int) -> str:
    """Write a score with its interval."""
    return NOTHING if score is None else with_interval(score, scale, digits_of(score.value, scale))


def digits_of(value: float, scale: int) -> int:
    """Return how many decimals of a score are meaningful."""
    return 1 if scale == 100 or abs(value) >= 10 else 3


def with_interval(estimate: Estimate | None, scale: int = 100, digits: int = 1, sign: str = "") -> str:
    """Write a number ± half of its interval, or with both ends where the interval is not symmetric."""
    if estimate is None:
        return NOTHING
    value, low, high = estimate.value, estimate.low, estimate.high
    text = f"{value * scale:{sign}z.{digits}f}"
    if low is None or high is None:
        return text
    half = (high - low) / 2
    if abs((high + low) / 2 - value) > half / 10:
        return f"{text} [{low * scale:{sign}z.{digits}f}, {high * scale:{sign}z.{digits}f}]"
    return f"{text} ± {half * scale:.{digits}f}"


def difference_text(pair: Pair | None, scale: int) -> str:
    """Write a difference with its sign, its interval, and a mark if it is significant."""
    if pair is None:
        return NOTHING
    estimate = Estimate(pair.difference, pair.low, pair.high)
    return with_interval(estimate, scale, digits_of(pair.difference, scale), "+") + (STAR if pair.significant else "")


def p_text(pair: Pair | None) -> str:
    """Write an adjusted p value; one that random swaps cannot tell from smaller ones is written as an upper bound."""
    if pair is None:
        return NOTHING
    p = pair.p_adjusted
    if p < 0.001 or (pair.at_limit and p < 1):
        return f"<{next(bound for bound in _BOUNDS if p <= bound):g}"
    return f"{p:.3f}"


def _with_ratio(value: float, ratio: float | None, digits: int) -> str:
    return f"{value:.{digits}f}" + ("" if ratio is None else f" ({ratio:.2f}x)")


def kept_text(cost: Cost) -> str:
    """Write the tokens that enter the language model, and those left in its last layer if they are fewer."""
    entering, leaving = number(cost.kept, 1, 1), number(cost.last, 1, 1)
    ranged = _with_range(entering, number(cost.kept_low, 1, 0), number(cost.kept_high, 1, 0))
    return ranged if entering == leaving else f"{ranged} → {leaving}"


def _spent(solved: Solved) -> str:
    """Write what the tasks cost; a share is at most one and needs more digits."""
    (wanted,) = solved.solution["target"].values()
    digits = 3 if wanted <= 1 else 1
    return _with_range(*(number(value, 1, digits) for value in (solved.spent, solved.spent_low, solved.spent_high)))


def _with_range(mean: str, low: str, high: str) -> str:
    """Write a mean with its range, unless the range is a single number."""
    return mean if low == high else f"{mean} ({low}–{high})"
