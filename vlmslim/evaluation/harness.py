"""Drives lmms-eval for `vlmslim run`: one loaded checkpoint, evaluated and timed under many methods."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from vlmslim.cost.budget import Solution
from vlmslim.evaluation import preflight
from vlmslim.evaluation.answering import batches_of
from vlmslim.evaluation.cells import Answers, Asked, Cell, Sample, Todo
from vlmslim.evaluation.checkpoint import Checkpoint
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.measuring import Measurements
from vlmslim.evaluation.progress import Bar, Display, MakeBar
from vlmslim.evaluation.queries import RequestError
from vlmslim.evaluation.questions import Questions
from vlmslim.evaluation.replay import Replay
from vlmslim.evaluation.schema import AUTO, TimingConfig
from vlmslim.evaluation.store import reading
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.turns import Turns, ran_out_of_memory
from vlmslim.evaluation.units import Outcomes, Unit, split
from vlmslim.evaluation.variants import Variant

if TYPE_CHECKING:
    from vlmslim.evaluation.parts import Parts

#: Most prompts of a batch that `batch_size: auto` tries. A GPU says when its memory is full. A CPU machine ends the
#: process instead, and larger batches hardly run faster there.
LARGEST, LARGEST_ON_CPU = 128, 8


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
        self.tasks = Tasks(config)
        self._questions = Questions(config, self.tasks)
        self._checkpoint = Checkpoint(config, make_bar)
        self._fitting: dict[str, int] = {}  # task -> prompts of a batch that fit so far
        self._measurements = Measurements(config, self._checkpoint, self.tasks, self._questions)

    # ------------------------------------------------------------------ the checkpoint and the tasks

    def describe_checkpoint(self) -> dict:
        """Return what is known before the checkpoint is loaded; see `preflight.describe_checkpoint`."""
        return preflight.describe_checkpoint(self.config.model)

    def load(self) -> None:
        """Load the checkpoint, if it is not loaded yet.

        Raises:
            OSError, TypeError, ValueError: it cannot be loaded, or no method can be attached to it.
        """
        _ = self.model

    @property
    def model(self) -> Any:
        """The loaded model. Between two calls no method is attached to it."""
        return self._checkpoint.model

    def close(self) -> None:
        """Let go of what `load` started."""

    def check_method(self, variant: Variant) -> None:
        """Attach a row to the model and take it off again, so that all that it loads is opened once.

        Raises:
            Exception: whatever the method raises.
        """
        self._checkpoint.patch(variant).remove()

    def check_task(self, task: str) -> None:
        """Open the data of a task.

        Raises:
            Exception: whatever lmms-eval or the task raises.
        """
        self._questions.open([task])

    def check_split(self, todo: Todo) -> None:
        """Check how the missing cells are split; one process splits nothing."""

    def asked(self, task: str) -> Asked | None:
        """Return the requests of a task as lmms-eval makes them; None if they depend on answers."""
        return self._questions.asked(task)

    def largest_batch(self) -> int:
        """Return the prompts of a batch; with `batch_size: auto`, the most that are tried."""
        if self.config.batch_size != AUTO:
            return self.config.batch_size
        most = LARGEST_ON_CPU if self.model.device.type == "cpu" else LARGEST
        return min(most, self.config.resources.shard or most)

    def batches(self, task: str) -> int | None:
        """Count the batches of a task, the most parts that it can have; None if its questions depend on answers."""
        asked = self.asked(task)
        return None if asked is None else len(batches_of(asked.queries, self.largest_batch()))

    def shuffle(self) -> dict[str, int]:
        """Put the questions of each task into a random order from now on, those within the limit only.

        Returns:
            How many questions each task has then.
        """
        return self._questions.shuffle()

    # ------------------------------------------------------------------ answers

    def answer_all(
        self, todo: Todo, begin: Callable[[str, str], object], parts: "Parts | None" = None
    ) -> Iterator[tuple[str, dict[str, Answers] | Exception]]:
        """Answer whole tasks, one after the other; yield each with the answers of its methods, or with what failed.

        Args:
            todo: the tasks, and the methods that are to answer each.
            begin: is called with what is at work, and where.
            parts: keeps each part that is answered, and has those that were answered before; by default nothing does.
        """
        for task, variants in todo.items():
            begin(variants[0].label if len(variants) == 1 else f"{len(variants)} methods", task)
            try:
                yield task, self._answer_parts({task: variants}, parts)
            except Exception as error:  # a task may raise anything; the run reports it, and the other tasks go on
                yield task, error

    def units(self, todo: Todo) -> list[Unit]:
        """Split tasks into units, the longest first."""
        return split(todo, self.batches, self.largest_batch(), self.config.resources.shard)

    def resumed(self, unit: Unit, parts: "Parts | None") -> Unit:
        """Leave only the methods in a unit that have not answered it before; the answers of the others are kept."""
        records = parts.find(unit) if parts is not None else {}
        with reading(self.config.output):
            known = {label: Answers.of_record(record) for label, record in records.items()}
        return replace(unit, variants=[v for v in unit.variants if v.label not in known], known=known)

    def _answer_parts(self, todo: Todo, parts: "Parts | None") -> dict[str, Answers]:
        """Answer a whole task, one part after the other. A method that fails sits out the rest."""
        units = [self.resumed(unit, parts) for unit in self.units(todo)]
        outcomes, failed = Outcomes({unit.task: unit.parts for unit in units}), dict[str, Answers]()
        whole: dict[str, Answers] | Exception | None = None
        with self._bar(sum(len(unit.variants) * unit.prompts for unit in units)) as bar:
            for unit in units:
                variants = [variant for variant in unit.variants if variant.label not in failed]
                own = self.answer(variants, unit.task, unit.part, unit.parts, bar) if variants else {}
                failed |= {label: answers for label, answers in own.items() if answers.failure is not None}
                if parts is not None:
                    parts.save(unit, own | failed)
                whole = outcomes.add(unit, own | failed)
        assert isinstance(whole, dict)  # no outcome is an exception: one would have been raised
        return whole

    def answer(
        self, variants: Sequence[Variant], task: str, part: int = 0, parts: int = 1, bar: Bar | None = None
    ) -> dict[str, Answers]:
        """Answer the requests of a task under each method. The methods take turns on each batch, which is encoded once.

        With `batch_size: auto` a batch that does not fit into memory is answered in halves, and so are all later ones.

        Args:
            variants: the methods.
            task: by its name.
            part: of the task, from 0. Parts are made of whole batches of the task, so that they change no answer.
            parts: that the task has; see `batches`.
            bar: advances by one for each answer; by default a new one does.
        """
        asked = self.asked(task)
        if asked is None:
            return {variant.label: self._answer_dialogues(variant, task) for variant in variants}
        counted = self._measurements.method_flops(variants, task) if part == 0 else {}
        turns = Turns(asked, self._checkpoint, variants, self.config.seed)
        shrinks, largest = self.config.batch_size == AUTO, self.largest_batch()
        size = self._fitting.get(task, largest)
        batches = list(enumerate(batches_of(asked.queries, largest)))[part::parts]
        total = len(variants) * sum(len(batch) for _, batch in batches)
        with self._bar(total) if bar is None else nullcontext(bar) as shown, torch.inference_mode():
            for number, batch in batches:
                size = turns.take(number, batch, shown, size, shrinks)
        answers = turns.end()
        self._fitting[task] = size
        prompts = len(batches_of(asked.queries, 1))
        for label, own in answers.items():
            own.method_flops, own.batch_size = counted.get(label, 0.0), min(size, prompts) if shrinks else size
        return answers

    def _bar(self, total: int) -> AbstractContextManager[Bar]:
        return (self._make_bar or Display().bar)(total=total, desc="vlmslim")

    def _answer_dialogues(self, variant: Variant, task: str) -> Answers:
        """Evaluate a task whose questions depend on the answers: dialogues of several rounds."""
        started = time.perf_counter()
        answers = Answers(hardware=self._checkpoint.hardware)
        try:
            whole = self._shrinking(variant, task)
            flops = self._measurements.method_flops([variant], task)[variant.label]
            answers.whole = replace(whole, method_flops=flops)
        except Exception as error:  # a method or a task may raise anything; the cell fails with this error
            answers.failure = error
        answers.seconds = time.perf_counter() - started
        return answers

    def _shrinking(self, variant: Variant, task: str) -> Cell:
        """Evaluate a task through lmms-eval alone; with `batch_size: auto`, halve the batch while memory runs out."""
        size = self._fitting.get(task, self.largest_batch())
        while True:
            self._fitting[task] = size
            try:
                return replace(
                    self.ask(variant, task, Sample(count=self.config.limit, batch_size=size)), batch_size=size
                )
            except RequestError as error:
                if self.config.batch_size != AUTO or size == 1 or not ran_out_of_memory(error):
                    raise
            size //= 2

    # ------------------------------------------------------------------ cells

    def cell(self, variant: Variant, task: str, answers: Answers) -> Cell:
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
        replay = Replay(answers.kind, results, answers.hash)
        graded, samples = self._questions.grade(replay, variant, task, answers.batch_size)
        return Cell(
            graded,
            samples,
            answers.receipt.summary(),
            answers.protocol,
            answers.method_flops,
            answers.seconds,
            answers.hardware,
            answers.batch_size,
        )

    def evaluate(self, variant: Variant, task: str) -> Cell:
        """Evaluate one method on one task, by itself."""
        answers = self.answer([variant], task)[variant.label]
        return self.cell(variant, task, answers)

    def ask(self, variant: Variant, task: str, sample: Sample) -> Cell:
        """Evaluate a method on a sample of a task's questions, by itself and through lmms-eval alone."""
        batch_size = sample.batch_size or self.largest_batch()
        lm = self._checkpoint.lmms_model(variant, batch_size)
        lm.shortest_first = sample.shortest_first
        try:
            graded, samples = self._questions.grade(lm, variant, task, batch_size, sample)
        finally:
            if hasattr(lm, "model"):  # the evaluation failed half-way: take the patch off
                lm.clean()
        return Cell(graded, samples, lm.receipt, lm.protocol)

    # ------------------------------------------------------------------ measurements

    def flops(self, variant: Variant, task: str) -> dict[str, float]:
        """Count the FLOPs of a prefill by part (`vlmslim.cost.parts`), averaged over the task's first prompts."""
        return self._measurements.flops(variant, task)

    def solve(self, variant: Variant) -> Solution:
        """Make a method cost its budget, on the first questions of the tasks, taken in turn.

        Raises:
            BudgetError: no value of its option does.
        """
        return self._measurements.solve(variant)

    def time(self, variants: Sequence[Variant], timing: TimingConfig, tick: Callable[[], object]) -> dict[str, dict]:
        """Measure the time to the first token and per later token of all methods on the same prompts, in turn.

        Args:
            variants: the rows; ratios are to the first.
            timing: how many prompts, repetitions and tokens.
            tick: is called before every measurement.

        Returns:
            The times of each label.
        """
        return self._measurements.time(variants, timing, tick)

    def record(self, variants: Sequence[Variant], task: str, questions: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """Ask questions of a task again under each method, alone, and yield where their visual tokens went.

        Args:
            variants: the rows.
            task: of the questions.
            questions: their numbers, lmms-eval's `doc_id`. Those without a picture are left out.

        Yields:
            A question, and its `images` and `rows` as `vlmslim.evaluation.recording` writes them.
        """
        return self._measurements.record(variants, task, questions)
