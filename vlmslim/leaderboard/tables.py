"""The leaderboard as tables of text, before any format."""

from dataclasses import dataclass, field

from vlmslim.leaderboard.board import UNPATCHED, Leaderboard
from vlmslim.leaderboard.comparison import LEVEL, RESAMPLES, SWAPS, Pair
from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.scores import Score
from vlmslim.leaderboard.task_groups import GROUPS

NOTHING = "–"
BASELINES = ("random", "uniform")
STAR = "†"  # not an asterisk, which Markdown would read


@dataclass(frozen=True)
class Column:
    """A column of a table: one text per row, and the places that are marked."""

    name: str
    texts: list[str]
    places: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """A table with a title; `rows` are the leaderboard's rows that its lines are about."""

    title: str
    rows: list[Row]
    columns: list[Column]

    def blocks(self) -> list[list[int]]:
        """The numbers of the lines, those of one budget together."""
        blocks: dict = {}
        for number, row in enumerate(self.rows):
            blocks.setdefault((row.label == UNPATCHED, row.budget_name), []).append(number)
        return list(blocks.values())


def tables(board: Leaderboard) -> list[Table]:
    """All tables that have something to say."""
    built = [
        Table("Scores", board.rows, score_columns(board)),
        Table("Cost", board.rows, cost_columns(board)),
        against_unpatched(board),
        task_groups(board),
        *between_methods(board),
    ]
    return [table for table in built if table is not None]


def score_columns(board: Leaderboard) -> list[Column]:
    """Method, budget, each task's score with its interval, the average over the unpatched model's, and the rank."""
    columns = name_columns(board.rows)
    for task in board.tasks:
        scale = board.scale(task)
        texts = [score_text(row.scores.get(task), scale) for row in board.rows]
        columns.append(Column(task, texts, board.places(task)))
    relative = [with_interval(r.relative, r.relative_low, r.relative_high) for r in board.rows]
    rank = [NOTHING if row.rank is None else str(row.rank) for row in board.rows]
    return [*columns, Column("average, % of unpatched", relative, board.places(None)), Column("rank", rank)]


def cost_columns(board: Leaderboard) -> list[Column]:
    """Method, budget and what a cost came to, visual tokens, FLOPs, times, KV-cache bytes, and the Pareto front."""
    rows = board.rows
    tera = max((row.flops or 0) for row in rows) >= 1e11
    unit, name = (1e12, "TFLOPs") if tera else (1e9, "GFLOPs")
    mebi = max((row.kv_bytes or 0) for row in rows) >= 2**20
    bytes_, bytes_name = (2**20, "MiB") if mebi else (2**10, "KiB")
    return [
        *name_columns(rows),
        *_solved_columns(rows),
        Column("tokens asked", [number(r.requested, 1, 1) for r in rows]),
        Column("tokens kept", [_kept_text(r) for r in rows]),
        Column("equivalent tokens", [number(r.equivalent, 1, 1) for r in rows]),
        Column(f"prefill {name}", [_with_ratio(r.flops, r.flops_ratio, 1 / unit, 2) for r in rows]),
        Column("TTFT ms", [_with_ratio(r.ttft_ms, r.ttft_ratio, 1, 1) for r in rows]),
        Column("decode ms/token", [_with_ratio(r.decode_ms, r.decode_ratio, 1, 2) for r in rows]),
        Column("selection ms", [number(r.selection_ms, 1, 2) for r in rows]),
        Column(f"KV cache {bytes_name}", [number(r.kv_bytes, 1 / bytes_, 1) for r in rows]),
        Column("Pareto front", ["both" if len(r.pareto) == 2 else ", ".join(r.pareto) or NOTHING for r in rows]),
    ]


def _solved_columns(rows: list[Row]) -> list[Column]:
    """Beside budgets that are costs: the option that was solved, and what was spent; nothing where no budget is one."""
    if all(row.solved is None for row in rows):
        return []
    solved = [NOTHING if row.solved is None else f"{row.solved['option']}={row.solved['value']:g}" for row in rows]
    return [Column("solved", solved), Column("spent", [_spent_text(row) for row in rows])]


def _spent_text(row: Row) -> str:
    """What a cost really was; shares of the FLOPs are less than one."""
    digits = 3 if row.solved and "flops_ratio" in row.solved["target"] else 1
    return _with_range(*(number(value, 1, digits) for value in (row.spent, row.spent_low, row.spent_high)))


