"""`vlmslim run --workers`: Ray actors with the loaded checkpoint answer parts of tasks; the driver writes the cells.

A unit of work is a task, or a part of its batches, under all methods. Results depend neither on the number of workers,
nor on who answered what, nor on the parts: the parts are whole batches of the task, and lmms-eval grades all of its
answers at once, in the driver.
"""

import faulthandler
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from vlmslim.cost.budget import Solution
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.harness import Answers, Harness, Todo
from vlmslim.evaluation.progress import MakeBar, log_to, output_to
from vlmslim.evaluation.schema import TimingConfig
from vlmslim.evaluation.variants import Variant
from vlmslim.io.messages import one_line

DEATHS = 3  # of workers, after which a unit is given up
SHARD = 256  # prompts of a task that a worker answers at a time, by default
START_SECONDS = 1800  # for the first worker to load the checkpoint
LOG_LINES = 5  # of a worker that died, in the message

Begin = Callable[[str, str], object]


class UnitError(RuntimeError):
    """A unit of work that killed its workers; the message has the end of the last one's log."""


@dataclass
class Unit:
    """A part of a task, and the methods that answer it.

    prompts : about how many
    deaths  : of workers that were at it
    """

    task: str
    variants: Sequence[Variant]
    part: int
    parts: int
    prompts: int
    deaths: int = 0


