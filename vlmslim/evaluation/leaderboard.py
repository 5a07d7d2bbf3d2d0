"""The leaderboard: read from an output directory at any time; the same data gives the same bytes."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from vlmslim.efficiency import DecoderShape, prefill_flops
from vlmslim.evaluation.config import ConfigError
from vlmslim.evaluation.store import Store

UNPATCHED = "none"


@dataclass(frozen=True)
class Score:
    """A task's score in its own unit."""

    value: float
    stderr: float | None
    questions: int


@dataclass
class Row:
    """One method at one budget. Tokens are per image, and per prompt where layers are averaged.

    budget     : the `keep` asked for, which groups rows; None for the unpatched model
    scores     : task -> score; tasks that are not finished are missing
    relative   : mean over tasks of the score over the unpatched model's; None until every task is finished
    requested, kept, last, equivalent : visual tokens asked for, sent to the language model, left in its last layer,
                 and averaged over its layers
    flops      : analytic prefill FLOPs of the language model
    kv_bytes   : of the prompt's KV cache
    prefill_ms, decode_ms : measured time to first token, and per later token; each with its ratio to the unpatched
    """

    label: str
    budget: int | float | None
    scores: dict[str, Score] = field(default_factory=dict)
    relative: float | None = None
    requested: float | None = None
    kept: float | None = None
    last: float | None = None
    equivalent: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None
    kv_bytes: float | None = None
    prefill_ms: float | None = None
    prefill_ratio: float | None = None
    decode_ms: float | None = None
    decode_ratio: float | None = None


@dataclass
class Leaderboard:
    """Rows, grouped by budget, the unpatched model first; largest budget next.

    metrics : task -> (metric, whether higher is better)
    facts   : what the numbers depend on: model, seed, limit, versions, hardware, ...
    """

    rows: list[Row]
    tasks: list[str]
    metrics: dict[str, tuple[str, bool]]
    facts: dict

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
        _check_questions(cells, tasks)
        wanted = {task["task"]: task["metric"] for task in config["tasks"]}
        metrics = {task: _metric(cells, task, wanted[task]) for task in tasks}
        shape = DecoderShape(**config["checkpoint"]["shape"])
        timing = store.timing or {}
        rows = []
        for entry in config["rows"]:
            own = {task: cell for (label, task), cell in cells.items() if label == entry["label"]}
            row = Row(entry["label"], entry["budget"])
            row.scores = {t: _score(store, row.label, t, metrics[t][0], own[t]) for t in tasks if t in own}
            _add_cost(row, [cell["receipt"] for cell in own.values()], shape)
            _add_times(row, timing.get("times", {}))
            rows.append(row)
        _add_ratios(rows, tasks, metrics)
        rows.sort(key=_group_order)
        return cls(rows, tasks, metrics, _facts(run, cells, timing))

    def groups(self) -> list[list[Row]]:
        """Rows of one budget each, in order."""
        groups: dict = {}
        for row in self.rows:
            groups.setdefault(row.budget, []).append(row)
        return list(groups.values())

    def places(self, task: str | None) -> dict[str, int]:
        """Label -> 1 (best) or 2 (second best) within its budget, by a task's score or (None) the average.

        Ties share a place; two firsts leave no second, and where all are alike nobody is marked. The unpatched model
        is out of the race.
        """
        sign = 1 if task is None or self.metrics[task][1] else -1
        places = {}
        for group in self.groups():
            values = {r.label: _value(r, task) for r in group if r.label != UNPATCHED and _value(r, task) is not None}
            if len(values) < 2:
                continue
            ranked = sorted(set(values.values()), key=lambda v: -sign * v)
            if len(ranked) == 1:  # nothing tells them apart
                continue
            firsts = [label for label, v in values.items() if v == ranked[0]]
            places |= dict.fromkeys(firsts, 1)
            if len(firsts) == 1:
                places |= {label: 2 for label, v in values.items() if v == ranked[1]}
        return places

    def scale(self, task: str) -> int:
        """100 for a score that is a share, shown in per cent; 1 for points such as MME's or CIDEr's above one."""
        return 100 if all(row.scores[task].value <= 1 for row in self.rows if task in row.scores) else 1


def _check_questions(cells: dict, tasks: list[str]) -> None:
    for task in tasks:
        seen = {cell["questions"]: label for (label, t), cell in cells.items() if t == task}
        if len(seen) > 1:
            labels = " and ".join(seen.values())
            raise ConfigError(f"{labels} answered different questions of {task}; start over with --fresh")