def against_unpatched(board: Leaderboard) -> Table | None:
    """Each method minus the unpatched model on the same questions, and how many answers changed."""
    rows = [row for row in board.rows if row.loyalty is not None]
    if not rows:
        return None
    columns = name_columns(rows)
    for task in board.tasks:
        pairs = [board.comparison.pair(row.label, UNPATCHED, task) for row in rows]
        columns.append(Column(task, [difference_text(pair, board.question_scale(task)) for pair in pairs]))
    average = [board.comparison.pair(row.label, UNPATCHED, None) for row in rows]
    columns += [
        Column("average", [difference_text(pair, 100) for pair in average]),
        Column("p", [p_text(pair) for pair in average]),
        Column("loyalty %", [number(row.loyalty, 100, 1) for row in rows]),
        Column("lost %", [number(row.lost, 100, 1) for row in rows]),
        Column("won %", [number(row.won, 100, 1) for row in rows]),
    ]
    return Table("Against the unpatched model", rows, columns)


def task_groups(board: Leaderboard) -> Table | None:
    """The average relative to the unpatched model, over the tasks of each group."""
    present = set(board.groups.values())
    names = [name for name in GROUPS if name in present] + sorted(present - set(GROUPS))
    rows = [row for row in board.rows if row.groups]
    if len(names) < 2 or not rows:
        return None
    columns = name_columns(rows)
    for name in names:
        ends = [board.comparison.groups.get((row.label, name), (None, None)) for row in rows]
        known = [not any(board.groups[task] == name for task in board.apart)] * len(rows)
        texts = [
            with_interval(row.groups.get(name), *(end if shown else (None, None)))
            for row, end, shown in zip(rows, ends, known, strict=True)
        ]
        columns.append(Column(name, texts))
    return Table("Task groups, % of unpatched", rows, columns)


def between_methods(board: Leaderboard) -> list[Table]:
    """For each budget, every method's average minus every other's."""
    built = []
    for group in board.budgets():
        rows = [row for row in group if row.rank is not None]
        if len(rows) < 2:
            continue
        columns = [Column("row minus column", [row.label for row in rows])]
        for other in rows:
            pairs = [board.comparison.pair(row.label, other.label, None) for row in rows]
            columns.append(Column(other.label, [difference_text(pair, 100) for pair in pairs]))
        built.append(Table(f"Between methods at {rows[0].budget_name}", rows, columns))
    return built


def name_columns(rows: list[Row]) -> list[Column]:
    """Which row a line is about."""
    return [Column("method", [row.label for row in rows]), Column("budget", [row.budget_name for row in rows])]


# ---------------------------------------------------------------------- texts


def number(value: float | None, scale: float, digits: int) -> str:
    """A number in a unit, or a dash."""
    return NOTHING if value is None else f"{value * scale:.{digits}f}"


def score_text(score: Score | None, scale: int) -> str:
    """A score with its interval."""
    if score is None:
        return NOTHING
    return with_interval(score.value, score.low, score.high, scale, digits_of(score.value, scale))


def digits_of(value: float, scale: int) -> int:
    """Decimals that make sense for a score."""
    return 1 if scale == 100 or abs(value) >= 10 else 3


def with_interval(
    value: float | None, low: float | None, high: float | None, scale: int = 100, digits: int = 1, sign: str = ""
) -> str:
    """A number and half its interval's width, or the interval's ends where it is lopsided."""
    if value is None:
        return NOTHING
    text = f"{value * scale:{sign}.{digits}f}"
    if low is None or high is None:
        return text
    half = (high - low) / 2
    if abs((high + low) / 2 - value) > half / 10:
        return f"{text} [{low * scale:{sign}.{digits}f}, {high * scale:{sign}.{digits}f}]"
    return f"{text} ± {half * scale:.{digits}f}"


def difference_text(pair: Pair | None, scale: int) -> str:
    """A signed difference with its interval; marked if it is significant."""
    if pair is None:
        return NOTHING
    text = with_interval(pair.difference, pair.low, pair.high, scale, digits_of(pair.difference, scale), "+")
    return text + (STAR if pair.significant else "")


def p_text(pair: Pair | None) -> str:
    """An adjusted p value."""
    if pair is None:
        return NOTHING
    return "<0.001" if pair.p_adjusted < 0.001 else f"{pair.p_adjusted:.3f}"


def _with_ratio(value: float | None, ratio: float | None, scale: float, digits: int) -> str:
    return number(value, scale, digits) + ("" if ratio is None else f" ({ratio:.2f}x)")


def _kept_text(row: Row) -> str:
    """Tokens that enter the language model, and those left in its last layer if some are dropped on the way."""
    entering, leaving = number(row.kept, 1, 1), number(row.last, 1, 1)
    ranged = _with_range(entering, number(row.kept_low, 1, 0), number(row.kept_high, 1, 0))
    return ranged if entering == leaving else f"{ranged} → {leaving}"


def _with_range(mean: str, low: str, high: str) -> str:
    """A mean, with the range behind it unless that is a single number."""
    return mean if low == high else f"{mean} ({low}–{high})"


def _short(hash: str) -> str:
    """The first digits of a hash, and the mark of a changed working tree."""
    return hash[:12] + ("+" if hash.endswith("+") else "")


