"""Drives lmms-eval for `vlmslim run`: one loaded checkpoint, evaluated and timed under many methods."""

import copy
import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

import vlmslim
from vlmslim.cost.budget import Solution, Solver
from vlmslim.cost.parts import count_flops
from vlmslim.cost.timing import measure_together, summarise
from vlmslim.evaluation import preflight
from vlmslim.evaluation.answering import Answerer, batches_of
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.lmms_model import VlmSlim
from vlmslim.evaluation.progress import Bar, Display, MakeBar, output_to
from vlmslim.evaluation.queries import Query, naming_all, query_of
from vlmslim.evaluation.recording import images_of, row_of
from vlmslim.evaluation.replay import Replay, requests_hash
from vlmslim.evaluation.schema import TimingConfig
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.variants import Variant
from vlmslim.io.provenance import hardware
from vlmslim.patching import Slim, shared_encoding
from vlmslim.receipt import Receipt

#: lmms-eval's own default on the command line; its Python API would leave reasoning tags in the answers.
REASONING_TAGS = '[["<think>", "</think>"], ["<analysis>", "</analysis>"]]'

UNPATCHED = Variant("none", ({"method": "none"},))

#: Task -> the methods whose cells are missing.
Todo = Mapping[str, Sequence[Variant]]

COUNTED_PROMPTS = 2  # of a task, on which the FLOPs of a method are counted


@dataclass(frozen=True)
class Cell:
    """What evaluating one method on one task gave.

    protocol     : how pictures and prompts were prepared, as `vlmslim.originals.protocol.describe` says it
    method_flops : of the method itself, for a prompt
    seconds      : the method's own, and an equal part of what the methods shared
    hardware     : that answered; "" for that of this process
    """

    results: dict
    samples: list[dict]
    receipt: dict
    protocol: dict = field(default_factory=dict)
    method_flops: float = 0.0
    seconds: float = 0.0
    hardware: str = ""


@dataclass
class Answers:
    """What one method answered to the requests of a task.

    kind    : of the requests: "generate_until" or "loglikelihood"
    hash    : `requests_hash` of the requests
    results : by the number of the request
    receipt : of these answers alone
    whole   : the finished cell, where lmms-eval had to ask on and on; then there are no results
    failure : why there are none
    protocol, method_flops, seconds, hardware : as in `Cell`
    """

    kind: str = ""
    hash: str = ""
    results: dict[int, GenerationResult] = field(default_factory=dict)
    receipt: Receipt | None = None
    protocol: dict = field(default_factory=dict)
    method_flops: float = 0.0
    seconds: float = 0.0
    hardware: str = ""
    whole: Cell | None = None
    failure: Exception | None = None

    @classmethod
    def merged(cls, parts: "Sequence[Answers]") -> "Answers":
        """Put the parts of a task together, in their order.

        Raises:
            RuntimeError: the parts answer different questions.
        """
        first = next((part for part in parts if part.failure is not None), parts[0])
        if len(parts) == 1 or first.failure is not None:
            return first
        if len({part.hash for part in parts}) > 1:
            raise RuntimeError("the task asks other questions on another machine; give all machines the same data")
        return replace(
            first,
            results={number: result for part in parts for number, result in part.results.items()},
            receipt=Receipt.pooled([part.receipt for part in parts if part.receipt is not None]),
            seconds=sum(part.seconds for part in parts),
        )


@dataclass(frozen=True)
class Asked:
    """The requests of a task, of one `kind`, and their `hash`."""

    kind: str
    queries: list[Query]
    hash: str


