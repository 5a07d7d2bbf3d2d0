"""The leaderboard: read from an output directory at any time; the same data gives the same bytes."""

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmslim.cost.flops import DecoderShape
from vlmslim.evaluation.config import ConfigError
from vlmslim.evaluation.store import Store, digest
from vlmslim.leaderboard.comparison import Comparison, TaskAnswers, compare
from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.scores import metric_of, score_of, source_of
from vlmslim.leaderboard.significance import pareto_front
from vlmslim.leaderboard.task_groups import GROUPS, group_of

UNPATCHED = "none"


@dataclass
class Leaderboard:
    """Rows, grouped by budget, the unpatched model first; largest budget next.

    metrics    : task -> (metric, whether higher is better)
    facts      : what the numbers depend on: model, seed, limit, versions, hardware, ...
    comparison : intervals, paired tests and answer flips, question by question
    groups     : task -> its group
    tokens     : task -> visual tokens of an image before compression
    """

    rows: list[Row]
    tasks: list[str]
    metrics: dict[str, tuple[str, bool]]
    facts: dict
    comparison: Comparison = field(default_factory=Comparison)
    groups: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path | str) -> "Leaderboard":
        """Build it from what `vlmslim run` wrote so far.

        Raises:
            ConfigError: there is no run in the directory, or its cells answered different questions.
        """
        if not Path(directory).is_dir():
            what = "is a file" if Path(directory).exists() else "does not exist"
            raise ConfigError(f"{directory} {what}; give the output directory of a vlmslim run")
        store = Store(directory)
        run = store.run
        if run is None:
            raise ConfigError(f"{directory} holds no readable run.json: is it the output directory of a vlmslim run?")
        config = run["config"]
        cells = {
            (row["label"], task["task"]): cell
            for row in config["rows"]
            for task in config["tasks"]
            if (cell := store.cell(row["label"], task["task"])) is not None
        }
        if not cells:
            raise ConfigError(f"{directory} has no finished cell yet")
        damaged = [
            f"{row['label']} / {task['task']}"
            for row in config["rows"]
            for task in config["tasks"]
            if store.is_damaged(row["label"], task["task"])
        ]
        tasks = [task["task"] for task in config["tasks"] if any(key[1] == task["task"] for key in cells)]
        _check_cells(run, cells, tasks)
        wanted = {task["task"]: task["metric"] for task in config["tasks"]}
        first = {task: next(cell for (_, t), cell in cells.items() if t == task) for task in tasks}
        metrics = {task: metric_of(first[task], task, wanted[task]) for task in tasks}
        given = {task["task"]: task.get("group") for task in config["tasks"]}
        groups = {task: given[task] or group_of(task) for task in tasks}
        shape = DecoderShape(**config["checkpoint"]["shape"])
        timing = store.timing
        timing = timing if timing and timing["settings"]["config_hash"] == digest(run["shared"]) else {}
        own = {label: [cell for (owner, _), cell in cells.items() if owner == label] for label, _ in cells}
        rows = [Row.read(entry, own.get(entry["label"], []), shape, timing) for entry in config["rows"]]
        rows.sort(key=_group_order)
        answers = []
        for task in tasks:
            samples = {row.label: store.samples(row.label, task) for row in rows if (row.label, task) in cells}
            for row in rows:
                if row.label in samples:
                    row.scores[task] = score_of(cells[row.label, task], task, metrics[task][0], samples[row.label])
            answers.append(TaskAnswers.collect(task, samples, *metrics[task], source_of(first[task], task)))
        _add_ratios(rows, tasks, metrics, groups)
        tokens = {task: _visual_tokens([cell for (_, t), cell in cells.items() if t == task]) for task in tasks}
        board = cls(rows, tasks, metrics, _facts(run, cells, timing, damaged), groups=groups, tokens=tokens)
        budgets = [[row.label for row in group if row.label != UNPATCHED] for group in board.budgets()]
        board.comparison = compare(answers, [budget for budget in budgets if budget], UNPATCHED, groups)
        _add_comparison(rows, tasks, board.comparison)
        _add_fronts(rows)
        return board

    def budgets(self) -> list[list[Row]]:
        """Rows of one budget each, in order; the unpatched model comes first, by itself."""
        groups: dict = {}
        for row in self.rows:
            groups.setdefault((row.label == UNPATCHED, row.budget_name), []).append(row)
        return list(groups.values())

    def places(self, task: str | None) -> dict[str, int]:
        """Label -> 1 (best of its budget) or 2 (not significantly worse), by a task's score or (None) the average.

        Equal values share the first place. Where all are alike nobody is marked, and the unpatched model is out of the
        race.
        """
        sign = 1 if task is None or self.metrics[task][1] else -1
        places = {}
        for group in self.budgets():
            values = {r.label: self._value(r, task) for r in group if r.label != UNPATCHED}
            values = {label: value for label, value in values.items() if value is not None}
            if len(set(values.values())) < 2:  # nothing tells them apart
                continue
            best = max(values, key=lambda label: sign * values[label])
            for label, value in values.items():
                pair = self.comparison.pair(best, label, task)
                if value == values[best]:
                    places[label] = 1
                elif pair is not None and not pair.significant:
                    places[label] = 2
        return places

    def _value(self, row: Row, task: str | None) -> float | None:
        """What places go by; for the average what is tested, if that is not what is shown."""
        if task is not None:
            return row.scores[task].value if task in row.scores else None
        pair = self.comparison.pair(row.label, UNPATCHED, None)
        return row.relative if pair is None or row.relative is None or not self.apart else pair.difference

    @property
    def apart(self) -> list[str]:
        """Tasks by which the average that is shown differs from the one that is tested and ranked."""
        means = self.comparison.means
        return [
            task
            for task in self.tasks
            if not all(
                row.scores[task].is_close_to(means.get((row.label, task))) for row in self.rows if task in row.scores
            )
        ]

    def scale(self, task: str) -> int:
        """100 for a score that is a share, shown in per cent; 1 for points such as MME's or CIDEr's above one."""
        return 100 if all(row.scores[task].value <= 1 for row in self.rows if task in row.scores) else 1

    def question_scale(self, task: str) -> int:
        """The same for the scores of a task's questions, which may be shares where the task's score is in points."""
        means = [self.comparison.means.get((row.label, task)) for row in self.rows]
        return 100 if all(mean is None or mean <= 1 for mean in means) else 1


