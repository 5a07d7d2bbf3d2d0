"""Answers to parts of tasks, kept in the directory of a run until their cells are finished.

A run that ends before a task does loses only the parts that were at work.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmslim.evaluation.inputs import Inputs
from vlmslim.evaluation.store import Store

if TYPE_CHECKING:
    from vlmslim.evaluation.cells import Answers
    from vlmslim.evaluation.units import Unit


class Parts:
    """The answered parts of unfinished cells.

    Args:
        store: of the run.
        config_hash: of what all cells of the run share.
        inputs: the code, the weights and the tasks, which a part records as a cell does.
    """

    def __init__(self, store: Store, config_hash: str, inputs: Inputs):
        self._store, self._hash, self._inputs = store, config_hash, inputs

    def save(self, unit: "Unit", answers: Mapping[str, "Answers"]) -> None:
        """Write what each method answered to a part of a task. The answers to a whole task become cells at once."""
        if unit.parts == 1:
            return
        for variant in unit.variants:
            own = answers[variant.label]
            if own.failure is None:
                record = {
                    "config_hash": self._hash,
                    **self._inputs.made_with(variant),
                    "definition": self._inputs.definitions[unit.task],
                    "answers": own.as_record(),
                }
                self._store.save_part(variant.label, unit.task, unit.name, record)

    def find(self, unit: "Unit") -> dict[str, dict]:
        """Return what `Answers.of_record` reads, of each method that has answered a part before."""
        found = {v.label: self._store.part(v.label, unit.task, unit.name) for v in unit.variants}
        return {label: record["answers"] for label, record in found.items() if record is not None}
