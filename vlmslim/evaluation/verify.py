"""`vlmslim verify`: ask a sample of a run's questions again, in other batches, and report what comes out differently.

A change of answers has one of three causes, and `verify` tells them apart by asking once more as the run did, twice:

- the two repetitions differ: the answers are not deterministic;
- the repetitions equal the run's answers: these depend on the batch size or on the order of the questions;
- neither: something has changed since the run, or the method draws random numbers that no seed of its own decides.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vlmslim.evaluation.config import validated
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.harness import Harness, Sample
from vlmslim.evaluation.inputs import Inputs, changed_parts, shortened
from vlmslim.evaluation.progress import Display
from vlmslim.evaluation.schema import AUTO
from vlmslim.evaluation.store import differences, digest, reading
from vlmslim.evaluation.variants import Variant, classes_of
from vlmslim.evaluation.workers import RayHarness
from vlmslim.io import provenance
from vlmslim.leaderboard.board import UNPATCHED, Leaderboard, open_run
from vlmslim.leaderboard.published import Published, load_papers
from vlmslim.leaderboard.samples import answer_text, question_score
from vlmslim.leaderboard.scores import metric_of

EXACT = ("float32", "float64")  # dtypes in which the size of a batch should not change an answer

NOT_DETERMINISTIC = "the answers change from call to call, so the method or the task is not deterministic"
BATCHES = "the answers depend on the batch size or on the order of the questions"
CHANGED = "something has changed since the run, or the method draws random numbers without a seed of its own"


@dataclass(frozen=True)
class CellCheck:
    """One cell, asked again.

    asked   : questions of the sample
    changed : questions with another answer
    then, now : mean score of the sample; None where single questions have no score
    cause   : why answers changed: `NOT_DETERMINISTIC`, `BATCHES` or `CHANGED`; empty where none changed
    """

    label: str
    task: str
    dtype: str
    asked: int
    changed: int
    then: float | None
    now: float | None
    cause: str = ""

    @property
    def score_changed(self) -> bool:
        """True if the mean score of the sample is another one."""
        return self.then != self.now


@dataclass
class Verification:
    """Findings of `verify`.

    how      : how the questions were asked: size of the sample, batch size, order
    cells    : one for each cell of the run
    changes  : what the run was made with, and is otherwise now: versions, checkpoint, code, weights, tasks
    same     : what is still the same
    published : the unpatched model's scores beside published ones, one sentence each
    """

    how: str
    cells: list[CellCheck] = field(default_factory=list)
    changes: list[str] = field(default_factory=list)
    same: list[str] = field(default_factory=list)
    published: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """True if nothing changed that should not.

        In half precision the kernels round differently for other batch sizes, and a few greedy answers can flip. An
        answer that flips for this reason alone is reported, but it is no failure.
        """
        bad = [cell for cell in self.cells if cell.changed and (cell.dtype in EXACT or cell.cause != BATCHES)]
        return not bad and not self.changes

    def summary(self) -> str:
        """Say in one sentence what came out, dtype by dtype."""
        parts = []
        for dtype in dict.fromkeys(cell.dtype for cell in self.cells):
            own = [cell for cell in self.cells if cell.dtype == dtype]
            asked, changed = sum(cell.asked for cell in own), sum(cell.changed for cell in own)
            scores = sum(cell.score_changed for cell in own)
            parts.append(f"{dtype}: {changed} of {asked} answers and {scores} of {len(own)} scores changed")
        return f"{self.how}. {'; '.join(parts)}"

    def text(self) -> str:
        """Write everything for the terminal."""
        lines = [self.summary() + "."]
        for cell in self.cells:
            if cell.changed or cell.score_changed:
                score = "" if cell.then is None or cell.now is None else f", score {cell.then:.3f}, now {cell.now:.3f}"
                lines.append(
                    f"{cell.label} on {cell.task}: {cell.changed} of {cell.asked} answers changed{score}; {cell.cause}"
                )
        lines += [f"changed since the run: {what}" for what in self.changes]
        lines += [f"the same: {', '.join(self.same)}"] if self.same else []
        lines += self.published
        return "\n".join([*lines, "reproduced" if self.passed else "not reproduced"]) + "\n"


def verify(
    directory: Path | str,
    *,
    questions: int = 16,
    batch_size: int | None = None,
    seed: int = 0,
    workers: str | int | None = None,
    display: Display | None = None,
    harness: Callable[..., Any] | None = None,
) -> Verification:
    """Ask `questions` of each finished cell again, in other batches and in another order, and compare the answers.

    Args:
        directory: output directory of a run, finished or not.
        questions: of each cell: a block of neighbours, the same for all rows of a task.
        batch_size: by default half of the run's; 2 where that is 1.
        seed: places the blocks.
        workers: Ray actors that answer in turn, as in `vlmslim.evaluation.run.run`; by default this process answers.
        display: shows progress.
        harness: makes what evaluates cells; by default `Harness`.

    Raises:
        ConfigError: the directory holds no run with a finished cell, or the run cannot be repeated here.
    """
    make = harness or (Harness if workers is None else partial(RayHarness, workers=workers))
    where = "" if workers is None else f", with --workers {workers}"
    with reading(directory):
        return _Verify(directory, questions, batch_size, seed, display or Display(), make, where).complete()


class _Verify:
    """One call of `verify`."""

    def __init__(
        self,
        directory: Any,
        questions: int,
        batch_size: int | None,
        seed: int,
        display: Display,
        make: Callable[..., Any],
        where: str,
    ):
        self.store, self.run = open_run(directory)
        self.questions, self.seed, self.display = questions, seed, display
        self.shared, self.config = self.run["shared"], self.run["config"]
        grid = [(row["label"], task["task"]) for row in self.config["rows"] for task in self.config["tasks"]]
        self.cells = {place: cell for place in grid if (cell := self.store.cell(*place)) is not None}
        if not self.cells:
            raise ConfigError(f"{directory} has no finished cell yet")
        before = self.shared["batch_size"]
        self.before = min(cell["batch_size"] for cell in self.cells.values()) if before == AUTO else before
        self.batch_size = batch_size or (max(1, self.before // 2) if self.before > 1 else 2)
        self.variants = {label: _variant(cell, self.config) for (label, _), cell in self.cells.items()}
        self.make, self.where = make, where

    def complete(self) -> Verification:
        """Compare what the run was made with, then ask its questions again."""
        with tempfile.TemporaryDirectory() as scratch:
            config = validated(
                {
                    "model": self.shared["model"],
                    "tasks": self.config["tasks"],
                    "methods": ["none"],
                    "baselines": False,
                    "batch_size": self.before,
                    "seed": self.shared["seed"],
                    "include_path": self.config.get("include_path", []),
                    "output": scratch,
                }
            )
            self.harness = self.make(config, self.display.bar)
            found = Verification(
                f"{self.questions} questions of each of {len(self.cells)} cells asked again at batch size "
                f"{self.batch_size} instead of {self.before}, the shortest prompts first{self.where}"
            )
            self._compare_origin(found)
            try:
                self.harness.load()
                self.display.start(len(self.cells), 0, max(map(len, self.variants)))
                for (label, task), cell in self.cells.items():
                    self.display.start_cell(label, task)
                    found.cells.append(self._check(label, task, cell))
                    self.display.finish_cell()
            finally:
                self.harness.close()
        found.published = list(self._published())
        self.store.save_verification(
            {
                "config_hash": digest(self.shared),
                "summary": found.summary(),
                "passed": found.passed,
                "cells": {f"{label}/{task}": cell["samples_sha256"] for (label, task), cell in self.cells.items()},
            }
        )
        return found

    def _compare_origin(self, found: Verification) -> None:
        """Compare versions, checkpoint, code, weights and tasks with what the cells record."""
        inputs = Inputs(self.variants.values(), self.harness.tasks)
        now = {"versions": provenance.versions(), "checkpoint": self.harness.describe_checkpoint()["identity"]}
        for name, value in now.items():
            changed = differences({name: self.shared.get(name)}, {name: value})
            found.changes += changed
            if not changed:
                found.same.append(f"checkpoint {str(value)[:12]}" if name == "checkpoint" else name)
        parts: dict[str, list[str]] = {"code": [], "weights": [], "definition": []}
        for (label, task), cell in self.cells.items():
            made = inputs.made_with(self.variants[label]) | {"definition": inputs.definitions[task]}
            for name, lines in parts.items():
                if files := changed_parts(cell.get(name) or {}, made.get(name) or {}):
                    what = f"the task {task}" if name == "definition" else f"the {name} of {label}"
                    lines.append(f"{what} ({shortened(files)})")
        for name, lines in parts.items():
            found.changes += dict.fromkeys(lines)
            if not lines:
                found.same.append({"definition": "tasks"}.get(name, name))
        found.same.append(f"seed {self.shared['seed']}")

    def _check(self, label: str, task: str, cell: dict) -> CellCheck:
        """Ask the sample of one cell again; where answers change, find the cause."""
        stored = self.store.samples(label, task)
        count = min(self.questions, len(stored))
        draw = np.random.default_rng([self.seed, *task.encode()])
        first = int(draw.integers(len(stored) - count + 1))
        then = {sample["doc_id"]: sample for sample in stored[first : first + count]}
        sample = Sample(first, count, self.batch_size, shortest_first=True)
        now = self._ask(label, task, sample)
        if now.keys() != then.keys():
            raise ConfigError(f"{task} has other questions than when {self.store.directory} was made; run it anew")
        changed = _changed(then, now)
        metric, dtype, cause = self._metric(task, cell), cell["receipt"]["dtype"], ""
        if changed:
            as_before = Sample(first, count, cell.get("batch_size", self.before))
            again, once_more = self._ask(label, task, as_before), self._ask(label, task, as_before)
            repeated = CHANGED if _changed(then, again) else BATCHES
            cause = NOT_DETERMINISTIC if _changed(again, once_more) else repeated
        return CellCheck(label, task, dtype, count, len(changed), _mean(then, metric), _mean(now, metric), cause)

    def _ask(self, label: str, task: str, sample: Sample) -> dict[int, dict]:
        answered = self.harness.ask(self.variants[label], task, sample)
        return {one["doc_id"]: one for one in answered.samples}

    def _metric(self, task: str, cell: dict) -> str:
        wanted = next(entry["metric"] for entry in self.config["tasks"] if entry["task"] == task)
        return metric_of(cell, task, wanted)[0]

    def _published(self) -> Iterator[str]:
        """Set the unpatched model's scores beside published ones of the same protocol."""
        board = Leaderboard.read(self.store.directory)
        compared = Published.compare(board, load_papers())
        lines = [line for line in compared.lines if line.label == UNPATCHED and not line.protocol]
        for line in lines:
            yield (
                f"unpatched on {line.task}: {line.ours:.2f} here, {line.theirs:g} in {line.paper}, {line.table}: "
                f"{line.difference:+.2f}"
            )
        if not lines:
            asked = self.config["limit"]
            why = "of this checkpoint, task and protocol" if asked is None else f"on {asked} questions of each task"
            yield f"unpatched: there is no published number {why} to compare with"


def _variant(cell: dict, config: dict) -> Variant:
    """Make the row of a cell, with the options that it ran with."""
    budget = next(row["budget"] for row in config["rows"] if row["label"] == cell["label"])
    return Variant(cell["label"], tuple(cell["stages"]), budget, cell.get("budget"), classes_of(cell["stages"]))


def _changed(before: dict[int, dict], now: dict[int, dict]) -> list[int]:
    """List the questions whose answer is another one."""
    return [number for number, one in before.items() if answer_text(one) != answer_text(now[number])]


def _mean(samples: dict[int, dict], metric: str) -> float | None:
    scores = [score for one in samples.values() if (score := question_score(one, metric)) is not None]
    return statistics.fmean(scores) if scores else None
