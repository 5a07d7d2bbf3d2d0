"""Drives lmms-eval for `vlmslim run`: one loaded checkpoint, evaluated and timed under many methods."""

import statistics
from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import vlmslim
from vlmslim.cost.budget import Solution, Solver
from vlmslim.cost.parts import count_flops
from vlmslim.cost.timing import measure_together, summarise
from vlmslim.evaluation import preflight
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.lmms_model import VlmSlim
from vlmslim.evaluation.progress import MakeBar, output_to
from vlmslim.evaluation.schema import TimingConfig
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.variants import Variant

#: lmms-eval's own default on the command line; its Python API would leave reasoning tags in the answers.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'

COUNTED_PROMPTS = 2  # of a task, on which the FLOPs of a method are counted


@dataclass(frozen=True)
class Cell:
    """What evaluating one method on one task gave.

    protocol : how pictures and prompts were prepared, as `vlmslim.originals.protocol.describe` says it
    """

    results: dict
    samples: list[dict]
    receipt: dict
    protocol: dict = field(default_factory=dict)


class Harness:
    """A checkpoint and the tasks of a comparison. The checkpoint is loaded when it is first needed.

    Args:
        config: the comparison.
        make_bar: makes a progress bar for the questions of a cell.

    Raises:
        ConfigError: a task or a metric does not exist.
    """

    def __init__(self, config: RunConfig, make_bar: MakeBar | None = None):
        self.config, self._make_bar = config, make_bar
        self._first_prompts: dict[str, list[Any]] = {}
        self.tasks = Tasks(config)

    def describe_checkpoint(self) -> dict:
        """Return what is known before the checkpoint is loaded; see `preflight.describe_checkpoint`."""
        return preflight.describe_checkpoint(self.config.model)

    def load(self) -> None:
        """Load the checkpoint, if it is not loaded yet.

        Raises:
            OSError, TypeError, ValueError: it cannot be loaded, or no method can be attached to it.
        """
        _ = self._checkpoint

    @cached_property
    def _checkpoint(self) -> tuple[Any, Any]:
        """The model and its processor."""
        first = VlmSlim(**self.config.model.arguments())
        loaded = first.model, first.processor
        first.clean()
        return loaded

    @property
    def model(self) -> Any:
        """The loaded model. Between two calls no method is attached to it."""
        return self._checkpoint[0]

    @cached_property
    def _solver(self) -> Solver:
        count = max(self.config.budget_prompts, len(self.tasks.leaves))
        if self.config.limit is not None:
            count = min(count, self.config.limit * len(self.tasks.leaves))
        return Solver(self.model, self._prompts(count))

    def _lm(self, variant: Variant) -> VlmSlim:
        """Make the lmms-eval model of one method. lmms-eval discards it after use, but the checkpoint stays."""
        model, processor = self._checkpoint
        passed_on = {"max_frames_num", "system_prompt"}
        options = {name: value for name, value in self.config.model.arguments().items() if name in passed_on}
        lm = VlmSlim(model, list(variant.stages), self.config.batch_size, processor=processor, **options)
        if self._make_bar is not None:
            lm.make_bar = self._make_bar
        return lm

    def check_method(self, variant: Variant) -> None:
        """Attach a row to the model and take it off again, so that all that it loads is opened once.

        Raises:
            Exception: whatever the method raises.
        """
        vlmslim.patch(self.model, list(variant.stages)).remove()

    def check_task(self, task: str) -> None:
        """Open the data of a task.

        Raises:
            Exception: whatever lmms-eval or the task raises.
        """
        from lmms_eval.tasks import get_task_dict

        with output_to(self.config.output / "lmms_eval.log"):
            get_task_dict([task], self.tasks.manager, "simple")

    def evaluate(self, variant: Variant, task: str) -> Cell:
        """Evaluate one cell through lmms-eval, with the settings that its command line would use."""
        from lmms_eval.evaluator import simple_evaluate

        lm, config = self._lm(variant), self.config
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        try:
            with output_to(config.output / "lmms_eval.log"):
                results = simple_evaluate(
                    model=lm,
                    tasks=[task],
                    task_manager=self.tasks.manager,
                    batch_size=config.batch_size,
                    limit=config.limit,
                    log_samples=True,
                    cli_args=Namespace(
                        output_path=str(config.output / "cells" / variant.label),  # some tasks write submission files
                        process_with_media=False,
                        reasoning_tags=REASONING_TAGS,
                    ),
                    verbosity="ERROR",
                    **dict.fromkeys(seeds, config.seed),
                )
        finally:
            if hasattr(lm, "model"):  # the evaluation failed half-way: take the patch off
                lm.clean()
        samples = results.pop("samples")[task]
        for name in ("date", "git_hash", "git_branch", "throughput", "usage", "efficiency"):
            results.pop(name, None)
        return Cell(results, samples, lm.receipt, lm.protocol)

    def method_flops(self, variant: Variant, task: str) -> float:
        """Count the FLOPs that a method itself needs for a prompt, averaged over the task's first prompts."""
        if variant.unpatched:
            return 0.0
        if task not in self._first_prompts:
            self._first_prompts[task] = self._prompts(COUNTED_PROMPTS, [task])
        with vlmslim.patch(self.model, list(variant.stages)):
            return statistics.fmean(count_flops(self.model, inputs)["method"] for inputs in self._first_prompts[task])

    def solve(self, variant: Variant) -> Solution:
        """Make a method cost its budget, on the first questions of the tasks, taken in turn.

        Raises:
            BudgetError: no value of its option does.
        """
        return self._solver.solve(list(variant.stages), **variant.cost)

    def time(self, variants: Sequence[Variant], timing: TimingConfig, tick: Callable[[], object]) -> dict[str, dict]:
        """Measure the time to the first token and per later token of all methods on the same prompts, in turn.

        Args:
            variants: the rows; ratios are to the first.
            timing: how many prompts, repetitions and tokens.
            tick: is called before every measurement.

        Returns:
            The times of each label.
        """

        def attach(variant: Variant) -> AbstractContextManager:
            tick()
            return nullcontext() if variant.unpatched else vlmslim.patch(self.model, list(variant.stages))

        methods = {variant.label: partial(attach, variant) for variant in variants}
        prompts = self._prompts(timing.prompts)
        times = measure_together(self.model, methods, prompts, timing.new_tokens, timing.repeats)
        return {label: summarise(own, times[variants[0].label]) for label, own in times.items()}

    def _prompts(self, count: int, tasks: Sequence[str] | None = None) -> list[Any]:
        """Return the inputs of `generate()` for the first questions of tasks, by default all, taken in turn."""
        from lmms_eval.tasks import get_task_dict

        lm = self._lm(Variant("none", ({"method": "none"},)))
        names = list(tasks or [task.task for task in self.tasks.leaves])[:count]
        per_task = -(-count // len(names))
        numbered: list[tuple[int, Any]] = []
        try:
            with output_to(self.config.output / "lmms_eval.log"):
                loaded = get_task_dict(names, self.tasks.manager, "simple")
                for task in loaded.values():
                    task.build_all_requests(limit=per_task, rank=0, world_size=1)
            for name, task in loaded.items():
                lm.task_dict[name] = task.dataset
                firsts: dict[int, Any] = {}  # a multiple-choice question makes one request a choice
                for request in task.instances:
                    firsts.setdefault(request.doc_id, request)
                numbered += enumerate(firsts.values())
            numbered.sort(key=lambda pair: pair[0])
            return [lm.inputs([request]) for _, request in numbered[:count]]
        finally:
            lm.clean()
