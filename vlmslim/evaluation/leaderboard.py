"""The leaderboard: read from an output directory at any time; the same data gives the same bytes."""

import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path

from vlmslim.efficiency import DecoderShape, prefill_flops
from vlmslim.evaluation.comparison import Comparison, TaskAnswers, compare
from vlmslim.evaluation.config import ConfigError
from vlmslim.evaluation.scores import Score, metric_of, score_of, source_of
from vlmslim.evaluation.significance import pareto_front
from vlmslim.evaluation.store import Store, digest
from vlmslim.evaluation.task_groups import GROUPS, group_of

UNPATCHED = "none"
#: What every cell records; weights only those of trained methods.
PROVENANCE = ("config_hash", "seed", "versions", "git_commit", "hardware", "weights")


@dataclass
class Row:
    """One method at one budget. Tokens are per image, and per prompt where layers are averaged.

    budget     : the `keep` or the cost asked for, which groups rows; None for the unpatched model
    scores     : task -> score; tasks that are not finished are missing
    relative   : mean over tasks of the score over the unpatched model's, with its 95 % interval; None until every task
                 is finished
    groups     : group of tasks -> the same mean over its tasks
    rank       : by `relative` within the budget; rows share a rank where no difference is significant
    loyalty, lost, won : answers equal to the unpatched model's, and scores below and above its, as shares of the
                 questions, averaged over tasks
    pareto     : the costs at which no row has a better average for at most the same cost
    stages     : the methods with their options
    provenance : configuration hash, seed, versions, commit, hardware and weights behind the row's cells
    requested, kept, last, equivalent : visual tokens asked for, sent to the language model, left in its last layer,
                 and averaged over its layers
    kept_low, kept_high : fewest and most that an image sent; None in old receipts
    solved     : of a budget that is a cost: the option that was solved, its value, and what the sample prompts cost
    spent, spent_low, spent_high : what the tasks then really cost in that currency: mean, least and most over tasks
    flops      : analytic prefill FLOPs of the language model
    kv_bytes   : of the prompt's KV cache
    selection_ms : measured time that a prompt of the evaluation spent in the methods; None in old receipts
    positions  : what the language model saw, "renumbered" or "original"
    prefill_ms, decode_ms : measured time to first token, and per later token; each with its ratio to the unpatched
    """

    label: str
    budget: int | float | dict | None
    scores: dict[str, Score] = field(default_factory=dict)
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    groups: dict[str, float] = field(default_factory=dict)
    rank: int | None = None
    loyalty: float | None = None
    lost: float | None = None
    won: float | None = None
    pareto: list[str] = field(default_factory=list)
    requested: float | None = None
    kept: float | None = None
    kept_low: int | None = None
    kept_high: int | None = None
    last: float | None = None
    equivalent: float | None = None
    solved: dict | None = None
    spent: float | None = None
    spent_low: float | None = None
    spent_high: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None
    kv_bytes: float | None = None
    selection_ms: float | None = None
    positions: str | None = None
    prefill_ms: float | None = None
    prefill_ratio: float | None = None
    decode_ms: float | None = None
    decode_ratio: float | None = None
    stages: list[dict] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def budget_name(self) -> str:
        """The budget in a word: 64, 0.25, equivalent_tokens=64, or all."""
        if self.budget is None:
            return "all"
        if isinstance(self.budget, dict):
            return ", ".join(f"{name}={value}" for name, value in self.budget.items())
        return str(self.budget)


@dataclass
class Leaderboard:
    """Rows, grouped by budget, the unpatched model first; largest budget next.

    metrics    : task -> (metric, whether higher is better)
    facts      : what the numbers depend on: model, seed, limit, versions, hardware, ...
    comparison : intervals, paired tests and answer flips, question by question
    groups     : task -> its group
    """

    rows: list[Row]
    tasks: list[str]
    metrics: dict[str, tuple[str, bool]]
    facts: dict
    comparison: Comparison = field(default_factory=Comparison)
    groups: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, directory: Path | str) -> "Leaderboard":
        """Build it from what `vlmslim run` wrote so far.

        Raises:
            ConfigError: there is no run in the directory, or its cells answered different questions.
        """
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
        tasks = [task["task"] for task in config["tasks"] if any(key[1] == task["task"] for key in cells)]
        _check_cells(run, cells, tasks)
        wanted = {task["task"]: task["metric"] for task in config["tasks"]}
        first = {task: next(cell for (_, t), cell in cells.items() if t == task) for task in tasks}
        metrics = {task: metric_of(first[task], task, wanted[task]) for task in tasks}
        given = {task["task"]: task.get("group") for task in config["tasks"]}
        groups = {task: given[task] or group_of(task) for task in tasks}
        shape = DecoderShape(**config["checkpoint"]["shape"])
        timing = store.timing or {}
        rows = [Row(entry["label"], entry["budget"], stages=entry["stages"]) for entry in config["rows"]]
        rows.sort(key=_group_order)
        answers = []
        for task in tasks:
            samples = {row.label: store.samples(row.label, task) for row in rows if (row.label, task) in cells}
            for row in rows:
                if row.label in samples:
                    row.scores[task] = score_of(cells[row.label, task], task, metrics[task][0], samples[row.label])
            answers.append(TaskAnswers.collect(task, samples, *metrics[task], source_of(first[task], task)))
        for row in rows:
            own = [cell for (label, _), cell in cells.items() if label == row.label]
            _add_cost(row, [cell["receipt"] for cell in own], shape)
            _add_solution(row, [cell["budget"] for cell in own if "budget" in cell])
            row.stages = own[0]["stages"] if own else row.stages
            if _is_timed(row, own, run, timing):
                _add_times(row, timing["times"][row.label])
            row.provenance = _provenance(own)
        _add_ratios(rows, tasks, metrics, groups)
        board = cls(rows, tasks, metrics, _facts(run, cells, timing), groups=groups)
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
            values = {r.label: _value(r, task) for r in group if r.label != UNPATCHED and _value(r, task) is not None}
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

    def scale(self, task: str) -> int:
        """100 for a score that is a share, shown in per cent; 1 for points such as MME's or CIDEr's above one."""
        return 100 if all(row.scores[task].value <= 1 for row in self.rows if task in row.scores) else 1


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
            raise ConfigError(f"{labels} answered different questions of {task}; start over with --fresh")


