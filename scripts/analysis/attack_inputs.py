"""Attacks on what a user writes: options of methods, configurations, and the command line."""

import contextlib
import json
import math
import random
import types
import typing
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml
from attack_base import CLEAR, CONFIG, Attack, Bad, small
from evaluation_doubles import FakeHarness
from nonsense import leaves, odd, same, spoil_bytes, spoil_value, value
from tiny import tiny
from typer.testing import CliRunner

import vlmslim
from vlmslim.cli import app
from vlmslim.evaluation import harness
from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.run import run
from vlmslim.registry import method_class, method_names, options_of


class Options(Attack):
    """Values of a wrong type or out of range, for any option of any method, patched onto a model."""

    title, tries = "options of methods", 5000

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model = tiny("llava")
        self.options = [(name, f) for name in method_names() for f in fields(method_class(name)) if f.init]

    def strike(self, rng: random.Random) -> None:
        """Patch a model with a value; what is accepted must be of the type in the annotation, and finite."""
        name, field = rng.choice(self.options)
        given = rng.choice([value(rng), value(rng), b"x", {1}, object(), np.float32(math.nan), torch.ones(2), 10**5000])
        needed: dict[str, Any] = {"keep": 4} if "keep" in options_of(name) else {}
        needed |= {"weights": "random"} if "weights" in options_of(name) else {}
        kind = typing.get_type_hints(method_class(name))[field.name]
        try:
            vlmslim.patch(self.model, name, **needed | {field.name: given}).remove()
        except CLEAR as error:
            if f"{field.name}=" not in str(error) and may_be(given, kind) is False:
                raise Bad("traceback", f"{name}.{field.name}={given!r}: the option is not named: {error}") from error
            raise
        finally:
            if getattr(self.model, "_vlmslim", None) is not None:
                self.model._vlmslim.remove()
                raise Bad("accepted", f"{name}.{field.name}={given!r} was refused, and the model stayed patched")
        if may_be(given, kind) is False:
            raise Bad("accepted", f"{name}.{field.name}={given!r} ({kind})")


def may_be(given: Any, kind: Any) -> bool | None:
    """Tell whether a value may be of a type, without the code of vlmslim; None where the annotation does not tell."""
    kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    plain = {typing.get_origin(k) or k for k in kinds}
    if typing.Any in plain:
        return None
    if isinstance(given, bool):
        return bool in plain
    if isinstance(given, int):
        return bool(plain & {int, float}) and abs(given) < 2**63
    if isinstance(given, float):
        return float in plain and math.isfinite(given)
    if isinstance(given, str):
        return str in plain or typing.Literal in plain
    if given is None:
        return type(None) in plain
    if isinstance(given, list):
        return bool(plain - {int, float, str, bool, type(None), typing.Literal})
    return False


class Yaml(Attack):
    """Configurations of `vlmslim run`: wrong values, unknown keys, anchors, depth, encodings, damaged text."""

    title, tries = "configurations", 1500

    def strike(self, rng: random.Random) -> None:
        """Read a spoilt configuration; what is accepted must hold the values of the file, unchanged."""
        file = self.folder / "config.yaml"
        data, _ = spoil_value(rng, CONFIG) if rng.random() < 0.7 else (CONFIG, ())
        try:
            text = yaml.safe_dump(data, allow_unicode=True).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, ValueError):
            text = json.dumps(CONFIG).encode()
        file.write_bytes(text if rng.random() < 0.7 else spoil_bytes(rng, text))
        config = load_config(file)
        given = yaml.safe_load(file.read_bytes())
        for key in given:
            taken = getattr(config, key)
            if key in ("seed", "limit", "batch_size", "baselines", "budget_prompts") and not same(taken, given[key]):
                raise Bad("accepted", f"{key}: {given[key]!r} became {taken!r}")
        for wrong in (math.nan, math.inf):
            if any(same(part, wrong) for part in leaves(config.model_dump())):
                raise Bad("accepted", f"{wrong} in {file.read_bytes()!r}")


class Command(Attack):
    """The command line: wrong options, missing and doubled arguments, odd names, damaged configurations."""

    title, tries = "command line", 400

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.config, out = folder / "config.yaml", folder / "out"
        self.config.write_text(yaml.safe_dump(small(out)))
        run(load_config(self.config), harness=FakeHarness())
        nowhere = str(folder / "nowhere")
        self.calls = [
            ["run", str(self.config), "--limit", "2", "--output", str(folder / "new"), "--fresh"],
            ["run", str(self.config), "--export", str(folder / "export")],
            ["leaderboard", str(out), "--format", "csv", "--published"],
            ["leaderboard", str(out), "-f", "html", "--published-tables", str(folder)],
            ["methods", "fastv"],
            ["doctor", nowhere, "-m", "divprune:keep=4", "-m", "fastv:keep=4+drop_visual:layer=2", "--keep", "0.5"],
            ["doctor", nowhere, "--dtype", "float32", "--device", "cpu", "--attention", "sdpa", "--json", "-v"],
            ["bench", nowhere, "-m", "divprune:keep=4", "--budgets", "4,0.5", "--batch", "1,2", "--image-size", "9x9"],
            ["bench", nowhere, "--images", "2", "--text-tokens", "4", "--new-tokens", "3", "--repeats", "1"],
            ["bench", "--shape", "llava-1.5-99b", "--layers", "1", "--dtype", "float32", "--device", "cpu"],
        ]

    def strike(self, rng: random.Random) -> None:
        """Call a command with an argument replaced, dropped, doubled or spoilt."""
        words = list(rng.choice(self.calls))
        for _ in range(rng.randint(1, 2)):
            place = rng.randrange(len(words))
            match rng.randrange(5):
                case 0:
                    del words[place]
                case 1:
                    words.insert(place, words[rng.randrange(len(words))])
                case 2:
                    words[place] = odd(rng)
                case 3:
                    words.insert(place, rng.choice(["--nonsense", "-x", "--", "-m", "--keep", "--help", "--traceback"]))
                case 4:
                    words[place] = spoil_bytes(rng, words[place].encode()).decode("utf-8", "replace")[:500]
            if not words:
                break
        with mock.patch.object(harness, "Harness", FakeHarness()), contextlib.chdir(self.folder):
            result = CliRunner().invoke(app, words)
        error = result.exception
        if error is not None and not isinstance(error, SystemExit):
            raise Bad("traceback", f"{words}: {type(error).__name__}: {error}") from error
        if result.exit_code not in (0, 1, 2):
            raise Bad("traceback", f"{words}: status {result.exit_code}")
        unexpected = "shows where" in result.stderr or "Traceback" in result.stderr and "--traceback" not in words
        if result.exit_code and (unexpected or not result.stderr.strip()):
            raise Bad("traceback", f"{words}: status {result.exit_code}, {result.stderr[-300:]!r}")
        if result.exit_code:
            raise ValueError(result.stderr)