def _check_cells(run: dict, cells: dict, tasks: list[str]) -> None:
    """Refuse cells of another configuration or of two trainings, and cells that answered different questions."""
    shared = digest(run["shared"])
    stages = {  # a cost is solved later, on the model
        row["label"]: None if isinstance(row["budget"], dict) else row["stages"] for row in run["config"]["rows"]
    }
    for (label, task), cell in cells.items():
        if cell["config_hash"] != shared or stages[label] not in (None, cell["stages"]):
            raise ConfigError(f"{label} on {task} was made under another configuration; start over with --fresh")
    weights: dict[str, dict | None] = {}
    for (label, _), cell in cells.items():
        if weights.setdefault(label, cell.get("weights")) != cell.get("weights"):
            raise ConfigError(f"the cells of {label} were made with different weights; call vlmslim run again")
    for task in tasks:
        seen = {cell["questions"]: label for (label, t), cell in cells.items() if t == task}
        if len(seen) > 1:
            labels = " and ".join(seen.values())
            raise ConfigError(
                f"{labels} answered different questions of {task}, or under other settings; start over with --fresh"
            )
        ways = {digest(cell.get("definition")): label for (label, t), cell in cells.items() if t == task}
        if len(ways) > 1:
            labels = " and ".join(ways.values())
            raise ConfigError(
                f"{task} was changed between {labels}: its settings, its functions or its data; call vlmslim run again "
                "with the task as it was, or with --fresh"
            )


