"""`vlmslim run --export`: every cell of a comparison as a plain configuration file of lmms-eval."""

import json
from pathlib import Path

import yaml

from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.schema import AUTO
from vlmslim.evaluation.tasks import Tasks
from vlmslim.evaluation.variants import Variant
from vlmslim.io.files import check_writable, write_atomically


def export_cells(config: RunConfig, directory: Path) -> list[Path]:
    """Write one file a cell, for `python -m lmms_eval --config FILE`.

    Raises:
        ConfigError: the directory cannot be written to, a budget is a cost, which only `vlmslim run` can solve,
            the batch size is "auto", or an argument cannot be written in lmms-eval's form `key=value,...`.
    """
    if config.batch_size == AUTO:
        raise ConfigError("batch_size: auto is found by vlmslim run; for plain files write a number, such as 8")
    variants, tasks = config.variants(), Tasks(config)
    for variant in variants:
        if variant.unsolved:
            raise ConfigError(
                f"{variant.label}: a cost is solved on the model, by vlmslim run; for plain files write the "
                "option that it found (solutions.json in the output directory) instead of the cost"
            )
    try:
        check_writable(directory)
    except ValueError as error:
        raise ConfigError(f"--export: {error}") from error
    paths = []
    for variant in variants:
        for task in tasks.leaves:
            path = directory / f"{variant.label}__{task.task.replace('/', '_')}.yaml"
            plain = {
                "model": "vlmslim",
                "model_args": _model_args(config, variant),
                "tasks": task.task,
                "include_path": tasks.include_path,
                "batch_size": config.batch_size,
                "seed": [config.seed] * 4,
                "log_samples": True,
                "output_path": str(directory / "results" / path.stem),
                "verbosity": "DEBUG",  # at any other level lmms-eval ends with exit status 0 after a failure
            } | ({} if config.limit is None else {"limit": config.limit})
            write_atomically(path, yaml.safe_dump(plain, sort_keys=False, width=1000))
            paths.append(path)
    return paths


def _model_args(config: RunConfig, variant: Variant) -> str:
    """Write the arguments of the model as lmms-eval reads them."""
    from lmms_eval.utils import simple_parse_args_string

    stages = list(variant.stages)
    method = stages[0] if len(stages) == 1 else {"method": json.dumps(stages)}
    arguments = config.model.arguments() | method
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    if simple_parse_args_string(text) != arguments:
        raise ConfigError(f"lmms-eval would not read {arguments} back from {text!r}; rename the path or the option")
    return text