# ---------------------------------------------------------------------- notes


def notes(board: Leaderboard) -> list[str]:
    """What a reader must know to use the numbers."""
    facts = board.facts
    shares = [task for task in board.tasks if board.scale(task) == 100]
    limit = "all questions" if facts["limit"] is None else f"the first {facts['limit']} questions of each task"
    names = {board.metrics[task][0] for task in board.tasks}
    metrics = ", ".join(names if len(names) == 1 else [f"{task} = {board.metrics[task][0]}" for task in board.tasks])
    in_percent = "all" if len(shares) == len(board.tasks) else ", ".join(shares)
    lines = [
        f"Scores: {metrics}; in per cent: {in_percent or 'none'}; ± half the 95 % confidence interval, or [its ends] "
        f"where it is lopsided; {limit}. At each budget the best is **bold**, and what is not significantly worse is "
        "*italic*. Rank: by the average, 1 + the number of methods that are significantly better; two of different "
        "ranks need not differ significantly.",
        *_tests_note(board),
        *_solved_note(board),
        f"An image has {facts['visual_tokens']:.1f} visual tokens. Kept: entering the language model (least–most where "
        "images differ) → in its last layer. Equivalent: of a prompt, averaged over the decoder layers. Prefill FLOPs: "
        "language model alone, multiply-add = 2, three-matrix MLP, attention in full; the vision tower adds "
        f"{facts['tower_flops'] / 1e9:.2f} GFLOPs a crop. Pareto front: no row, at any budget, has a better average "
        "for at most as many FLOPs, or equivalent tokens.",
    ]
    if facts["timing"]:
        t = facts["timing"]
        lines.append(
            f"TTFT: time to first token, image encoding and compression included. Medians of {t['prompts']} prompts "
            f"x {t['repeats']} repetitions at batch 1 and {t['new_tokens']} new tokens, all rows in turn in one "
            "process; in brackets the median ratio to the unpatched model. Selection: the method's own part of a "
            "prompt in the evaluation, at its batch size. KV cache: of a prompt, after prefill."
        )
    used = {stage["method"] for row in board.rows for stage in row.stages}
    if missing := [name for name in BASELINES if name not in used]:
        lines.append(f"Not in this run: the baseline {' and '.join(missing)}, which a method has to beat.")
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    commits, configs = (", ".join(map(_short, facts[name])) for name in ("git_commits", "config_hashes"))
    checkpoint = f" ({_short(facts['checkpoint'])})" if facts["checkpoint"] else ""
    lines.append(
        f"{facts['model']}{checkpoint}; seed {facts['seed']}; {versions}; {'; '.join(facts['hardware'])}; "
        f"{'; '.join(facts['backends'])}; "
        f"commit {commits}; config {configs}; cells {facts['cells']}."
    )
    return lines


def _tests_note(board: Leaderboard) -> list[str]:
    """How differences are tested, and what the groups are."""
    comparison = board.comparison
    if not comparison.pairs and not comparison.stability:
        return []
    lines = [
        f"Differences are paired, on the same questions; {STAR} marks significant ones (p < {LEVEL:g}). Tests: exact "
        "McNemar where every question is right or wrong and has a picture of its own, else a permutation test that "
        f"swaps all scores of a picture ({SWAPS}+ swaps). p values are Holm's, over all pairs of a budget within a "
        "column, the unpatched model included. Intervals: Wilson's, on the effective number of questions, for right or "
        f"wrong; else, and of differences, a bootstrap over pictures ({RESAMPLES} resamples). Loyalty: the answer "
        "equals the unpatched model's. Lost, won: the question's score fell, rose."
    ]
    apart = [task for task in board.apart if task not in comparison.untested]
    if board.apart and comparison.averaged:
        lines.append(
            f"Rank, marks, differences and p of the average are by the questions' own scores of: "
            f"{', '.join(comparison.averaged)}. The average shown holds other scores, and may order methods otherwise."
        )
    if apart:
        lines.append(f"The score is not the mean of the questions' own scores, which are tested: {', '.join(apart)}.")
    if comparison.untested:
        lines.append(f"No scores of single questions, so no tests: {', '.join(comparison.untested)}.")
    present = dict.fromkeys(board.groups.values())
    members = [f"{name}: {', '.join(t for t in board.tasks if board.groups[t] == name)}" for name in present]
    return [*lines, f"Groups. {'; '.join(members)}."] if len(members) > 1 else lines


def _solved_note(board: Leaderboard) -> list[str]:
    """What solving a budget means."""
    prompts = sorted({row.solved["prompts"] for row in board.rows if row.solved is not None})
    if not prompts:
        return []
    return [
        f"Budgets that are a cost: an option was solved on {' or '.join(map(str, prompts))} sample prompts; spent is "
        "what the tasks then cost in the budget's currency, their mean (least–most of a task)."
    ]