class Worker:
    """What runs in an actor: a harness with the loaded checkpoint.

    Args:
        config: the comparison, with absolute paths.
        number: of the worker.
        folder: the driver's working directory.
        threads: of torch, because they decide the last bits of a sum on a CPU.
    """

    def __init__(self, config: RunConfig, number: int, folder: str, threads: int):
        self.log = log_of(config.output, number)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)  # also what libraries and a crash print
        os.dup2(file, 2)
        faulthandler.enable()
        log_to(self.log)
        print(f"worker {number} is process {os.getpid()}", flush=True)
        os.chdir(folder)
        sys.path.insert(0, folder)
        torch.set_num_threads(threads)
        self.answered = 0
        self.harness = Harness(config, self._bar)

    def _bar(self, **_: Any) -> "AbstractContextManager[Any]":
        return nullcontext(self)

    def update(self, n: int = 1) -> None:
        """Count answers; the driver shows them."""
        self.answered += n

    def progress(self) -> int:
        """Count the answers that this worker has given since it started."""
        return self.answered

    def load(self) -> int:
        """Load the checkpoint, and return the number of this process."""
        self.harness.load()
        return os.getpid()

    def time(self, variants: Sequence[Variant], timing: TimingConfig) -> dict[str, dict]:
        """Time methods, without showing progress."""
        return self.harness.time(variants, timing, lambda: None)

    def record(self, variants: Sequence[Variant], task: str, questions: Sequence[int]) -> list[tuple[int, dict]]:
        """Record where visual tokens went."""
        return list(self.harness.record(variants, task, questions))

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the harness."""
        return getattr(self.harness, name)(*args)


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


def log_of(output: Path, number: int) -> Path:
    """Return the log of a worker."""
    return output / "workers" / f"worker-{number}.log"


def check_workers(workers: str) -> str | int:
    """Read `--workers`.

    Raises:
        ConfigError: it is no number, nor "auto", nor the address of a head node.
    """
    if workers == "auto" or workers.startswith("ray://") and len(workers) > len("ray://"):
        return workers
    if workers.isdecimal() and int(workers) >= 1:
        return int(workers)
    raise ConfigError(f"--workers {workers}: give a number from 1 up, auto, or ray://HEAD:10001")


def import_ray() -> ModuleType:
    """Import Ray, without its telemetry.

    Raises:
        ConfigError: it is not installed.
    """
    os.environ.update(
        RAY_USAGE_STATS_ENABLED="0",  # no telemetry
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",  # so that a node of its own binds to loopback, on Linux too
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError('--workers needs Ray: pip install "vlmslim[ray]"') from error
    return ray


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
        self._quiet = ExitStack()

    # ------------------------------------------------------------------ starting and stopping

    def load(self) -> None:
        """Start the workers, and wait until the first has loaded the checkpoint."""
        if self._seats:
            return
        self._quiet.enter_context(output_to(self.config.output / "workers" / "ray.log"))
        count, gpus = self._connect()
        options = {"num_cpus": 1, "num_gpus": gpus, "max_concurrency": 2}  # it tells its progress while it works
        self._actor = self.ray.remote(**options)(Worker)
        self._seats = [_Seat(number, self._hire(number)) for number in range(count)]
        self._on_first("load", own=True, timeout=START_SECONDS)

    def _connect(self) -> tuple[int, float]:
        """Start Ray here or connect to a head node; return how many workers, and the GPUs of each."""
        ray, asked = self.ray, self.config.resources.gpus_per_worker
        on_cpu = (self.config.model.device or "").startswith("cpu")
        if isinstance(self.workers, str) and self.workers != "auto":
            try:
                ray.init(self.workers, log_to_driver=False, logging_level="ERROR")
            except Exception as error:  # Ray has an own class for each layer that fails
                raise ConfigError(
                    f"no Ray head node answers at {self.workers} ({one_line(error)}); start one with "
                    "'ray start --head', and give the address of its client server: ray://HOST:10001"
                ) from error
            there = ray.cluster_resources()
            here, cores = there.get("GPU", 0), int(there.get("CPU", 1))
        else:
            here, cores = float(torch.cuda.device_count()), os.cpu_count() or 1
        gpus = asked if asked is not None else float(here > 0 and not on_cpu)
        most = int(here // gpus) if gpus else cores if isinstance(self.workers, str) and self.workers != "auto" else 1
        count = self.workers if isinstance(self.workers, int) else max(most, 1)
        if count * gpus > here:
            raise ConfigError(
                f"{count} workers of {gpus:g} GPUs need {count * gpus:g} GPUs, and there are {here:g}; give fewer "
                "--workers, or a smaller resources.gpus_per_worker"
            )
        if not ray.is_initialized():
            ray.init(
                num_cpus=count,
                num_gpus=int(here),
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                log_to_driver=False,
                logging_level="ERROR",
            )
        return count, gpus

    def _hire(self, number: int) -> Any:
        """Start a worker. It loads the checkpoint with its first task."""
        return self._actor.remote(self.config, number, os.getcwd(), torch.get_num_threads())

    def close(self) -> None:
        """Stop the workers."""
        for seat in self._seats:
            self.ray.kill(seat.actor)  # they hold nothing, and may take long to end by themselves
        if self._seats:
            self._seats.clear()
            self.ray.shutdown()
        self._quiet.close()

    # ------------------------------------------------------------------ what needs the checkpoint, once

    def _on_first(self, name: str, *args: Any, own: bool = False, timeout: float | None = None) -> Any:
        """Call a function of the first worker, or of its harness; an exception arrives as it was raised."""
        self.load()
        actor = self._seats[0].actor
        try:
            task = getattr(actor, name).remote(*args) if own else actor.call.remote(name, *args)
            return self.ray.get(task, timeout=timeout)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from error
        except self.ray.exceptions.GetTimeoutError as error:
            raise ConfigError(
                f"no worker has loaded the checkpoint in {timeout:g} seconds; are the GPUs in use? "
                f"{self._end_of_log(0)}"
            ) from error
        except self.ray.exceptions.RayError as error:
            raise UnitError(f"the first worker died: {self._end_of_log(0)}") from error

    def check_method(self, variant: Variant) -> None:
        """Attach a row to the model of a worker and take it off again."""
        self._on_first("check_method", *_bare([variant]))

    def solve(self, variant: Variant) -> Solution:
        """Make a method cost its budget."""
        return self._on_first("solve", *_bare([variant]))

    def time(self, variants: Sequence[Variant], timing: TimingConfig, tick: Callable[[], object]) -> dict[str, dict]:
        """Time all methods on one worker, while the others rest."""
        return self._on_first("time", _bare(variants), timing, own=True)

    def record(self, variants: Sequence[Variant], task: str, questions: Sequence[int]) -> Iterator[tuple[int, dict]]:
        """Record on one worker where visual tokens went."""
        yield from self._on_first("record", _bare(variants), task, list(questions), own=True)

    # ------------------------------------------------------------------ units

    def check_split(self, todo: Todo) -> None:
        """Refuse a limit of parts that splits no task."""
        self.units(todo)

    def units(self, todo: Todo) -> list[Unit]:
        """Split tasks into units, the longest first.

        Raises:
            ConfigError: `resources.shard` splits no task.
        """
        limit, size = self.config.resources.shard, self.config.batch_size
        units = []
        for task, variants in todo.items():
            batches = self.batches(task)
            most = max((limit or SHARD) // size, 1)
            parts = 1 if batches is None else -(-batches // most)
            prompts = (batches or 10**6) * size  # dialogues cannot be split, so they begin first
            units += [Unit(task, variants, part, parts, -(-prompts // parts)) for part in range(parts)]
        if limit is not None and all(unit.parts == 1 for unit in units):
            raise ConfigError(
                f"resources.shard: {limit} splits nothing, because no unfinished task has more than "
                f"{max(limit, size)} prompts; give fewer, or leave it out"
            )
        return sorted(units, key=lambda unit: -unit.prompts)

    def answer_all(self, todo: Todo, begin: Begin) -> Iterator[tuple[str, dict[str, Answers] | Exception]]:
        """Answer tasks on all workers; yield each when its last part is answered."""
        self.load()
        units = deque(self.units(todo))
        work = _Work({unit.task: unit.parts for unit in units})
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
                    unit, seat.unit = seat.unit, None
                    assert unit is not None
                    outcome, whole = self._outcome(task, seat, unit), None
                    if outcome is None:
                        units.appendleft(unit)  # once more, on this worker or another
                    else:
                        whole = work.add(unit, outcome)
                    self._next(seat, units, running)
                    if whole is not None:
                        yield unit.task, whole

    def _next(self, seat: _Seat, units: "deque[Unit]", running: dict[Any, _Seat]) -> None:
        """Give a worker the next unit."""
        if units:
            seat.unit = unit = units.popleft()
            task = seat.actor.call.remote("answer", _bare(unit.variants), unit.task, unit.part, unit.parts)
            running[task] = seat

    def _outcome(self, task: Any, seat: _Seat, unit: Unit) -> dict[str, Answers] | Exception | None:
        """Return what a unit gave; None if its worker died and another should try."""
        try:
            return self.ray.get(task)
        except self.ray.exceptions.RayTaskError as error:
            return error.cause if isinstance(error.cause, Exception) else error
        except self.ray.exceptions.RayError as error:  # killed, out of memory, its node lost
            unit.deaths += 1
            self.ray.kill(seat.actor)  # if it was only out of reach
            seat.actor, seat.shown = self._hire(seat.number), 0
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
            bar.update(max(count - asked[task].shown, 0))
            asked[task].shown = count


@dataclass
class _Work:
    """The parts of tasks that are answered so far.

    parts    : of each task
    outcomes : task -> part -> its answers by method, or what failed
    """

    parts: dict[str, int]
    outcomes: dict[str, dict[int, dict[str, Answers] | Exception]] = field(default_factory=dict)

    def add(self, unit: Unit, outcome: dict[str, Answers] | Exception) -> dict[str, Answers] | Exception | None:
        """Take in a part; return the answers of the whole task with its last part, else None."""
        known = self.outcomes.setdefault(unit.task, {})
        known[unit.part] = outcome
        if len(known) < self.parts[unit.task]:
            return None
        parts = [known[part] for part in sorted(known)]
        for part in parts:
            if isinstance(part, Exception):
                return part
        answers = [part for part in parts if not isinstance(part, Exception)]
        return {v.label: Answers.merged([part[v.label] for part in answers]) for v in unit.variants}
