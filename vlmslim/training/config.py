"""The command line and the configuration of a training script."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml


def command_line(description: str, config: Path, result: str) -> argparse.ArgumentParser:
    """The command line of a training script: `--config FILE --out DIR [--stop STEP] [KEY=VALUE ...]`.

    `config` is the default configuration, `result` what lies in DIR at the end. Parse with `parse_intermixed_args`.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--config", type=Path, default=config)
    parser.add_argument("--out", type=Path, required=True, help=f"run folder; {result}")
    parser.add_argument("--stop", type=int, help="stop after this step (a later call goes on)")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="instead of the configuration's value")
    return parser


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> dict:
    """Read a YAML config and `override` its values."""
    return override(yaml.safe_load(Path(path).read_text()) or {}, overrides)


def override(config: dict, overrides: Sequence[str]) -> dict:
    """The config with other values: KEY=VALUE, or KEY.OPTION=VALUE for one option of a key that has several.

    Raises:
        ValueError: there is no such key, or no value.
    """
    config = dict(config)
    for given in overrides:
        names, equals, text = given.partition("=")
        key, dot, option = names.partition(".")
        if not equals:
            raise ValueError(f"{given!r} sets nothing: use KEY=VALUE")
        if key not in config:
            raise ValueError(f"no setting {key!r}; there are {', '.join(config)}")
        if dot and not isinstance(config[key], dict):
            raise ValueError(f"{key} has no options: use {key}=VALUE")
        config[key] = {**config[key], option: _value(text)} if dot else _value(text)
    return config


def _value(text: str):
    """What YAML reads, and numbers such as 5e-4, which it takes for words."""
    value = yaml.safe_load(text)
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
