"""`vlmslim run --workers`: Ray actors with the loaded checkpoint answer parts of tasks; the driver writes the cells.

A unit of work is a task, or a part of its batches, under all methods. Results depend neither on the number of workers,
nor on who answered what, nor on the parts: the parts are whole batches of the task, and lmms-eval grades all of its
answers at once, in the driver.
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from vlmslim.cost.budget import Solution
from vlmslim.evaluation.cells import Answers, Cell, Sample, Todo
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.harness import Harness
from vlmslim.evaluation.parts import Parts
from vlmslim.evaluation.progress import MakeBar, output_to
from vlmslim.evaluation.ray_cluster import check_workers, connect, import_ray
from vlmslim.evaluation.schema import AUTO, TimingConfig
from vlmslim.evaluation.units import Outcomes, Unit, UnitError
from vlmslim.evaluation.variants import Variant
from vlmslim.evaluation.worker import Worker, environment, log_of

__all__ = ["RayHarness", "check_workers"]

DEATHS = 3  # of workers, after which a unit is given up
START_SECONDS = 1800  # for the first worker to load the checkpoint
LOG_LINES = 5  # of a worker that died, in the message

Begin = Callable[[str, str], object]


@dataclass
class _Seat:
    """A worker as the driver knows it: its actor, and the unit that it is at."""

    number: int
    actor: Any
    unit: Unit | None = None
    shown: int = 0


def _bare(variants: Sequence[Variant]) -> list[Variant]:
    """Return rows without their classes, because a class of the user's own file cannot be sent; its stages name it."""
    return [replace(variant, classes=frozenset()) for variant in variants]