def _add_ratios(rows: list[Row], tasks: list[str], metrics: dict, groups: dict[str, str]) -> None:
    base = next((row for row in rows if row.label == UNPATCHED), None)
    if base is None:
        return
    for row in rows:
        if row.flops and base.flops and row.scores.keys() == base.scores.keys():  # else of other prompts
            row.flops_ratio = row.flops / base.flops
        if all(task in row.scores and task in base.scores for task in tasks):
            ratios = {t: _ratio(row.scores[t].value, base.scores[t].value, metrics[t][1]) for t in tasks}
            known = {task: ratio for task, ratio in ratios.items() if ratio is not None}
            row.relative = statistics.fmean(known.values()) if known else None
            for group in sorted(dict.fromkeys(groups[task] for task in known), key=_known_first):
                row.groups[group] = statistics.fmean(r for task, r in known.items() if groups[task] == group)


def _known_first(group: str) -> tuple[int, str]:
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS), group)


def _ratio(ours: float, theirs: float, higher_is_better: bool) -> float | None:
    if not theirs:
        return None  # a task on which the unpatched model gets nothing tells nothing
    return ours / theirs if higher_is_better else 2 - ours / theirs


def _add_comparison(rows: list[Row], tasks: list[str], comparison: Comparison) -> None:
    """Replace the intervals of scores that are a mean of questions, and add what the questions tell about each row."""
    for row in rows:
        means = [t for t, score in row.scores.items() if score.is_close_to(comparison.means.get((row.label, t)))]
        for task in means:
            low, high = comparison.intervals[row.label, task]
            row.scores[task] = replace(row.scores[task], low=low, high=high)
        row.rank = comparison.ranks.get(row.label)
        if row.relative is not None and means == tasks:
            row.relative_low, row.relative_high = comparison.relative.get(row.label, (None, None))
        known = [comparison.stability[row.label, task] for task in tasks if (row.label, task) in comparison.stability]
        if len(known) == len(tasks):
            row.loyalty = statistics.fmean(one.loyalty for one in known)
            if all(one.lost is not None for one in known):
                row.lost, row.won = (statistics.fmean(getattr(one, name) for one in known) for name in ("lost", "won"))


def _add_fronts(rows: list[Row]) -> None:
    """Mark the rows that no other row beats, at any budget."""
    for name, attribute in (("FLOPs", "flops_ratio"), ("equivalent tokens", "equivalent")):
        placed = [row for row in rows if row.relative is not None and getattr(row, attribute) is not None]
        if not placed:
            continue
        front = pareto_front([getattr(row, attribute) for row in placed], [row.relative for row in placed])
        for row, on_it in zip(placed, front, strict=True):
            if on_it:
                row.pareto.append(name)


def _group_order(row: Row) -> tuple:
    """The unpatched model, then rows without a budget, then counts from the largest, shares, and costs."""
    if isinstance(row.budget, dict):
        return (4, *((name, -value) for name, value in row.budget.items()))
    kind = 1 if row.budget is None else 3 if isinstance(row.budget, float) else 2
    return (0 if row.label == UNPATCHED else kind, -(row.budget or 0))


def _visual_tokens(cells: list[dict]) -> float:
    """Of an image, before compression."""
    receipts = [cell["receipt"] for cell in cells]
    return sum(r["visual_tokens"] * r["images"] for r in receipts) / max(sum(r["images"] for r in receipts), 1)


def _facts(run: dict, cells: dict, timing: dict, damaged: list[str]) -> dict:
    config = run["config"]

    def distinct(name: str) -> list:
        return sorted({str(cell[name]) for cell in cells.values()})

    receipts = [cell["receipt"] for cell in cells.values()]
    redone = f" (damaged, will be redone: {', '.join(damaged)})" if damaged else ""
    return {
        "model": config["model"],
        "checkpoint": config["checkpoint"]["identity"],
        "visual_tokens": _visual_tokens(list(cells.values())),
        "tower_flops": config["checkpoint"]["tower_flops"],
        "seed": config["seed"],
        "limit": config["limit"],
        "versions": run["shared"]["versions"],
        "git_commits": distinct("git_commit"),
        "config_hashes": distinct("config_hash"),
        "hardware": distinct("hardware"),
        "backends": sorted({f"{r['backend']} in {r['dtype']}" for r in receipts}),
        "timing": timing.get("settings", {}).get("timing"),
        "cells": f"{len(cells)} of {len(config['rows']) * len(config['tasks'])}{redone}",
    }