def _add_cost(row: Row, receipts: list[dict], shape: DecoderShape) -> None:
    """Tokens, FLOPs and bytes, averaged over the images or prompts of all tasks."""
    images, prompts = sum(r["images"] for r in receipts), sum(r["prompts"] for r in receipts)
    if not images or not prompts:
        return

    def per_image(key: str) -> float | None:
        known = [r for r in receipts if r[key] is not None and r["images"]]
        return sum(r[key] * r["images"] for r in known) / sum(r["images"] for r in known) if known else None

    def per_prompt(values: list[float]) -> float:
        return sum(v * r["prompts"] for v, r in zip(values, receipts, strict=True)) / prompts

    row.requested, row.kept = per_image("requested"), per_image("kept")
    ranges = [r.get("kept_range") for r in receipts if r["images"]]
    if None not in ranges:
        row.kept_low, row.kept_high = min(low for low, _ in ranges), max(high for _, high in ranges)
    row.last = per_prompt([r["visual_tokens_per_layer"][-1] for r in receipts]) * prompts / images
    row.equivalent = per_prompt([r["equivalent_tokens"] for r in receipts])
    row.kv_bytes = per_prompt([r["kv_bytes"] for r in receipts])
    if all("selection_ms" in r for r in receipts):
        row.selection_ms = per_prompt([r["selection_ms"] for r in receipts])
    row.positions = ", ".join(sorted({r["positions"] for r in receipts}))
    lengths = [[v + r["text_tokens"] for v in r["visual_tokens_per_layer"]] for r in receipts]
    row.flops = per_prompt([prefill_flops(shape, length) for length in lengths])


def _add_solution(row: Row, budgets: list[dict]) -> None:
    """What a cost came to, from the records of the row's cells."""
    if budgets:
        spent = [budget["spent"] for budget in budgets]
        row.solved = {name: value for name, value in budgets[0].items() if name != "spent"}
        row.spent, row.spent_low, row.spent_high = statistics.fmean(spent), min(spent), max(spent)


def _is_timed(row: Row, cells: list[dict], run: dict, timing: dict) -> bool:
    """Whether there are times of this very row: of another method, or other weights, of its label they say nothing."""
    settings = timing.get("settings", {})
    weights = [cell["weights"] for cell in cells[:1] if "weights" in cell]
    timed = [row.label, row.stages, *weights] in settings.get("rows", [])
    return timed and settings["config_hash"] == digest(run["shared"])


def _add_times(row: Row, times: dict) -> None:
    for name in ("prefill_ms", "prefill_ratio", "decode_ms", "decode_ratio"):
        setattr(row, name, times[name])


def _add_ratios(rows: list[Row], tasks: list[str], metrics: dict, groups: dict[str, str]) -> None:
    base = next((row for row in rows if row.label == UNPATCHED), None)
    if base is None:
        return
    for row in rows:
        if row.flops and base.flops:
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
    above, below = (ours, theirs) if higher_is_better else (theirs, ours)
    return above / below if below else None  # a task on which the unpatched model gets nothing tells nothing


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


def _value(row: Row, task: str | None) -> float | None:
    if task is None:
        return row.relative
    return row.scores[task].value if task in row.scores else None


def _group_order(row: Row) -> tuple:
    """The unpatched model, then rows without a budget, then counts from the largest, shares, and costs."""
    if isinstance(row.budget, dict):
        return (4, *((name, -value) for name, value in row.budget.items()))
    kind = 1 if row.budget is None else 3 if isinstance(row.budget, float) else 2
    return (0 if row.label == UNPATCHED else kind, -(row.budget or 0))


def _provenance(cells: list[dict]) -> dict[str, str]:
    """What stands behind the cells of a row; several values, if cells differ, are all named."""
    known = {name: sorted({_flat(cell[name]) for cell in cells if name in cell}) for name in PROVENANCE}
    return {name: "; ".join(values) for name, values in known.items() if values}


def _flat(value) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _facts(run: dict, cells: dict, timing: dict) -> dict:
    config = run["config"]

    def distinct(name: str) -> list:
        return sorted({str(cell[name]) for cell in cells.values()})

    receipts = [cell["receipt"] for cell in cells.values()]
    images = sum(r["images"] for r in receipts)
    return {
        "model": config["model"],
        "checkpoint": config["checkpoint"]["identity"],
        "visual_tokens": sum(r["visual_tokens"] * r["images"] for r in receipts) / max(images, 1),
        "tower_flops": config["checkpoint"]["tower_flops"],
        "seed": config["seed"],
        "limit": config["limit"],
        "versions": run["shared"]["versions"],
        "git_commits": distinct("git_commit"),
        "config_hashes": distinct("config_hash"),
        "hardware": distinct("hardware"),
        "backends": sorted({f"{r['backend']} in {r['dtype']}" for r in receipts}),
        "timing": timing.get("settings", {}).get("timing"),
        "cells": f"{len(cells)} of {len(config['rows']) * len(config['tasks'])}",
    }
