"""FLOPs, solved budgets, times and token records of rows, on the first questions of a comparison's tasks."""

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from transformers import BatchFeature

from vlmslim.cost.budget import Solution, Solver
from vlmslim.cost.parts import count_flops
from vlmslim.cost.timing import measure_together, summarise
from vlmslim.evaluation.checkpoint import Checkpoint
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.questions import Questions
from vlmslim.evaluation.recording import images_of, row_of
from vlmslim.evaluation.schema import TimingConfig
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.variants import Variant
from vlmslim.patching import Slim, shared_encoding

COUNTED_PROMPTS = 2  # of a task, on which the FLOPs of a method are counted


class Measurements:
    """Measures rows on a checkpoint. `vlmslim.evaluation.harness.Harness` describes the methods.

    Args:
        config: the comparison.
        checkpoint: its checkpoint.
        tasks: its tasks.
        questions: their questions.
    """

    def __init__(self, config: RunConfig, checkpoint: Checkpoint, tasks: Tasks, questions: Questions):
        self._config, self._checkpoint, self._tasks, self._questions = config, checkpoint, tasks, questions
        self._latest: tuple[str, list[BatchFeature]] | None = None

    def _prompts(self, count: int, tasks: Sequence[str] | None = None) -> list[BatchFeature]:
        """Return the inputs of `generate()` for the first questions of tasks, by default all, taken in turn."""
        return [self._checkpoint.inputs(query) for query in self._questions.first(count, tasks)]

    def _first_prompts(self, task: str) -> list[BatchFeature]:
        if self._latest is None or self._latest[0] != task:
            self._latest = task, self._prompts(COUNTED_PROMPTS, [task])
        return self._latest[1]

    def method_flops(self, variants: Sequence[Variant], task: str) -> dict[str, float]:
        """Count the FLOPs that each method itself needs for a prompt, averaged over the task's first prompts."""
        slims = {variant.label: self._checkpoint.kept_patch(variant) for variant in variants if not variant.unpatched}
        shared = shared_encoding(slims.values())
        counts: dict[str, list[int]] = {variant.label: [] for variant in variants}
        for inputs in self._first_prompts(task):
            for label, slim in slims.items():
                with slim.attach(shared):
                    counts[label].append(count_flops(self._checkpoint.model, inputs)["method"])
        shared.forget()
        return {label: statistics.fmean(own or [0]) for label, own in counts.items()}

    def flops(self, variant: Variant, task: str) -> dict[str, float]:
        """Count the FLOPs of a prefill by part, averaged over the task's first prompts."""
        prompts = self._first_prompts(task)  # read before the patch, because the reader is made on a bare model
        with self._checkpoint.patch(variant):
            counts = [count_flops(self._checkpoint.model, inputs) for inputs in prompts]
        return {part: statistics.fmean(count[part] for count in counts) for part in counts[0]}

    @cached_property
    def _solver(self) -> Solver:
        leaves = len(self._tasks.leaves)
        count = max(self._config.budget_prompts, leaves)
        if self._config.limit is not None:
            count = min(count, self._config.limit * leaves)
        return Solver(self._checkpoint.model, self._prompts(count))

    def solve(self, variant: Variant) -> Solution:
        """Make a method cost its budget."""
        return self._solver.solve(list(variant.stages), **variant.cost)

    def time(self, variants: Sequence[Variant], timing: TimingConfig, tick: Callable[[], object]) -> dict[str, dict]:
        """Measure the time to the first token and per later token of all methods on the same prompts, in turn."""

        def attach(variant: Variant) -> AbstractContextManager:
            tick()
            return nullcontext() if variant.unpatched else self._checkpoint.patch(variant)

        methods = {variant.label: partial(attach, variant) for variant in variants}
        prompts = self._prompts(timing.prompts)
        times = measure_together(self._checkpoint.model, methods, prompts, timing.new_tokens, timing.repeats)
        return {label: summarise(own, times[variants[0].label]) for label, own in times.items()}

    def record(self, variants: Sequence[Variant], task: str, questions: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """Ask questions of a task again under each method, alone, and yield where their visual tokens went."""
        asked = self._questions.asked(task)
        if asked is None:  # a dialogue of several rounds: its later prompts depend on answers
            return
        first = {query.where: query for query in reversed(asked.queries)}
        slims: dict[str, Slim] = {}
        for variant in variants:
            slims[variant.label] = self._checkpoint.patch(variant, record="tokens")
            slims[variant.label].remove()
        answerer, processor = self._checkpoint.answerer, self._checkpoint.processor
        for question in questions:
            batch = answerer.read([first[f"{task} document {question}"]])
            images: list[dict] = []
            rows: dict[str, Any] = {}
            for label, slim in slims.items():
                slim.reset_receipt()
                with slim.attach(), torch.inference_mode():
                    flops = count_flops(self._checkpoint.model, batch.inputs)
                last = slim.receipt.last
                if last is not None and last.traces and last.traces[0]:
                    images = images or images_of(last.traces[0], processor)
                    rows[label] = row_of(last, flops)
            if rows:
                yield question, {"images": images, "rows": rows}