def _metric(cells: dict, task: str, wanted: str | None) -> tuple[str, bool]:
    """The metric of a task, and whether higher is better."""
    first = next(cell for (_, t), cell in cells.items() if t == task)["lmms_eval"]
    higher = first["higher_is_better"].get(task, {})
    reported = [key for key, value in first["results"][task].items() if "," in key and _is_number(value)]
    names = [key.split(",")[0] for key in reported if "_stderr" not in key]
    if wanted is not None and wanted not in names:
        raise ConfigError(f"{task} reports no metric {wanted!r}; it has {', '.join(dict.fromkeys(names))}")
    ordered = [name for name in higher if name in names] or names
    if not ordered:
        raise ConfigError(f"{task} reports no number; take it out, or use its validation split")
    name = wanted or ordered[0]
    return name, higher.get(name) is not False


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _score(store: Store, label: str, task: str, metric: str, cell: dict) -> Score:
    results = cell["lmms_eval"]["results"][task]
    key = next((k for k in results if k.split(",")[0] == metric), None)
    value = results.get(key)
    if not _is_number(value):
        raise ConfigError(f"{label} on {task}: lmms-eval gave {metric} = {value!r}")
    stderr = results.get(key.replace(metric, f"{metric}_stderr", 1))
    samples = store.samples(label, task)
    if not _is_number(stderr):
        stderr = _stderr_of_mean(samples, metric, value)
    return Score(float(value), None if stderr is None else float(stderr), len(samples))


def _stderr_of_mean(samples: list[dict], metric: str, value: float) -> float | None:
    """The standard error of a score that is the mean of its questions' scores; None for any other."""
    scores = [sample.get(metric) for sample in samples]
    scores = [score.get("score") if isinstance(score, dict) else score for score in scores]
    scores = [float(s) for s in scores if isinstance(s, bool) or _is_number(s)]
    if len(scores) < 2 or len(scores) != len(samples):
        return None
    if not math.isclose(statistics.fmean(scores), value, rel_tol=1e-6):
        return None
    return statistics.stdev(scores) / math.sqrt(len(scores))


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
    row.last = per_prompt([r["visual_tokens_per_layer"][-1] for r in receipts]) * prompts / images
    row.equivalent = per_prompt([r["equivalent_tokens"] for r in receipts])
    row.kv_bytes = per_prompt([r["kv_bytes"] for r in receipts])
    lengths = [[v + r["text_tokens"] for v in r["visual_tokens_per_layer"]] for r in receipts]
    row.flops = per_prompt([prefill_flops(shape, length) for length in lengths])


def _add_times(row: Row, times: dict) -> None:
    for name in ("prefill_ms", "prefill_ratio", "decode_ms", "decode_ratio"):
        setattr(row, name, times.get(row.label, {}).get(name))


def _add_ratios(rows: list[Row], tasks: list[str], metrics: dict) -> None:
    base = next((row for row in rows if row.label == UNPATCHED), None)
    if base is None:
        return
    for row in rows:
        if row.flops and base.flops:
            row.flops_ratio = row.flops / base.flops
        if all(task in row.scores and task in base.scores for task in tasks):
            ratios = [_ratio(row.scores[t].value, base.scores[t].value, metrics[t][1]) for t in tasks]
            known = [ratio for ratio in ratios if ratio is not None]
            row.relative = statistics.fmean(known) if known else None


def _ratio(ours: float, theirs: float, higher_is_better: bool) -> float | None:
    above, below = (ours, theirs) if higher_is_better else (theirs, ours)
    return above / below if below else None  # a task on which the unpatched model gets nothing tells nothing


def _value(row: Row, task: str | None) -> float | None:
    if task is None:
        return row.relative
    return row.scores[task].value if task in row.scores else None


def _group_order(row: Row) -> tuple:
    """The unpatched model, then rows without a budget, then counts from the largest, then shares."""
    kind = 1 if row.budget is None else 3 if isinstance(row.budget, float) else 2
    return (0 if row.label == UNPATCHED else kind, -(row.budget or 0))


def _facts(run: dict, cells: dict, timing: dict) -> dict:
    config = run["config"]

    def distinct(name: str) -> list:
        return sorted({str(cell[name]) for cell in cells.values()})

    receipts = [cell["receipt"] for cell in cells.values()]
    return {
        "model": config["model"],
        "checkpoint": config["checkpoint"]["identity"],
        "visual_tokens": statistics.fmean(r["visual_tokens"] for r in receipts),
        "tower_flops": config["checkpoint"]["tower_flops"],
        "seed": config["seed"],
        "limit": config["limit"],
        "versions": run["shared"]["versions"],
        "git_commits": distinct("git_commit"),
        "config_hashes": distinct("config_hash"),
        "hardware": distinct("hardware"),
        "timing": timing.get("settings", {}).get("timing"),
        "cells": f"{len(cells)} of {len(config['rows']) * len(config['tasks'])}",
    }
