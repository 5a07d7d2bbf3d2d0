"""Costs of rows, counted in four ways, and the pairs of methods whose order depends on the way of counting."""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.scores import Estimate
from vlmslim.leaderboard.significance import pareto_front

if TYPE_CHECKING:
    from vlmslim.leaderboard.board import Leaderboard

#: name of a cost -> the cost of a row; None where it is not known
COSTS: dict[str, Callable[[Row], float | None]] = {
    "nominal tokens": lambda row: None if row.cost is None else row.cost.nominal,
    "equivalent tokens": lambda row: None if row.cost is None else row.cost.equivalent,
    "FLOPs": lambda row: row.work_ratio,
    "TTFT": lambda row: None if row.times is None else row.times.ttft_ratio,
}


def _relative(row: Row) -> Estimate | None:
    return row.relative


def add_fronts(rows: Sequence[Row], average: Callable[[Row], Estimate | None] = _relative) -> None:
    """Note in each row the costs at which no other row, at any budget, beats it.

    Args:
        rows: of a leaderboard.
        average: what counts as a row's value; by default the average relative to the unpatched model.
    """
    for name, cost_of in COSTS.items():
        known = [(row, cost_of(row), average(row)) for row in rows]
        placed = [(row, cost, value.value) for row, cost, value in known if cost is not None and value is not None]
        if placed:
            cost, value = np.array([(cost, value) for _, cost, value in placed]).T
            for (row, *_), on_front in zip(placed, pareto_front(cost, value), strict=True):
                if on_front:
                    row.pareto.append(name)


def fronts(rows: Sequence[Row]) -> list[str]:
    """Return the costs by which there is a Pareto front."""
    return [name for name in COSTS if any(name in row.pareto for row in rows)]


def front_changes(rows: Sequence[Row]) -> list[str]:
    """Say which rows are on the front by some costs and not by others."""
    known = fronts(rows)
    changing = [row for row in rows if row.pareto and len(row.pareto) < len(known)]
    return [
        f"{row.label} by {_listed(row.pareto)}, not by {_listed([name for name in known if name not in row.pareto])}"
        for row in changing
    ]


def spans(rows: Sequence[Row]) -> str:
    """Say how far the costs of rows of one budget lie apart: `TTFT 0.51 (random-64) to 0.72 (aim-64)`.

    Costs that differ by at most 2 % are left out.
    """
    parts = []
    for name, cost_of in COSTS.items():
        costs = sorted([(cost, row.label) for row in rows if (cost := cost_of(row)) is not None])
        if len(costs) > 1 and costs[-1][0] > 1.02 * costs[0][0]:
            (low, cheapest), (high, dearest) = costs[0], costs[-1]
            digits = 1 if name.endswith("tokens") else 2
            parts.append(f"{name} {low:.{digits}f} ({cheapest}) to {high:.{digits}f} ({dearest})")
    return ", ".join(parts)


def order_changes(board: "Leaderboard") -> Iterator[tuple[str, str, str, str]]:
    """Find pairs of methods whose order is another at two budgets, one of them a cost and the other not the same kind.

    A pair counts if its difference is significant at one of the two budgets at least.

    Yields:
        The first method, which is ahead at the first budget, the second, which is ahead at the other, and the budgets.
    """
    ranked = [[row for row in group if row.rank is not None] for group in board.budgets()]
    groups = [group for group in ranked if len(group) > 1]
    for i, here in enumerate(groups):
        for there in groups[i + 1 :]:
            if _kind(here[0]) != _kind(there[0]):
                yield from _swaps(board, here, there)


def _swaps(board: "Leaderboard", here: list[Row], there: list[Row]) -> Iterator[tuple[str, str, str, str]]:
    """Find the pairs of methods whose order differs between two budgets."""
    others = {_method(row): row for row in there}
    common = [(row, others[_method(row)]) for row in here if _method(row) in others]
    for place, (first, first_there) in enumerate(common):
        for second, second_there in common[place + 1 :]:
            pairs = [
                board.comparison.pair(first.label, second.label, None),
                board.comparison.pair(first_there.label, second_there.label, None),
            ]
            if any(pair is None for pair in pairs) or not any(pair and pair.significant for pair in pairs):
                continue
            before, after = (pair.difference for pair in pairs if pair)
            if before * after < 0:
                better, worse = (first, second) if before > 0 else (second, first)
                yield better.label, worse.label, here[0].budget_name, there[0].budget_name


def _kind(row: Row) -> tuple[str, ...]:
    """Return what a budget counts."""
    return tuple(row.budget) if isinstance(row.budget, dict) else ("keep",)


def _method(row: Row) -> str:
    """Describe what a row does apart from its budget."""
    solved = None if row.solved is None else row.solved.solution["option"]
    left_out = {"keep", solved}
    return repr([sorted((k, repr(v)) for k, v in stage.items() if k not in left_out) for stage in row.stages])


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
