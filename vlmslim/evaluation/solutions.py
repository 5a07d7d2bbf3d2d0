"""Budgets that are costs, solved for each row of a run and kept in its directory."""

import json
from collections.abc import Callable, Iterable

from vlmslim.cost.budget import Solution
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.inputs import Inputs
from vlmslim.evaluation.store import Store, reading
from vlmslim.evaluation.variants import Variant


class Solutions:
    """The solved budgets of a run. They are kept, because a task that is added changes no method.

    Args:
        store: of the directory.
        config_hash: of what all cells of the run share; solutions of another run do not count.
        inputs: the code and the weights of the rows.
        fresh: read no old solutions, and save none before `save` is called: the old ones may still be wanted until
            nothing is refused any more.
        solve: finds the option of a row that makes it cost its budget.
    """

    def __init__(
        self, store: Store, config_hash: str, inputs: Inputs, *, fresh: bool, solve: Callable[[Variant], Solution]
    ):
        self._store, self._hash, self._inputs = store, config_hash, inputs
        self._fresh, self._solve = fresh, solve
        self._rows: dict[str, dict] = {}

    def solve_all(self, variants: Iterable[Variant]) -> list[Variant]:
        """Return the rows with every cost solved.

        Raises:
            ConfigError: a budget cannot be met, or options do not fit the model; the message lists all such rows.
        """
        known = None if self._fresh else self._store.solutions
        if known is not None and known.get("config_hash") == self._hash:
            with reading(self._store.directory):
                self._rows = dict(known["rows"])
        rows, failures = [], []
        for variant in variants:
            if variant.unsolved:
                try:
                    found = self._found(variant)
                except ConfigError:
                    raise
                except ValueError as error:  # a budget that cannot be met, or options that do not fit the model
                    failures.append(f"{variant.label}: {error}")
                    continue
                variant = variant.solve(found["stages"], found["solved"])
            rows.append(variant)
        if failures:
            raise ConfigError("\n".join(failures))
        return rows

    def _found(self, variant: Variant) -> dict:
        """Return the solution of a row, from the directory if it is there and made with the same."""
        asked = {"budget": variant.budget, **self._inputs.made_with(variant)}
        found = self._rows.get(variant.label)
        if found is None or found["asked"] != json.loads(json.dumps(asked)):
            solution = self._solve(variant)
            found = {"asked": asked, "stages": list(solution.stages), "solved": solution.record()}
            self._rows[variant.label] = found
            if not self._fresh:
                self.save()
        return found

    def save(self) -> None:
        """Write what is solved, if anything is."""
        if self._rows:
            self._store.save_solutions({"config_hash": self._hash, "rows": self._rows})
