"""The YAML behind `vlmslim run`: which model, which tasks, which methods at which budgets.

An example:

    model: {pretrained: bundled/tiny-llava, dtype: float32, device: cpu}
    tasks: [scenes_count, {task: pope, metric: pope_f1_score}]
    budgets: [64, 16]
    methods: [divprune, {method: fastv, keep: 64, layer: 3}]
    output: runs/example

Unknown keys are errors. The unpatched model (`none`) is in every comparison and runs first; the baselines follow.
"""

import re
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, ValidationError, model_validator

Keep = StrictInt | StrictFloat


class ConfigError(ValueError):
    """A configuration that cannot be run; the message says which key and what to write instead."""


def did_you_mean(name: str, known) -> str:
    """A hint with the nearest known name, or nothing."""
    near = get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


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
    """One lmms-eval task, group or tag; `metric` is the one on the leaderboard (by default the task's first)."""

    task: str
    metric: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data):
        return {"task": data} if isinstance(data, str) else data


class MethodConfig(_Strict):
    """A method with its options, or a list of stages. `keep` may list several budgets; other keys are options."""

    model_config = ConfigDict(extra="allow", frozen=True)

    method: str | None = None
    stages: list[dict] | None = None
    keep: Keep | Annotated[list[Keep], Field(min_length=1)] | None = None
    label: Annotated[str, Field(pattern=r"^[\w.+=,-]+$")] | None = None

    @model_validator(mode="before")
    @classmethod
    def _name_alone(cls, data):
        return {"method": data} if isinstance(data, str) else data

    @model_validator(mode="after")
    def _one_or_the_other(self):
        if (self.method is None) == (self.stages is None):
            raise ValueError("give either 'method' or 'stages'")
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
    budgets: list[Keep] = []
    baselines: list[str] = ["random"]
    batch_size: Annotated[int, Field(ge=1)] = 1
    seed: int = 0
    limit: Annotated[int, Field(ge=1)] | None = None
    output: Path
    include_path: list[Path] = []
    timing: TimingConfig | None = TimingConfig()

    def variants(self) -> list["Variant"]:
        """Every method at every budget: the unpatched model first, then the baselines, then the methods.

        Raises:
            ConfigError: a method or an option does not exist or is out of range, or two rows have one label.
        """
        listed = list(chain.from_iterable(self._expand(entry) for entry in self.methods))
        budgets = dict.fromkeys([v.budget for v in listed if v.budget is not None])
        base = [MethodConfig(method=name, keep=list(budgets)) for name in self.baselines if budgets]
        baselines = list(chain.from_iterable(self._expand(entry) for entry in base))
        mentioned = {v.identity for v in listed}
        rows = [Variant("none", ({"method": "none"},))]
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
            stages = tuple(self._seeded(stage) for stage in entry.stages)
            return [Variant(entry.label or "+".join(_label(**s) for s in entry.stages), stages, _budget(entry.stages))]
        given = entry.keep if isinstance(entry.keep, list) else [entry.keep]
        if entry.keep is None and "keep" in _options(entry.method):
            default = _options(entry.method)["keep"]
            given = self.budgets or ([] if default is MISSING else [default])
            if not given:
                raise ConfigError(f"{entry.method}: how many tokens? Give 'keep' here, or 'budgets' for all methods")
        rows = []
        for keep in given:
            stage = {"method": entry.method} | ({} if keep is None else {"keep": keep}) | entry.options
            label = entry.label or _label(**stage)
            if entry.label and len(given) > 1:
                label = f"{entry.label}-{keep}"
            rows.append(Variant(label, (self._seeded(stage),), keep))
        return rows

    def _seeded(self, stage: dict) -> dict:
        """The stage checked, and given the run's seed if its method draws random numbers."""
        from vlmslim.methods import method

        stage = dict(stage)
        name = stage.pop("method")
        if "seed" in _options(name):
            stage.setdefault("seed", self.seed)
        try:
            method(name, **stage)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        return {"method": name, **stage}

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
    budget : the `keep` that rows are grouped by; None where there is none
    """

    label: str
    stages: tuple[dict, ...] = field(hash=False)
    budget: int | float | None = None

    @property
    def identity(self) -> str:
        """What it does, whatever its label."""
        return repr([sorted(stage.items(), key=str) for stage in self.stages])

    @property
    def unpatched(self) -> bool:
        """Whether this is the model as it is."""
        return all(stage["method"] == "none" for stage in self.stages)


def _options(name: str) -> dict:
    """Options of a method, with their defaults."""
    from vlmslim.methods import method_class

    try:
        return {f.name: f.default for f in fields(method_class(name)) if f.init}
    except ValueError as error:
        raise ConfigError(str(error)) from error


def _label(method: str, keep=None, **options) -> str:
    parts = [method, *([str(keep)] if keep is not None else []), *(f"{k}={v}" for k, v in sorted(options.items()))]
    return re.sub(r"[^\w.+=,-]+", "_", "-".join(parts))


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
        raise ConfigError("\n".join(f"{path}: {_describe(e)}" for e in error.errors())) from error
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _describe(error: dict) -> str:
    where = ".".join(str(part) for part in error["loc"] if part not in ("int", "float") and "[" not in str(part))
    message = error["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
