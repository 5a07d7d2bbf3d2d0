"""The YAML behind `vlmslim run`: which model, which tasks, which methods at which budgets.

An example:

    model: {pretrained: bundled/tiny-llava, dtype: float32, device: cpu}
    tasks: [scenes_count, {task: pope, metric: pope_f1_score}]
    budgets: [64, 16, {equivalent_tokens: 64}]
    methods: [divprune, {method: fastv, keep: 64, layer: 3}]
    output: runs/example

A budget is the `keep` of each method, or a cost that is the same for all; then each method's own option is solved on
the model (`vlmslim.cost.budget`). Unknown keys are errors. The unpatched model (`none`) is in every comparison and runs
first; the baselines follow.
"""

import re
from dataclasses import MISSING, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    StrictFloat,
    StrictInt,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from vlmslim.evaluation.errors import ConfigError
from vlmslim.io.messages import did_you_mean

Keep = StrictInt | StrictFloat


class _Strict(BaseModel):
    """Refuses unknown keys by naming the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data):
        if isinstance(data, dict) and cls.model_config["extra"] == "forbid":
            for key in data:
                if key not in cls.model_fields:
                    known = ", ".join(cls.model_fields)
                    raise ValueError(f"unknown key {key!r}.{did_you_mean(key, cls.model_fields)} Known: {known}")
        return data


class ModelConfig(_Strict):
    """The checkpoint and how it is loaded: arguments of the lmms-eval model `vlmslim`."""

    pretrained: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None
    device: str | None = None
    device_map: str | None = None
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flex_attention"] | None = None
    revision: str | None = None
    max_frames_num: Annotated[int, Field(ge=1)] | None = None
    system_prompt: str | None = None

    def arguments(self) -> dict:
        """The keys that were given."""
        return self.model_dump(exclude_none=True)


class TaskConfig(_Strict):
    """One lmms-eval task, group or tag.

    metric : the one on the leaderboard; by default the task's first
    group  : the slice of the leaderboard it belongs to; by default known from its name (`task_groups.py`)
    """

    task: str
    metric: str | None = None
    group: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data):
        return {"task": data} if isinstance(data, str) else data


class Cost(_Strict):
    """A budget that costs every method the same; what the two currencies count is said in `vlmslim.cost.budget`."""

    equivalent_tokens: Annotated[float, Field(gt=0, strict=True, allow_inf_nan=False)] | None = None
    flops_ratio: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None

    @model_validator(mode="after")
    def _one(self):
        if (self.equivalent_tokens is None) == (self.flops_ratio is None):
            raise ValueError("give one of {equivalent_tokens: 64} and {flops_ratio: 0.15}")
        return self

    def target(self) -> dict[str, int | float]:
        """The currency and its number, JSON-able; whole numbers are integers."""
        return {k: int(v) if v == int(v) else v for k, v in self.model_dump(exclude_none=True).items()}


def _kind(value) -> str:
    return "[cost]" if isinstance(value, dict | Cost) else "[keep]"


Budget = Annotated[Annotated[Keep, Tag("[keep]")] | Annotated[Cost, Tag("[cost]")], Discriminator(_kind)]


class MethodConfig(_Strict):
    """A method with its options, or a list of stages; other keys are options.

    keep    : one budget or several, instead of the run's
    budgets : likewise, with costs among them. With a cost, options that are given stay, and the first of the others
              that `vlmslim.cost.budget.free_option` knows is solved
    """

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str | None = None
    stages: list[dict] | None = None
    keep: Keep | Annotated[list[Keep], Field(min_length=1)] | None = None
    budgets: Annotated[list[Budget], Field(min_length=1)] | None = None
    label: Annotated[str, Field(pattern=r"^[\w.+=,-]+$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, data):
        data = {"method": data} if isinstance(data, str) else data
        if isinstance(data, dict) and "budget" in data:
            if "budgets" in data:
                raise ValueError("give either 'budget' or 'budgets'")
            data = {k: v for k, v in data.items() if k != "budget"} | {"budgets": [data["budget"]]}
        return data

    @model_validator(mode="after")
    def _one_or_the_other(self):
        if (self.method is None) == (self.stages is None):
            raise ValueError("give either 'method' or 'stages'")
        counts = any(not isinstance(budget, Cost) for budget in self.budgets or ())
        if counts and (self.keep is not None or self.stages is not None):
            raise ValueError("next to 'keep' or 'stages', 'budgets' lists costs such as {equivalent_tokens: 64}")
        if isinstance(self.keep, list) and self.budgets:
            raise ValueError("next to 'budgets', 'keep' is one number")
        if self.stages is not None:
            if self.keep is not None or self.options:
                raise ValueError("with 'stages', every stage carries its own 'keep' and options")
            if not self.stages or not all("method" in stage for stage in self.stages):
                raise ValueError("'stages' is a list of entries such as {method: divprune, keep: 64}")
        return self

    @property
    def options(self) -> dict:
        """Options of the method other than `keep`."""
        return dict(self.model_extra or {})


class TimingConfig(_Strict):
    """How prefill and decoding are timed at the end of a run."""

    prompts: Annotated[int, Field(ge=1)] = 4
    repeats: Annotated[int, Field(ge=1)] = 5
    new_tokens: Annotated[int, Field(ge=2)] = 16


class RunConfig(_Strict):
    """A whole comparison."""

    model: ModelConfig
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    methods: Annotated[list[MethodConfig], Field(min_length=1)]
    budgets: list[Budget] = []
    budget_prompts: Annotated[int, Field(ge=1)] = 16
    baselines: list[str] | Literal[False] = ["random", "uniform"]  # methods are worth little that do not beat these
    batch_size: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    output: Path
    include_path: list[Path] = []
    timing: TimingConfig | None = TimingConfig()

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks):
        names = [task.task for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return tasks

    def variants(self) -> list["Variant"]:
        """Every method at every budget: the unpatched model first, then the baselines, then the methods.

        Raises:
            ConfigError: a method or an option does not exist or is out of range, or two rows have one label.
        """
        listed = list(chain.from_iterable(self._expand(entry) for entry in self.methods))
        budgets = list({str(v.budget): v.budget for v in listed if v.budget is not None}.values()) or self.budgets
        if self.baselines and not budgets and not all(v.unpatched for v in listed):
            raise ConfigError(
                f"baselines: at which budget shall {' and '.join(self.baselines)} run? No method here has one; give "
                "'budgets', or 'baselines: false'"
            )
        base = [MethodConfig(method=name, budgets=budgets) for name in self.baselines or [] if budgets]
        baselines = list(chain.from_iterable(self._expand(entry) for entry in base))
        mentioned = {v.identity for v in listed}
        rows = self._expand(MethodConfig(method="none"))
        rows += [v for v in baselines if v.identity not in mentioned]
        rows += [v for v in listed if v.identity != rows[0].identity]
        seen = {}
        for row in rows:
            if row.label in seen:
                raise ConfigError(f"two methods are labelled {row.label!r}; give one of them another 'label'")
            seen[row.label] = row
        return rows

    def _expand(self, entry: MethodConfig) -> list["Variant"]:
        if entry.stages is not None:
            return [self._staged(entry, cost) for cost in entry.budgets or [None]]
        rows = []
        budgets = self._budgets(entry)
        for budget in budgets:
            stage = {"method": entry.method} | ({} if entry.keep is None else {"keep": entry.keep}) | entry.options
            if isinstance(budget, Cost):
                option = _free_option([stage])[1]
                seeded, classes = self._seeded(stage, option)
                budget = budget.target()
            else:
                stage |= {} if budget is None else {"keep": budget}
                seeded, classes = self._seeded(stage)
            label = entry.label or _label(stage, budget)
            if entry.label and len(budgets) > 1:
                label = f"{entry.label}-{_text(budget)}"
            rows.append(Variant(label, (seeded,), budget, classes=classes))
        return rows

    def _staged(self, entry: MethodConfig, cost: Cost | None) -> "Variant":
        """The row of several stages, with everything given or with one option left to a cost."""
        place, option = (None, None) if cost is None else _free_option(entry.stages)
        seeded = [self._seeded(s, option if i == place else None) for i, s in enumerate(entry.stages)]
        stages = tuple(stage for stage, _ in seeded)
        classes = frozenset().union(*(own for _, own in seeded))
        label = entry.label or "+".join(map(_label, entry.stages))
        if cost is None:
            return Variant(label, stages, _budget(entry.stages), classes=classes)
        target = cost.target()
        alone = entry.label and len(entry.budgets) == 1
        return Variant(label if alone else f"{label}-{_text(target)}", stages, target, classes=classes)

    def _budgets(self, entry: MethodConfig) -> list:
        """The budgets of a method: its own, else the run's as far as they mean something to it, else its default."""
        if entry.budgets:
            return entry.budgets
        if entry.keep is not None:
            return entry.keep if isinstance(entry.keep, list) else [entry.keep]
        options = _options(entry.method)
        if "keep" not in options:
            costs = [budget for budget in self.budgets if isinstance(budget, Cost) and _has_free_option(entry)]
            return costs if costs and costs == self.budgets else [None, *costs]
        given = self.budgets or ([] if options["keep"] is MISSING else [options["keep"]])
        if not given:
            raise ConfigError(f"{entry.method}: how many tokens? Give 'keep' here, or 'budgets' for all methods")
        return given

    def _seeded(self, stage: dict, unsolved: str | None = None) -> tuple[dict, frozenset[type]]:
        """Check a stage, and add the run's seed if its method draws random numbers, and the checkpoint's weights.

        Those are the weights that come with `pretrained` where that is a saved patch, as for the lmms-eval model.

        Returns:
            The stage, and the classes of its method and of the stages that this is made of.
        """
        from vlmslim.registry import method
        from vlmslim.saving.folder import read

        stage = dict(stage)
        name = stage.pop("method")
        if "seed" in _options(name):
            stage.setdefault("seed", self.seed)
        try:
            if "weights" in _options(name) and not stage.get("weights"):
                saved = read(self.model.pretrained, self.model.revision)
                if saved is not None and saved.holds(name):
                    stage["weights"] = str(saved.folder) if self.model.revision else self.model.pretrained
            whole = method(name, **stage | ({} if unsolved is None else {unsolved: 1}))
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return {"method": name, **stage}, frozenset(map(type, [whole, *whole.stages()]))

    def shared(self) -> dict:
        """What changes the numbers of every cell, JSON-able; two runs that differ here are not comparable."""
        return {
            "model": self.model.arguments(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "limit": self.limit,
        }


@dataclass(frozen=True)
class Variant:
    """One row of the leaderboard: a method (or several stages) at one budget.

    label  : names the row, and its directory
    stages : dictionaries of a method's name and its options
    budget : what rows are grouped by: `keep`, or a cost such as {"equivalent_tokens": 64}; None where there is none
    solved : what a cost came to, once that is known: `Solution.record()`. Until then `stages` lack one option
    classes : the classes of the methods and of the stages that they are made of
    """

    label: str
    stages: tuple[dict, ...] = field(hash=False)
    budget: int | float | dict | None = field(default=None, hash=False)
    solved: dict | None = field(default=None, hash=False)
    classes: frozenset[type] = field(default=frozenset(), repr=False)

    @property
    def identity(self) -> str:
        """What it does, whatever its label."""
        cost = self.budget if isinstance(self.budget, dict) else None
        return repr(([sorted(stage.items(), key=str) for stage in self.stages], cost))

    @property
    def cost(self) -> dict[str, int | float]:
        """The budget if it is a cost, else nothing."""
        return self.budget if isinstance(self.budget, dict) else {}

    @property
    def unsolved(self) -> bool:
        """Whether an option is still to be found that makes it cost its budget."""
        return isinstance(self.budget, dict) and self.solved is None

    def solve(self, stages: list[dict], solved: dict) -> "Variant":
        """The same row with every option known."""
        return replace(self, stages=tuple(stages), solved=solved)

    @property
    def unpatched(self) -> bool:
        """Whether this is the model as it is."""
        return all(stage["method"] == "none" for stage in self.stages)


def _options(name: str) -> dict:
    """Options of a method, with their defaults."""
    from vlmslim.registry import options_of

    try:
        return options_of(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _label(stage: dict, budget=None) -> str:
    from vlmslim.registry import label

    return label(stage) + (f"-{_text(budget)}" if isinstance(budget, dict) else "")


def _text(budget: int | float | dict) -> str:
    """A budget in a label."""
    return ",".join(f"{k}={v}" for k, v in budget.items()) if isinstance(budget, dict) else str(budget)


def _free_option(stages: list[dict]) -> tuple[int, str]:
    """The stage and the option of it that a cost solves."""
    from vlmslim.cost.budget import free_option

    try:
        return free_option(stages)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _has_free_option(entry: MethodConfig) -> bool:
    from vlmslim.registry import method_class

    return any(
        k in _options(entry.method) and k not in entry.options for k in method_class(entry.method).budget_options
    )


def _budget(stages: list[dict]) -> int | float | None:
    """The last `keep` of several stages: what is left at the end."""
    return next((stage["keep"] for stage in reversed(stages) if "keep" in stage), None)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error, not the last one wins."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ConfigError(f"line {node.start_mark.line + 1}: the key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def load_config(path: Path | str, **overrides) -> RunConfig:
    """Read and check a configuration file.

    Args:
        path: the YAML file.
        **overrides: top-level keys that replace the file's, where they are not None.

    Raises:
        ConfigError: the file is missing, is no YAML, or does not follow the schema; names the file and the key.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; give a YAML file")
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise ConfigError(f"{path}: no such file.{near}")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        if not isinstance(data, dict):
            raise ConfigError("a configuration is a mapping with the keys model, tasks, methods and output")
        config = RunConfig.model_validate(data | {k: v for k, v in overrides.items() if v is not None})
        config.variants()
        return config
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not readable as YAML: {error}") from error
    except ValidationError as error:
        lines = dict.fromkeys(f"{path}: {_describe(e)}" for e in error.errors())
        raise ConfigError("\n".join(lines)) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _describe(error: dict) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("int", "float") and "[" not in str(part))
    message = error["msg"].removeprefix("Value error, ")
    if number := re.fullmatch(r"([-+]?\d+)(\.\d*)?e([-+]?)(\d+)", str(error["input"]), re.IGNORECASE):
        whole, part, sign, power = number.groups()
        message = f"YAML reads {error['input']} as text; write {whole}{part or '.0'}e{sign or '+'}{power}"
    return f"{where}: {message}" if where else message
