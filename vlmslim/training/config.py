"""The command line and the YAML configuration of a training script."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlmslim.io.yaml_files import parse_yaml, read_yaml


def command_line(description: str, config: Path, result: str) -> argparse.ArgumentParser:
    """Make the parser of a training script: `--config FILE --out DIR [--stop STEP] [KEY=VALUE ...]`.

    Parse with `parse_intermixed_args`, because options and KEY=VALUE may stand in any order.

    Args:
        description: docstring of the script, whose first line becomes the help text.
        config: the default configuration.
        result: says in the help text what a finished run leaves in DIR.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--out", type=Path, required=True, help=f"run folder; {result}")
    parser.add_argument("--stop", type=int, help="stop after this step (a later call goes on)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="instead of the configuration's value")
    return parser


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a YAML configuration and replace values, see `override`.

    Raises:
        ValueError: the file is no YAML or no mapping, there is no such key, or no value.
    """
    try:
        config = read_yaml(Path(path)) or {}
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: a configuration is a mapping of settings")
    return override(config, overrides)


def override(config: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Replace values of a configuration: KEY=VALUE, or KEY.OPTION=VALUE for one option of a key that has several.

    Raises:
        ValueError: there is no such key, or no value.
    """
    config = dict(config)
    for text in overrides:
        names, equals, value = text.partition("=")
        key, dot, option = names.partition(".")
        if not equals:
            raise ValueError(f"{text!r} sets nothing: use KEY=VALUE")
        if key not in config:
            raise ValueError(f"no setting {key!r}; there are {', '.join(config)}")
        if dot and not isinstance(config[key], dict):
            raise ValueError(f"{key} has no options: use {key}=VALUE")
        config[key] = {**config[key], option: _parsed(value)} if dot else _parsed(value)
    return config


def _parsed(text: str) -> Any:
    """Read a value as YAML, and numbers such as 5e-4 too, because YAML takes those for words."""
    value = parse_yaml(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