class RayHarness(Harness):
    """A harness whose checkpoint is in workers. The driver has none; it opens tasks and grades answers.

    Args:
        config: the comparison.
        make_bar: makes a progress bar.
        workers: how many on this machine, "auto", or the address of a head node.

    Raises:
        ConfigError: Ray is not installed, no head node answers, or there are fewer GPUs than the workers need.
    """

    def __init__(self, config: RunConfig, make_bar: MakeBar | None = None, *, workers: str | int = "auto"):
        config = config.model_copy(
            update={
                "output": config.output.absolute(),
                "include_path": [path.absolute() for path in config.include_path],
            }
        )
        super().__init__(config, make_bar)
        self.workers, self.ray = workers, import_ray()
        self._seats: list[_Seat] = []
        self._environment = environment()
        self._latest = -1  # the worker that `ask` has called
        self._quiet = ExitStack()

    # ------------------------------------------------------------------ starting and stopping

    def load(self) -> None:
        """Start the workers, and wait until the first has loaded the checkpoint."""
        if self._seats:
            return
        self._quiet.enter_context(output_to(self.config.output / "workers" / "ray.log"))
        count, gpus = connect(self.ray, self.workers, self.config)
        options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 2}  # it tells its progress while it works
        self._actor = self.ray.remote(**options)(Worker)
        self._seats = [_Seat(number, self._hire(number)) for number in range(count)]
        self._call("load", own=True, timeout=START_SECONDS)

    def _hire(self, number: int) -> Any:
        """Start a worker. It loads the checkpoint with its first task."""
        return self._actor.remote(self.config, number, os.getcwd(), torch.get_num_threads(), self._environment)

    def _replace(self, seat: _Seat) -> None:
        """Start a worker in place of one that died."""
        self.ray.kill(seat.actor)  # if it was only out of reach
        seat.actor, seat.shown = self._hire(seat.number), 0

    def close(self) -> None:
        """Stop the workers."""
        for seat in self._seats:
            self.ray.kill(seat.actor)  # they hold nothing, and may take long to end by themselves
        if self._seats:
            self._seats.clear()
            self.ray.shutdown()
        self._quiet.close()

    # ------------------------------------------------------------------ what needs the checkpoint of one worker

    def _call(self, name: str, *args: Any, number: int = 0, own: bool = False, timeout: float | None = None) -> Any:
        """Call a function of a worker, or of its harness; an exception arrives as it was raised.

        Raises:
            UnitError: three workers died at it, one after the other.
        """
        self.load()
        for death in range(1, DEATHS + 1):
            actor = self._seats[number].actor
            try:
                task = getattr(actor, name).remote(*args) if own else actor.call.remote(name, *args)
                return self.ray.get(task, timeout=timeout)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from error
            except self.ray.exceptions.GetTimeoutError as error:
                raise ConfigError(
                    f"no worker has loaded the checkpoint in {timeout:g} seconds; are the GPUs in use? "
                    f"{self._end_of_log(number)}"
                ) from error
            except self.ray.exceptions.RayError as error:
                if death == DEATHS:
                    what = f"{name} killed {DEATHS} workers ({type(error).__name__})"
                    raise UnitError(f"{what}; {self._end_of_log(number)}") from error
                self._replace(self._seats[number])
        raise AssertionError  # the loop has returned or raised

    def check_method(self, variant: Variant) -> None:
        """Attach a row to the model of a worker and take it off again."""
        self._call("check_method", *_bare([variant]))

    def largest_batch(self) -> int:
        """Return the prompts of a batch; with `batch_size: auto`, the most that a worker tries."""
        if self.config.batch_size != AUTO:
            return self.config.batch_size
        return self._call("largest_batch")

    def solve(self, variant: Variant) -> Solution:
        """Make a method cost its budget."""
        return self._call("solve", *_bare([variant]))

    def time(self, variants: Sequence[Variant], timing: TimingConfig, tick: Callable[[], object]) -> dict[str, dict]:
        """Time all methods on one worker, while the others rest."""
        return self._call("time", _bare(variants), timing, own=True)

    def record(self, variants: Sequence[Variant], task: str, questions: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """Record on one worker where visual tokens went."""
        yield from self._call("record", _bare(variants), task, list(questions), own=True)

    def ask(self, variant: Variant, task: str, sample: Sample) -> Cell:
        """Evaluate a method on a sample of a task's questions; each call takes the next worker."""
        self.load()
        self._latest = (self._latest + 1) % len(self._seats)
        return self._call("ask", *_bare([variant]), task, sample, number=self._latest)

    # ------------------------------------------------------------------ units

    def check_split(self, todo: Todo) -> None:
        """Refuse a limit that splits no task, unless finished tasks may have been split.

        Raises:
            ConfigError: the message says how many prompts a task has to have.
        """
        shard = self.config.resources.shard
        if shard is None or len(todo) < len(self.tasks.leaves):
            return
        if all(unit.parts == 1 for unit in self.units(todo)):
            raise ConfigError(
                f"resources.shard: {shard} splits nothing, because no task has more than "
                f"{max(shard, self.largest_batch())} prompts; give fewer, or leave it out"
            )

    def answer_all(
        self, todo: Todo, begin: Begin, parts: Parts | None = None
    ) -> Iterator[tuple[str, dict[str, Answers] | Exception]]:
        """Answer tasks on all workers; yield each when its last part is answered.

        Args:
            todo: the tasks, and the methods that are to answer each.
            begin: is called with what is at work, and where.
            parts: keeps each part that is answered, and has those that were answered before; by default nothing does.
        """
        self.load()
        every = [self.resumed(unit, parts) for unit in self.units(todo)]
        outcomes = Outcomes({unit.task: unit.parts for unit in every})
        for unit in every:
            if not unit.variants and (whole := outcomes.add(unit, {})) is not None:
                yield unit.task, whole
        units = deque(unit for unit in every if unit.variants)
        total = sum(len(unit.variants) * unit.prompts for unit in units)
        running: dict[Any, _Seat] = {}
        for seat in self._seats:
            self._next(seat, units, running)
        with self._bar(total) as bar:
            while running:
                at = dict.fromkeys(seat.unit.task for seat in running.values() if seat.unit)
                begin(f"{len(running)} workers", ", ".join(at))
                ready, _ = self.ray.wait(list(running), num_returns=1, timeout=1)
                self._show(list(running.values()), bar)
                for task in ready:
                    seat = running.pop(task)
                    done, seat.unit = seat.unit, None
                    assert done is not None
                    outcome, whole = self._outcome(task, seat, done), None
                    if outcome is None:
                        units.append(done)  # after the others, so that bad luck does not strike it three times
                    else:
                        if parts is not None and not isinstance(outcome, Exception):
                            parts.save(done, outcome)
                        whole = outcomes.add(done, outcome)
                    self._next(seat, units, running)
                    if whole is not None:
                        yield done.task, whole

    def _next(self, seat: _Seat, units: "deque[Unit]", running: dict[Any, _Seat]) -> None:
        """Give a worker the next unit."""
        if units:
            seat.unit = unit = units.popleft()
            running[seat.actor.answer.remote(replace(unit, variants=_bare(unit.variants), known={}))] = seat

    def _outcome(self, task: Any, seat: _Seat, unit: Unit) -> dict[str, Answers] | Exception | None:
        """Return what a unit gave; None if its worker died and another should try."""
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except self.ray.exceptions.RayError as error:  # killed, out of memory, its node lost
            unit.deaths += 1
            self._replace(seat)
            if unit.deaths < DEATHS:
                return None
            where = f", part {unit.part + 1} of {unit.parts}" if unit.parts > 1 else ""
            return UnitError(
                f"{unit.task}{where} killed {DEATHS} workers ({type(error).__name__}); {self._end_of_log(seat.number)}"
            )

    def _end_of_log(self, number: int) -> str:
        log = log_of(self.config.output, number)
        try:
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        except OSError:
            lines = []
        return f"its log {log} ends with\n" + "\n".join(f"  {line}" for line in lines or ["(nothing)"])

    def _show(self, seats: list[_Seat], bar: Any) -> None:
        """Advance the bar by what the workers have answered since the last time."""
        asked = {seat.actor.progress.remote(): seat for seat in seats}
        ready, _ = self.ray.wait(list(asked), num_returns=len(asked), timeout=0.5)
        for task in ready:
            try:
                count = self.ray.get(task)
            except self.ray.exceptions.RayError:
                continue  # it died; its unit says so
            bar.update(count - asked[task].shown)  # less than 0 after a batch that did not fit into memory
            asked[task].shown = count
