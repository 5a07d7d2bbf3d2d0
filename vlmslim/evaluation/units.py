"""Units of work for several workers: tasks, or parts of them. Parts are put together when all of them are answered."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from vlmslim.evaluation.cells import Answers, Todo
from vlmslim.evaluation.errors import CellError
from vlmslim.evaluation.variants import Variant

SHARD = 256  # prompts of a task that a worker answers at a time, by default
UNKNOWN = 10**6  # batches of a task that cannot be split, so that it begins first


class UnitError(CellError):
    """A unit of work that killed its workers; the message has the end of the last one's log."""


@dataclass
class Unit:
    """A part of a task, and the methods that answer it.

    prompts : about how many
    deaths  : of workers that were at it
    known   : answers of other methods, which were given before the run was interrupted
    """

    task: str
    variants: Sequence[Variant]
    part: int
    parts: int
    prompts: int
    deaths: int = 0
    known: dict[str, Answers] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The part, as in "2-of-5". Parts of another split have other names, so they are answered anew."""
        return f"{self.part + 1}-of-{self.parts}"


def split(todo: Todo, batches: Callable[[str], int | None], batch_size: int, shard: int | None) -> list[Unit]:
    """Split tasks into units of whole batches, the longest first.

    Args:
        todo: the tasks, and the methods that are to answer each.
        batches: counts the batches of a task; None for dialogues, which cannot be split.
        batch_size: prompts of a batch.
        shard: most prompts of a unit; by default `SHARD`.
    """
    most = max((shard or SHARD) // batch_size, 1)
    units = []
    for task, variants in todo.items():
        count = batches(task)
        parts = 1 if count is None else -(-count // most)
        prompts = (UNKNOWN if count is None else count) * batch_size
        units += [Unit(task, variants, part, parts, -(-prompts // parts)) for part in range(parts)]
    return sorted(units, key=lambda unit: -unit.prompts)


@dataclass
class Outcomes:
    """Outcomes of the parts of tasks so far.

    parts    : of each task
    outcomes : task -> part -> its answers by method, or what failed
    """

    parts: dict[str, int]
    outcomes: dict[str, dict[int, dict[str, Answers] | Exception]] = field(default_factory=dict)

    def add(self, unit: Unit, outcome: dict[str, Answers] | Exception) -> dict[str, Answers] | Exception | None:
        """Take in a part; return the answers of the whole task with its last part, else None."""
        done = self.outcomes.setdefault(unit.task, {})
        done[unit.part] = outcome if isinstance(outcome, Exception) else unit.known | outcome
        if len(done) < self.parts[unit.task]:
            return None
        parts = [done[part] for part in sorted(done)]
        for part in parts:
            if isinstance(part, Exception):
                return part
        answers = [part for part in parts if not isinstance(part, Exception)]
        return {label: Answers.merged([part[label] for part in answers]) for label in answers[0]}
