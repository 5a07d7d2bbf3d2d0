"""The rows of a comparison: from methods and budgets to stages with all their options."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from vlmslim.cost.budget import free_option
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.schema import Budget, Cost, MethodConfig
from vlmslim.evaluation.store import check_file_names
from vlmslim.registry import build, label, options_of
from vlmslim.saving.folder import read

if TYPE_CHECKING:
    from vlmslim.evaluation.config import RunConfig


@dataclass(frozen=True)
class Variant:
    """One row of the leaderboard: a method, or several stages, at one budget.

    label  : names the row, and its directory
    stages : for each stage a dictionary with the name of its method and the options
    budget : groups the rows: a `keep`, or a cost such as {"equivalent_tokens": 64}; None if there is none
    solved : how a cost was solved, as `Solution.record()` says it. Until then one option is missing in `stages`
    classes : of the methods, and of the stages that they are made of
    baseline : whether the row is there because of `baselines`
    """

    label: str
    stages: tuple[dict[str, Any], ...] = field(hash=False)
    budget: int | float | dict | None = field(default=None, hash=False)
    solved: dict | None = field(default=None, hash=False)
    classes: frozenset[type] = field(default=frozenset(), repr=False)
    baseline: bool = field(default=False, compare=False, repr=False)

    @property
    def unpatched(self) -> bool:
        """True if the row is the model without a method."""
        return all(stage["method"] == "none" for stage in self.stages)

    @property
    def cost(self) -> dict[str, int | float]:
        """The budget if it is a cost, else nothing."""
        return self.budget if isinstance(self.budget, dict) else {}

    @property
    def unsolved(self) -> bool:
        """True if the option that makes the row cost its budget is still to be found."""
        return bool(self.cost) and self.solved is None

    def solve(self, stages: Sequence[dict], solved: dict) -> "Variant":
        """Return the same row with every option known."""
        return replace(self, stages=tuple(stages), solved=solved)

    @property
    def content(self) -> str:
        """The stages of the row, whatever its label is."""
        return repr(([sorted(stage.items(), key=str) for stage in self.stages], self.cost))


def expand(config: "RunConfig") -> list[Variant]:
    """Cross methods with budgets: the unpatched model first, then the baselines, then the methods.

    Raises:
        ConfigError: a method or an option does not exist or is out of range, or two rows have one label.
    """
    listed = [row for entry in config.methods for row in _rows(entry, config)]
    budgets = list({str(row.budget): row.budget for row in listed if row.budget is not None}.values()) or config.budgets
    if config.baselines and not budgets and not all(row.unpatched for row in listed):
        raise ConfigError(
            f"baselines: at which budget shall {' and '.join(config.baselines)} run? No method here has one; give "
            "'budgets', or 'baselines: false'"
        )
    (unpatched,) = _rows(MethodConfig(method="none"), config)
    baselines = [
        replace(row, baseline=True)
        for name in (config.baselines or [] if budgets else [])
        for row in _rows(_baseline(name, budgets), config)
    ]
    given = {row.content for row in listed}
    rows = [unpatched, *(row for row in baselines if row.content not in given)]
    rows += [row for row in listed if row.content != unpatched.content]
    check_file_names("methods", [row.label for row in rows])
    return rows


def _baseline(name: str, budgets: Sequence[Any]) -> MethodConfig:
    """Make the entry of a baseline: at every budget, or once if it has none.

    Raises:
        ConfigError: there is no such method.
    """
    try:
        own = {"budgets": budgets} if "keep" in options_of(name) else {}
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return MethodConfig.model_validate({"method": name} | own)


def _rows(entry: MethodConfig, config: "RunConfig") -> list[Variant]:
    """Make the rows of one entry, one for each of its budgets.

    Raises:
        ConfigError: a method or an option does not exist or is out of range, or no budget is given.
    """
    try:
        budgets = _budgets(entry, config.budgets)
        return [_row(entry, budget, len(budgets) > 1, config) for budget in budgets]
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _row(entry: MethodConfig, budget: Budget | None, of_several: bool, config: "RunConfig") -> Variant:
    """Make the row of an entry at one of its budgets."""
    stages = [dict(stage) for stage in entry.listed]
    free: tuple[int, str] | None = None
    amount: int | float | dict | None
    if isinstance(budget, Cost):
        free, amount = free_option(stages), budget.target()
    elif budget is not None:
        stages[0]["keep"] = amount = budget
    else:  # what the last stage with a budget leaves
        amount = next((stage["keep"] for stage in reversed(stages) if "keep" in stage), None)
    name = entry.label or label(stages)
    if of_several if entry.label else isinstance(budget, Cost):
        name += f"-{_text(amount)}"
    for stage in stages:
        _add_defaults(stage, config)
    complete = [dict(stage) for stage in stages]
    if free is not None:
        complete[free[0]][free[1]] = 1  # any value: it is checked again once the cost is solved
    return Variant(name, tuple(stages), amount, classes=classes_of(complete))


def classes_of(stages: Sequence[dict]) -> frozenset[type]:
    """Return the classes of the methods of stages, and of the stages that they are made of.

    Raises:
        ValueError: a method or an option does not exist or is out of range.
    """
    classes: set[type] = set()
    for stage in stages:
        whole = build(stage)
        classes.update(map(type, [whole, *whole.stages()]))
    return frozenset(classes)


def _budgets(entry: MethodConfig, shared: Sequence[Budget]) -> Sequence[Budget | None]:
    """Return the budgets of a method: its own, else those of the run that mean something to it, else its default.

    Raises:
        ValueError: the method needs a budget, and there is none.
    """
    if entry.budgets:
        return entry.budgets
    if entry.method is None:
        return [None]
    if entry.keep is not None:
        return entry.keep if isinstance(entry.keep, list) else [entry.keep]
    options = options_of(entry.method)
    if "keep" in options:
        given = shared or ([] if options["keep"] is MISSING else [options["keep"]])
        if not given:
            raise ValueError(f"{entry.method}: how many tokens? Give 'keep' here, or 'budgets' for all methods")
        return given
    costs = [budget for budget in shared if isinstance(budget, Cost) and _has_free_option(entry.listed)]
    return costs if costs and costs == list(shared) else [None, *costs]


def _has_free_option(stages: Sequence[dict]) -> bool:
    try:
        free_option(stages)
    except ValueError:
        return False
    return True


def _add_defaults(stage: dict, config: "RunConfig") -> None:
    """Add the seed of the run if the method draws random numbers, and the weights that come with the checkpoint.

    The checkpoint brings weights if it is a saved patch, as for the lmms-eval model.
    """
    options = options_of(stage["method"])
    if "seed" in options:
        stage.setdefault("seed", config.seed)
    if "weights" in options and not stage.get("weights"):
        model = config.model
        saved = read(model.pretrained, model.revision)
        if saved is not None and saved.holds(stage["method"]):
            stage["weights"] = str(saved.folder) if model.revision else model.pretrained


def _text(budget: int | float | dict | None) -> str:
    """Write a budget as it stands in a label."""
    return ",".join(f"{name}={value}" for name, value in budget.items()) if isinstance(budget, dict) else str(budget)
