"""The configuration of `vlmslim run`: which model, which tasks, which methods at which budgets.

An example:

    model: {pretrained: bundled/tiny-llava, dtype: float32, device: cpu}
    tasks: [scenes_count, {task: pope, metric: pope_f1_score}]
    budgets: [64, 16, {equivalent_tokens: 64}]
    methods: [divprune, {method: fastv, keep: 64, layer: 3}]
    output: runs/example

A budget is the `keep` of each method, or a cost that is the same for all; then each method's own option is solved on
the model (`vlmslim.cost.budget`). The unpatched model (`none`) is in every comparison and runs first, then the
baselines. A default baseline that is not defined for the checkpoint is left out.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_core import ErrorDetails

from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.schema import (
    BatchSize,
    Budget,
    Count,
    MethodConfig,
    ModelConfig,
    ReportConfig,
    ResourcesConfig,
    Strict,
    TaskConfig,
    TimingConfig,
)
from vlmslim.evaluation.variants import Variant, expand
from vlmslim.io.messages import did_you_mean, shown
from vlmslim.io.yaml_files import read_yaml


class RunConfig(Strict):
    """A whole comparison."""

    model: ModelConfig
    tasks: Annotated[list[TaskConfig], Field(min_length=1)]
    methods: Annotated[list[MethodConfig], Field(min_length=1)]
    budgets: list[Budget] = []
    budget_prompts: Count = 16
    baselines: list[str] | Literal[False] = ["random", "uniform", "blind", "downsample"]  # a good method beats them
    batch_size: BatchSize = 1
    seed: Annotated[int, Field(ge=0, lt=2**32, strict=True)] = 0  # NumPy takes no others
    limit: Count | None = None
    output: Path
    include_path: list[Path] = []
    timing: TimingConfig | None = TimingConfig()
    report: ReportConfig = ReportConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @field_validator("baselines", mode="before")
    @classmethod
    def _no_number(cls, baselines: Any) -> Any:
        if isinstance(baselines, int | float) and baselines is not False:  # 0 and 0.0 equal False
            raise ValueError("give a list of methods, or false for none")
        return baselines

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: list[TaskConfig]) -> list[TaskConfig]:
        names = [task.task for task in tasks]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"listed twice: {', '.join(twice)}")
        return tasks

    def variants(self) -> list[Variant]:
        """Return the rows of the leaderboard: every method at every budget; see `variants.expand`.

        Raises:
            ConfigError: a method or an option does not exist or is out of range, or two rows have one label.
        """
        return expand(self)

    def shared(self) -> dict[str, Any]:
        """Return what changes the numbers of every cell, ready for JSON; runs that differ here are not comparable."""
        return {
            "model": self.model.arguments(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "limit": self.limit,
        }


def load_config(path: Path | str, **overrides: Any) -> RunConfig:
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
    if not path.exists():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")])
        raise ConfigError(f"{path}: no such file.{near}")
    try:
        data = read_yaml(path)
        if not isinstance(data, dict):
            raise ConfigError("a configuration is a mapping with the keys model, tasks, methods and output")
        config = RunConfig.model_validate(data | {k: v for k, v in overrides.items() if v is not None})
        config.variants()
        return config
    except ValidationError as error:
        lines = dict.fromkeys(f"{path}: {_describe(e)}" for e in error.errors())
        raise ConfigError("\n".join(lines)) from error
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def validated(data: dict[str, Any]) -> RunConfig:
    """Check a configuration that no file holds.

    Raises:
        ConfigError: it does not follow the schema; names the key.
    """
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError("\n".join(dict.fromkeys(map(_describe, error.errors())))) from error


def _describe(error: ErrorDetails) -> str:
    """Say in one line which key is wrong and why."""
    where = ".".join(str(part) for part in error["loc"] if part not in ("int", "float") and "[" not in str(part))
    message = error["msg"].removeprefix("Value error, ")
    if number := re.fullmatch(r"([-+]?\d+)(\.\d*)?e([-+]?)(\d+)", _text(error["input"]), re.IGNORECASE):
        whole, fraction, sign, power = number.groups()
        message = f"YAML reads {error['input']} as text; write {whole}{fraction or '.0'}e{sign or '+'}{power}"
    return f"{where}: {message}" if where else message


def _text(value: object) -> str:
    return value if isinstance(value, str) else shown(value)
