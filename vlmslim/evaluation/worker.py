"""The process of a worker of `vlmslim run --workers`: a harness with the loaded checkpoint, in a Ray actor."""

import faulthandler
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from vlmslim.evaluation.cells import Answers
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.harness import Harness
from vlmslim.evaluation.progress import log_to
from vlmslim.evaluation.schema import TimingConfig
from vlmslim.evaluation.units import Unit
from vlmslim.evaluation.variants import Variant
from vlmslim.io import provenance


class Worker:
    """A harness in a process of its own, whose output goes to a log.

    Args:
        config: the comparison, with absolute paths.
        number: of the worker.
        folder: the driver's working directory.
        threads: of torch, because they decide the last bits of a sum on a CPU.
        expected: the driver's `environment()`.
    """

    def __init__(self, config: RunConfig, number: int, folder: str, threads: int, expected: dict[str, str | None]):
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
        self.number, self.expected, self.environment = number, expected, environment()
        self.harness = Harness(config, self._bar)

    def _bar(self, **_: Any) -> AbstractContextManager[Any]:
        return nullcontext(self)

    def update(self, n: int = 1) -> None:
        """Count answers; the driver shows them."""
        self.answered += n

    def progress(self) -> int:
        """Count the answers that this worker has given since it started."""
        return self.answered

    def check_environment(self) -> None:
        """Refuse to answer with other libraries than the driver has, because a cell names the driver's.

        Raises:
            ConfigError: names them.
        """
        here = self.environment
        other = [f"{name} {here[name]} and not {value}" for name, value in self.expected.items() if here[name] != value]
        if other:
            raise ConfigError(
                f"worker {self.number} on {platform.node()} has {', '.join(other)}; give all nodes the same environment"
            )

    def load(self) -> int:
        """Load the checkpoint, and return the number of this process."""
        self.check_environment()
        self.harness.load()
        return os.getpid()

    def answer(self, unit: Unit) -> dict[str, Answers]:
        """Answer a part of a task; the log says which."""
        self.check_environment()
        print(f"{unit.task} {unit.name}: {', '.join(variant.label for variant in unit.variants)}", flush=True)
        return self.harness.answer(unit.variants, unit.task, unit.part, unit.parts)

    def time(self, variants: Sequence[Variant], timing: TimingConfig) -> dict[str, dict]:
        """Time methods, without showing progress."""
        return self.harness.time(variants, timing, lambda: None)

    def record(self, variants: Sequence[Variant], task: str, questions: Sequence[int]) -> list[tuple[int, dict]]:
        """Record where visual tokens went."""
        return list(self.harness.record(variants, task, questions))

    def call(self, name: str, *args: Any) -> Any:
        """Call a function of the harness."""
        return getattr(self.harness, name)(*args)


def environment() -> dict[str, str | None]:
    """Return the versions that a cell records, and the commit, whether or not files are changed since."""
    return {**provenance.versions(), "commit": (provenance.git_commit() or "").rstrip("+") or None}


def log_of(output: Path, number: int) -> Path:
    """Return the log of a worker."""
    return output / "workers" / f"worker-{number}.log"
