"""The axes of the Pareto chart: what a row costs, and how good its answers are."""

from dataclasses import dataclass

import numpy as np

from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.scores import Estimate
from vlmslim.leaderboard.significance import pareto_front
from vlmslim.leaderboard.task_groups import known_first


@dataclass(frozen=True)
class Axis:
    """One number of each row, with its interval where that is known.

    name   : with its unit, as a reader sees it
    values : of each row of the leaderboard, in order; None where the number is not known
    sign   : 1 if higher values are better, else -1
    """

    name: str
    values: list[Estimate | None]
    sign: int = 1

    def known(self) -> bool:
        """Tell whether the axis tells rows apart."""
        return len({value.value for value in self.values if value is not None}) > 1


def cost_axes(board: Leaderboard) -> list[Axis]:
    """Return the costs that the leaderboard knows; lower is better."""
    costs, times = [row.cost for row in board.rows], [row.times for row in board.rows]
    axes = [
        _cost("prefill FLOPs with the method, x of unpatched", [row.work_ratio for row in board.rows]),
        _cost("equivalent tokens", [cost.equivalent if cost else None for cost in costs]),
        _cost("nominal tokens", [cost.nominal if cost else None for cost in costs]),
        _cost("visual tokens kept", [cost.kept if cost else None for cost in costs]),
        _cost("time to first token, ms", [time.ttft_ms if time else None for time in times]),
        _cost("time per later token, ms", [time.decode_ms if time else None for time in times]),
        _cost("KV cache, KiB", [cost.kv_bytes / 2**10 if cost else None for cost in costs]),
    ]
    return [axis for axis in axes if axis.known()]


def quality_axes(board: Leaderboard) -> list[Axis]:
    """Return the averages and scores that the leaderboard knows: all tasks, their groups, each task."""
    axes = [Axis("average, % of unpatched", [_scaled(row.relative, 100) for row in board.rows])]
    axes.append(Axis("vision-retained, %", [_scaled(row.vision, 100) for row in board.rows]))
    axes.append(Axis("hard subset, % of unpatched", [_scaled(row.hard, 100) for row in board.rows]))
    groups = sorted({group for row in board.rows for group in row.groups}, key=known_first)
    for group in groups if len(groups) > 1 else []:
        axes.append(Axis(f"{group}, % of unpatched", [_scaled(row.groups.get(group), 100) for row in board.rows]))
    for task in board.tasks:
        name, higher_is_better = board.metrics[task]
        scale = board.scale(task)
        scores = [_scaled(row.scores.get(task), scale) for row in board.rows]
        unit = ", %" if scale == 100 else ""
        axes.append(Axis(f"{task} ({name}{unit})", scores, 1 if higher_is_better else -1))
    return [axis for axis in axes if axis.known()]


def front(cost: Axis, quality: Axis) -> list[bool]:
    """Find the rows that no other row beats in both: at most its cost, at least as good, and better in one."""
    placed = [
        (i, x.value, quality.sign * y.value)
        for i, (x, y) in enumerate(zip(cost.values, quality.values, strict=True))
        if x is not None and y is not None
    ]
    on_front = [False] * len(cost.values)
    if placed:
        numbers, costs, values = zip(*placed, strict=True)
        for number, is_best in zip(numbers, pareto_front(np.array(costs), np.array(values)), strict=True):
            on_front[number] = bool(is_best)
    return on_front


def _cost(name: str, values: list[float | None]) -> Axis:
    return Axis(name, [None if value is None else Estimate(value) for value in values], -1)


def _scaled(estimate: Estimate | None, scale: int) -> Estimate | None:
    if estimate is None:
        return None
    low, high = (None if end is None else end * scale for end in (estimate.low, estimate.high))
    return Estimate(estimate.value * scale, low, high)