@dataclass(frozen=True)
class Sample:
    """Some questions of a task, and how they are asked.

    first, count   : the block of questions; a count of None means all that follow
    batch_size     : by default the comparison's
    shortest_first : ask the shortest prompts first, so that other prompts share a batch
    """

    first: int = 0
    count: int | None = None
    batch_size: int | None = None
    shortest_first: bool = False


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
        self._latest: tuple[str, Asked | None] | None = None
        self._patches: dict[Variant, Slim] = {}
        self._shuffled: dict[str, Any] = {}
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
    def _answerer(self) -> tuple[Answerer, dict]:
        """What reads and answers batches, and the protocol by which it does."""
        lm = self._lm(UNPATCHED)
        lm.clean()
        return lm.answerer, lm.protocol

    @cached_property
    def _hardware(self) -> str:
        return hardware(self.config.model.device)

    def _bar(self, total: int) -> AbstractContextManager[Bar]:
        return (self._make_bar or Display().bar)(total=total, desc="vlmslim")

    @cached_property
    def _solver(self) -> Solver:
        count = max(self.config.budget_prompts, len(self.tasks.leaves))
        if self.config.limit is not None:
            count = min(count, self.config.limit * len(self.tasks.leaves))
        return Solver(self.model, self._prompts(count))

    def _lm(self, variant: Variant, batch_size: int | None = None) -> VlmSlim:
        """Make the lmms-eval model of one method. lmms-eval discards it after use, but the checkpoint stays."""
        model, processor = self._checkpoint
        passed_on = {"max_frames_num", "system_prompt"}
        options = {name: value for name, value in self.config.model.arguments().items() if name in passed_on}
        batch_size = batch_size or self.config.batch_size
        lm = VlmSlim(model, list(variant.stages), batch_size, processor=processor, **options)
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
        """Evaluate one method on one task, by itself."""
        answers = self.answer([variant], task)[variant.label]
        return self.cell(variant, task, answers)

    def check_split(self, todo: Todo) -> None:
        """Check how the missing cells are split; one process splits nothing."""

    def close(self) -> None:
        """Let go of what `load` started."""

    def answer_all(
        self, todo: Todo, begin: Callable[[str, str], object]
    ) -> Iterator[tuple[str, "dict[str, Answers] | Exception"]]:
        """Answer whole tasks, one after the other; yield each with the answers of its methods, or with what failed.

        `begin` is called with what is at work, and where.
        """
        for task, variants in todo.items():
            begin(variants[0].label if len(variants) == 1 else f"{len(variants)} methods", task)
            try:
                yield task, self.answer(variants, task)
            except Exception as error:
                yield task, error

    def answer(self, variants: Sequence[Variant], task: str, part: int = 0, parts: int = 1) -> "dict[str, Answers]":
        """Answer the requests of a task under each method. The methods take turns on each batch, which is encoded once.

        What they share are the pictures, their preprocessing, the vision tower and the projector, of one batch at a
        time. A method that fails sits out the rest, and its answers carry the failure.

        Args:
            variants: the methods.
            task: by its name.
            part: of the task, from 0. Parts are made of whole batches of the task, so that they change no answer.
            parts: that the task has; see `batches`.
        """
        asked = self.asked(task)
        if asked is None:
            return {variant.label: self._answer_alone(variant, task) for variant in variants}
        flops = self._method_flops(variants, task) if part == 0 else dict.fromkeys(v.label for v in variants)
        slims = {variant.label: self._removed_patch(variant) for variant in variants}
        shared = shared_encoding(slims.values())
        answerer, protocol = self._answerer
        answers = {
            label: Answers(
                asked.kind, asked.hash, protocol=protocol, method_flops=flops[label] or 0.0, hardware=self._hardware
            )
            for label in slims
        }
        batches = list(enumerate(batches_of(asked.queries, self.config.batch_size)))[part::parts]
        started, own = time.perf_counter(), 0.0
        with self._bar(len(variants) * sum(len(own) for _, own in batches)) as bar, torch.inference_mode():
            for number, batch in batches:
                queries = [asked.queries[i] for i in batch]
                with naming_all(queries):
                    read = answerer.read(queries)
                for label, slim in slims.items():
                    turn, begun = answers[label], time.perf_counter()
                    if turn.failure is None:
                        torch.manual_seed(self.config.seed + number)  # so a batch draws the same after any other
                        try:
                            with slim.attach(shared), naming_all(queries):
                                turn.results.update(zip(batch, answerer.answer(read), strict=True))
                        except Exception as error:
                            turn.failure = error
                    turn.seconds += time.perf_counter() - begun
                    own += time.perf_counter() - begun
                    bar.update(len(batch))
        common = (time.perf_counter() - started - own) / len(variants)
        shared.forget()
        for label, slim in slims.items():
            answers[label].receipt, answers[label].seconds = copy.copy(slim.receipt), answers[label].seconds + common
        return answers

    def batches(self, task: str) -> int | None:
        """Count the batches of a task, the most parts that it can have; None if its questions depend on answers."""
        asked = self.asked(task)
        return None if asked is None else len(batches_of(asked.queries, self.config.batch_size))

    def cell(self, variant: Variant, task: str, answers: "Answers") -> Cell:
        """Grade the answers of a method to a task, with the settings that lmms-eval's command line would use.

        Raises:
            Exception: what happened while the questions were answered, or what lmms-eval raises.
        """
        if answers.failure is not None:
            raise answers.failure
        if answers.whole is not None:
            return replace(answers.whole, seconds=answers.seconds, hardware=answers.hardware)
        assert answers.receipt is not None
        results = [answers.results[number] for number in range(len(answers.results))]
        graded, samples = self._evaluated(Replay(answers.kind, results, answers.hash), variant, task)
        return Cell(
            graded,
            samples,
            answers.receipt.summary(),
            answers.protocol,
            answers.method_flops,
            answers.seconds,
            answers.hardware,
        )

    def ask(self, variant: Variant, task: str, sample: Sample) -> Cell:
        """Evaluate a method on a sample of a task's questions, by itself and through lmms-eval alone."""
        lm = self._lm(variant, sample.batch_size)
        lm.shortest_first = sample.shortest_first
        try:
            graded, samples = self._evaluated(lm, variant, task, sample)
        finally:
            if hasattr(lm, "model"):  # the evaluation failed half-way: take the patch off
                lm.clean()
        return Cell(graded, samples, lm.receipt, lm.protocol)

    def _evaluated(
        self, lm: lmms, variant: Variant, task: str, sample: Sample | None = None
    ) -> tuple[dict, list[dict]]:
        """Let lmms-eval evaluate a model; return its results and the samples."""
        from lmms_eval.evaluator import simple_evaluate

        config = self.config
        sample = sample or Sample(count=config.limit)
        seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
        with output_to(config.output / "lmms_eval.log"):
            results = simple_evaluate(
                model=lm,
                tasks=[self._shuffled.get(task, task)],
                task_manager=self.tasks.manager,
                batch_size=sample.batch_size or config.batch_size,
                limit=sample.count,
                offset=sample.first,
                log_samples=True,
                cli_args=Namespace(
                    output_path=str(config.output / "cells" / variant.label),  # some tasks write submission files
                    process_with_media=False,
                    reasoning_tags=REASONING_TAGS,
                ),
                verbosity="ERROR",
                **dict.fromkeys(seeds, config.seed),
            )
        samples = results.pop("samples")[task]
        for name in ("date", "git_hash", "git_branch", "throughput", "usage", "efficiency"):
            results.pop(name, None)
        return results, samples

    def _answer_alone(self, variant: Variant, task: str) -> "Answers":
        """Evaluate a task whose questions depend on the answers: dialogues of several rounds."""
        lm, started = self._lm(variant), time.perf_counter()
        answers = Answers(hardware=self._hardware)
        try:
            graded, samples = self._evaluated(lm, variant, task)
            flops = self._method_flops([variant], task)[variant.label]
            answers.whole = Cell(graded, samples, lm.receipt, lm.protocol, flops)
        except Exception as error:
            answers.failure = error
        finally:
            if hasattr(lm, "model"):  # the evaluation failed half-way: take the patch off
                lm.clean()
        answers.seconds = time.perf_counter() - started
        return answers

    def asked(self, task: str) -> "Asked | None":
        """Return the requests of a task as lmms-eval makes them; None if they depend on answers."""
        if self._latest is None or self._latest[0] != task:
            self._latest = task, self._requests(task)
        return self._latest[1]

    def _requests(self, task: str) -> "Asked | None":
        from lmms_eval.tasks import get_task_dict

        seed = self.config.seed
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        with output_to(self.config.output / "lmms_eval.log"):
            (loaded,) = get_task_dict([task], self.tasks.manager, "simple").values()
            if loaded.get_config("num_fewshot") is None:
                loaded.set_config(key="num_fewshot", value=0)
            loaded.set_fewshot_seed(seed=seed)
            loaded.build_all_requests(limit=self.config.limit, rank=0, world_size=1)
        requests = [request for request in loaded.instances for _ in range(request.repeats)]
        kinds = {request.request_type for request in requests}
        if len(kinds) > 1 or not kinds <= {"generate_until", "loglikelihood"}:
            return None
        queries = [query_of(request, {task: loaded.dataset}, simple=True) for request in requests]
        return Asked(kinds.pop(), queries, requests_hash(requests))

    def _removed_patch(self, variant: Variant) -> Slim:
        """Return the patch of a row, ready to be attached. Patches are kept, because some load weights."""
        if variant not in self._patches:
            self._patches[variant] = vlmslim.patch(self.model, list(variant.stages))
            self._patches[variant].remove()
        self._patches[variant].reset_receipt()
        return self._patches[variant]

    def _method_flops(self, variants: Sequence[Variant], task: str) -> dict[str, float]:
        """Count the FLOPs that each method itself needs for a prompt, averaged over the task's first prompts."""
        if task not in self._first_prompts:
            self._first_prompts = {task: self._prompts(COUNTED_PROMPTS, [task])}
        slims = {variant.label: self._removed_patch(variant) for variant in variants if not variant.unpatched}
        shared = shared_encoding(slims.values())
        counts: dict[str, list[int]] = {variant.label: [] for variant in variants}
        for inputs in self._first_prompts[task]:
            for label, slim in slims.items():
                with slim.attach(shared):
                    counts[label].append(count_flops(self.model, inputs)["method"])
        shared.forget()
        return {label: statistics.fmean(own or [0]) for label, own in counts.items()}

    def flops(self, variant: Variant, task: str) -> dict[str, float]:
        """Count the FLOPs of a prefill by part (`vlmslim.cost.parts`), averaged over the task's first prompts."""
        if task not in self._first_prompts:
            self._first_prompts = {task: self._prompts(COUNTED_PROMPTS, [task])}
        with vlmslim.patch(self.model, list(variant.stages)):
            counts = [count_flops(self.model, inputs) for inputs in self._first_prompts[task]]
        return {part: statistics.fmean(count[part] for count in counts) for part in counts[0]}

    def shuffle(self) -> dict[str, int]:
        """Put the questions of each task into a random order from now on, those within the limit only.

        Returns:
            How many questions each task has then.
        """
        from lmms_eval.tasks import get_task_dict

        counts = {}
        for number, leaf in enumerate(self.tasks.leaves):
            with output_to(self.config.output / "lmms_eval.log"):
                (task,) = get_task_dict([leaf.task], self.tasks.manager, "simple").values()
            split = task.config.test_split if task.has_test_docs() else task.config.validation_split
            total = len(task.eval_docs)
            counts[leaf.task] = count = min(self.config.limit or total, total)
            order = np.random.default_rng([self.config.seed, number]).permutation(count)
            for data in {id(data): data for data in (task.dataset, task.dataset_no_image)}.values():  # may be one
                data[split] = data[split].select(order)
            self._shuffled[leaf.task] = task
        return counts

    def record(self, variants: Sequence[Variant], task: str, questions: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """Ask questions of a task again under each method, alone, and yield where their visual tokens went.

        Args:
            variants: the rows.
            task: of the questions.
            questions: their numbers, lmms-eval's `doc_id`. Those without a picture are left out.

        Yields:
            A question, and its `images` and `rows` as `vlmslim.evaluation.recording` writes them.
        """
        asked = self.asked(task)
        if asked is None:  # a dialogue of several rounds: its later prompts depend on answers
            return
        first = {query.where: query for query in reversed(asked.queries)}
        slims: dict[str, Slim] = {}
        for variant in variants:
            slims[variant.label] = vlmslim.patch(self.model, list(variant.stages), record="tokens")
            slims[variant.label].remove()
        answerer, processor = self._answerer[0], self._checkpoint[1]
        for question in questions:
            batch = answerer.read([first[f"{task} document {question}"]])
            images: list[dict] = []
            rows = {}
            for label, slim in slims.items():
                slim.reset_receipt()
                with slim.attach(), torch.inference_mode():
                    flops = count_flops(self.model, batch.inputs)
                last = slim.receipt.last
                if last is not None and last.traces and last.traces[0]:
                    images = images or images_of(last.traces[0], processor)
                    rows[label] = row_of(last, flops)
            if rows:
                yield question, {"images": images, "rows": rows}

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

        lm = self._lm(UNPATCHED)
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
