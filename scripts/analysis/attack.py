"""Attack vlmslim with seeded nonsense and bad luck, and count what happens.

    python scripts/analysis/attack.py                                     # all, and the table of docs/reliability.md
    python scripts/analysis/attack.py --only yaml --tries 500             # one kind of attack
    python scripts/analysis/attack.py --only yaml --first 1234 --tries 1  # a try that failed, once more

Every try has a random generator of its own, made of the seed, the kind of attack and the number of the try, so that it
repeats alone. An outcome is one of these:

works     : the try was harmless, or the damage was undone, and the result is right
clear     : refused in one sentence, with a ValueError, ImportError or OSError, or with exit status 1, 2 or 128 + signal
traceback : another exception, or a message of more than one line where one mistake was made
accepted  : nonsense was taken, or a damaged result was shown as if it were whole
hang      : more than 20 seconds of processor time
lost      : a finished result, or a file of the user, is gone

The script exits with status 1 if any outcome is one of the last four.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import types
import typing
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))  # the tiny models and the stand-in for lmms-eval

from evaluation_doubles import FakeHarness  # noqa: E402
from tiny import tiny  # noqa: E402
from typer.testing import CliRunner  # noqa: E402

import vlmslim  # noqa: E402
from vlmslim.cli import app  # noqa: E402
from vlmslim.evaluation import harness  # noqa: E402
from vlmslim.evaluation.config import load_config  # noqa: E402
from vlmslim.evaluation.errors import CellError  # noqa: E402
from vlmslim.evaluation.run import run  # noqa: E402
from vlmslim.evaluation.store import digest  # noqa: E402
from vlmslim.io import provenance  # noqa: E402
from vlmslim.io.files import markdown_table  # noqa: E402
from vlmslim.leaderboard.board import Leaderboard  # noqa: E402
from vlmslim.leaderboard.render import render  # noqa: E402
from vlmslim.registry import method_class, method_names, options_of  # noqa: E402
from vlmslim.saving.folder import read  # noqa: E402

OUTCOMES = ("works", "clear", "traceback", "accepted", "hang", "lost")
BAD = OUTCOMES[2:]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- begin of the table of scripts/analysis/attack.py -->", "<!-- end of the table -->"
HANG = 20  # seconds of processor time
#: How a mistake is reported: what `vlmslim` turns into one line.
CLEAR = (ValueError, ImportError, OSError, CellError)


class Hang(BaseException):
    """A try took too long."""


class Bad(Exception):
    """A try ended in one of the outcomes `BAD`, and why."""

    def __init__(self, outcome: str, why: str):
        super().__init__(why)
        self.outcome = outcome


# --- nonsense ---------------------------------------------------------------------------------------------------------


def value(rng: random.Random) -> Any:
    """Draw a value that JSON and YAML can hold, and that few keys can have."""
    return rng.choice(
        [
            *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**400, -(10**400)),
            *(-0.5, 0.0, 0.3, 1.0, 1e308, 5e-324, math.nan, math.inf, -math.inf),
            *("", " ", "no", "off", "None", "nan", "1e9", "-1", "x" * 300, "..", "../../x", "/", "a\0b", "=1+1", "\n"),
            *("\u202e", "\ud7ff", "bundled/nothing", "nobody.py:X", "[", "{", "&a", "*a", "!x", "%", "𝟙"),
            *([], [[]], [None], [1, "a", None], {}, {"a": 1}, {"": {}}, [{"method": "none"}] * 2),
            json.loads("[" * 60 + "]" * 60),
        ]
    )


_PIECES = [b"\0", b"\t", b"\xff\xfe", b"9" * 5000, b"[" * 3000, b"&a ", b"*a", b"!!python/name:os.system "]


def spoil_bytes(rng: random.Random, data: bytes) -> bytes:
    """Change a few bytes of a file, cut it, or write it in another encoding."""
    spot, other = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    low, high = sorted((spot, other))
    match rng.randrange(9):
        case 0:
            return data[:spot]
        case 1:
            return data[spot:]
        case 2:
            return data[:low] + data[high:]
        case 3:
            return data[:high] + data[low:]
        case 4:
            return data[:spot] + rng.randbytes(rng.randint(1, 8)) + data[spot + 8 :]
        case 5:
            return data[:spot] + rng.choice(_PIECES) + data[spot:]
        case 6:
            place = min(spot, len(data) - 1)
            return data[:place] + bytes([data[place] ^ (1 << rng.randrange(8))]) + data[place + 1 :]
        case 7:
            return data.decode("utf-8", "replace").encode(rng.choice(["utf-16", "utf-32", "utf-8-sig"]))
    return rng.choice([b"", b"\0" * 100, b"{}", b"[]", b"null", b"0", b'"x"', rng.randbytes(50)])


def places(data: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the paths of all values inside dictionaries and lists."""
    yield path
    pairs = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, part in pairs:
        yield from places(part, (*path, key))


def spoil_value(rng: random.Random, data: Any) -> tuple[Any, tuple]:
    """Replace a value somewhere inside, delete it, or add one with an unknown key; return the place too."""
    data = json.loads(json.dumps(data))
    path = rng.choice([*places(data)])
    if not path:
        return value(rng), path
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    kind = rng.randrange(6)
    if kind == 0:
        del parent[path[-1]]
    elif kind == 1 and isinstance(parent, dict):
        parent[rng.choice(["x", "", "Keep", "methods ", "output_"])] = value(rng)
    else:
        parent[path[-1]] = value(rng)
    return data, path


# --- the kinds of attack ----------------------------------------------------------------------------------------------


class Attack:
    """One kind of attack. `strike` makes one try, and raises what it found: nothing, a refusal, or `Bad`."""

    title = ""
    tries = 0

    def __init__(self, folder: Path):
        self.folder = folder

    def strike(self, rng: random.Random) -> None:
        """Make one try."""
        raise NotImplementedError


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


CONFIG = {
    "model": {"pretrained": "bundled/tiny-llava", "dtype": "float32", "device": "cpu"},
    "tasks": ["count", {"task": "text", "metric": "acc", "group": "OCR"}],
    "budgets": [64, 0.25],
    "methods": ["divprune", {"method": "fastv", "keep": 64, "layer": 2}, {"label": "two", "stages": [
        {"method": "divprune", "keep": 64}, {"method": "fastv", "keep": 16}]}],
    "baselines": ["random"],
    "batch_size": 2,
    "seed": 0,
    "limit": 4,
    "timing": {"prompts": 2, "repeats": 2, "new_tokens": 4},
    "output": "out",
}  # fmt: skip


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


def same(a: Any, b: Any) -> bool:
    """Compare two values with their types, in lists too."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and (a == b or a != a and b != b)


def leaves(data: Any) -> Iterator[Any]:
    """Yield all values that are no dictionaries and no lists."""
    parts = data.values() if isinstance(data, dict) else data if isinstance(data, list | tuple) else None
    if parts is None:
        yield data
    else:
        for part in parts:
            yield from leaves(part)


class Results(Attack):
    """The files of a finished run: bytes flipped, files cut and exchanged, values replaced under a correct seal."""

    title, tries = "files of a run", 800

    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "config.yaml").write_text(yaml.safe_dump(small(folder / "out")))
        self.config, self.out = load_config(folder / "config.yaml"), folder / "out"
        run(self.config, harness=FakeHarness())
        self.before = {path: path.read_bytes() for path in self.out.rglob("*") if path.is_file()}
        records = [path for path in self.before if path.suffix in (".json", ".jsonl")]
        self.files = sorted(path for path in records if "leaderboard" not in path.name)
        self.board = render(Leaderboard.read(self.out), "csv")

    def strike(self, rng: random.Random) -> None:
        """Damage a file and read the board, or resume the run; no number may change without a word."""
        path = rng.choice(self.files)
        forged = path.suffix == ".json" and rng.random() < 0.3
        try:
            if forged:
                path.write_text(resealed(rng, self.before[path]), "utf-8", "replace")
            elif rng.random() < 0.15:
                path.write_bytes(self.before[rng.choice(self.files)])
            elif rng.random() < 0.1:
                path.unlink()
            else:
                path.write_bytes(spoil_bytes(rng, self.before[path]))
            if rng.random() < 0.1:
                board = run(self.config, harness=FakeHarness())
                if not forged and render(board, "csv") != self.board:
                    raise Bad("lost", f"{path.name}: the board is another one after the run went on")
            else:
                board, cells = Leaderboard.read(self.out), "4 of 4"
                said = board.facts["cells"] != cells or path.name == "timing.json"
                if not forged and not said and render(board, "csv") != self.board:
                    raise Bad("accepted", f"{path.name}: {path.read_bytes()[:200]!r}")
                if not forged:
                    render(board, rng.choice(["md", "json", "csv"]))
        finally:
            for file, data in self.before.items():
                if not file.exists() or file.read_bytes() != data:
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(data)


def resealed(rng: random.Random, data: bytes) -> str:
    """Replace a value of a record, and seal it again."""
    record, _ = spoil_value(rng, {k: v for k, v in json.loads(data).items() if k != "seal"})
    return json.dumps({**record, "seal": digest(record)} if isinstance(record, dict) else record)


def small(output: Path) -> dict:
    """Make the configuration of a run of four cells."""
    return CONFIG | {
        "methods": ["divprune"], "budgets": [16], "baselines": False, "limit": None, "output": str(output)
    }  # fmt: skip


class Saved(Attack):
    """Saved patches: damaged JSON and weights; and folders in which the user has files of their own."""

    title, tries = "saved patches", 2500

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model, self.place = tiny("llava"), folder / "saved"
        with vlmslim.patch(self.model, "tokenflex", weights="random:3", keep=4) as slim:
            slim.save_pretrained(self.place)
        self.before = {path: path.read_bytes() for path in self.place.iterdir()}
        self.weights, self.json = sorted(self.before, key=lambda path: path.suffix == ".json")

    def strike(self, rng: random.Random) -> None:
        """Damage a file and load the patch, or save over other files."""
        if rng.random() < 0.15:
            self._save_over(rng)
            return
        path = self.weights if rng.random() < 0.3 else self.json
        try:
            if path == self.json and rng.random() < 0.6:
                data, _ = spoil_value(rng, json.loads(self.before[path]))
                path.write_text(json.dumps(data), "utf-8", "replace")
            else:
                path.write_bytes(spoil_bytes(rng, self.before[path]))
            saved = read(self.place)
            with vlmslim.patch(self.model, self.place) as slim:
                options = vars(slim.methods[0])
            if path == self.weights and path.read_bytes() != self.before[path]:
                raise Bad("accepted", "weights that are not those that were saved")
            (stage,) = saved.methods if saved is not None else [{}]
            taken = json.loads(json.dumps(options, default=str))  # JSON has no tuples
            wrong = {k: v for k, v in stage.items() if k != "method" and not same(taken.get(k), v)}
            if wrong:
                raise Bad("accepted", f"options {wrong} became {options}")
        finally:
            if getattr(self.model, "_vlmslim", None) is not None:
                self.model._vlmslim.remove()
            for file, data in self.before.items():
                file.write_bytes(data)

    def _save_over(self, rng: random.Random) -> None:
        """Save into a folder of the user."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        names = ["model.safetensors", "config.json", "vlmslim.json", self.weights.name, "base", "notes.txt", ".hidden"]
        mine = {folder / name: rng.randbytes(20) for name in rng.sample(names, 3)}
        for path, data in mine.items():
            path.write_bytes(data)
        try:
            with vlmslim.patch(self.model, "tokenflex", weights="random:3", keep=4) as slim:
                slim.save_pretrained(folder)
        finally:
            gone = [path.name for path, data in mine.items() if not path.is_file() or path.read_bytes() != data]
            shutil.rmtree(folder)
            if gone:
                raise Bad("lost", f"{', '.join(gone)} of the user")


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


def odd(rng: random.Random) -> str:
    """Draw a word that few arguments can be."""
    drawn = value(rng)
    return drawn if isinstance(drawn, str) and rng.random() < 0.5 else str(drawn)[:400]


class Kills(Attack):
    """Signals at a random moment of a run or of a save; afterwards the run goes on, and the patch loads."""

    title, tries = "kills", 40

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.model = tiny("llava")
        (folder / "config.yaml").write_text(yaml.safe_dump(small(folder / "whole") | {"tasks": ["a", "b", "c", "d"]}))
        config = load_config(folder / "config.yaml")
        started = time.perf_counter()
        self.board = render(run(config, harness=FakeHarness()), "csv")
        self.seconds = time.perf_counter() - started

    def strike(self, rng: random.Random) -> None:
        """Kill a child process, and go on where it stopped."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
        try:
            self._run(rng, folder, number) if rng.random() < 0.6 else self._save(rng, folder)
        finally:
            shutil.rmtree(folder)

    def _run(self, rng: random.Random, folder: Path, number: signal.Signals) -> None:
        config = folder / "config.yaml"
        text = (self.folder / "config.yaml").read_text()
        config.write_text(text.replace(str(self.folder / "whole"), str(folder / "out")))
        said = folder / "said.txt"

        def work() -> None:
            with (
                said.open("w") as file,
                contextlib.redirect_stdout(file),
                contextlib.redirect_stderr(file),
                mock.patch.object(harness, "Harness", FakeHarness()),
            ):
                app(["run", str(config)])

        status = killed(work, rng.uniform(0, 1.5 * self.seconds), number)
        finished = {path: path.read_bytes() for path in (folder / "out").glob("cells/*/*.json")}
        if status not in (0, -number, 128 + number):
            raise Bad("traceback", f"{number.name}: status {status}: {said.read_text()[-300:]}")
        if "Traceback" in said.read_text():
            raise Bad("traceback", f"{number.name}: {said.read_text()[-300:]}")
        board = render(run(load_config(config), harness=FakeHarness()), "csv")
        again = [path.name for path, data in finished.items() if path.read_bytes() != data]
        if again or board != self.board:
            raise Bad("lost", f"{number.name}: {again or 'another board'}")

    def _save(self, rng: random.Random, folder: Path) -> None:
        def work() -> None:
            for seed in range(100):
                with vlmslim.patch(self.model, "tokenflex", weights=f"random:{seed}", keep=4) as slim:
                    slim.save_pretrained(folder / "x")

        killed(work, rng.uniform(0, 0.5), signal.SIGKILL)
        if (folder / "x" / "vlmslim.json").exists():
            vlmslim.patch(self.model, folder / "x").remove()
        with vlmslim.patch(self.model, "tokenflex", weights="random:7", keep=4) as slim:
            slim.save_pretrained(folder / "x")
        vlmslim.patch(self.model, folder / "x").remove()


def killed(work: Callable[[], None], seconds: float, number: signal.Signals) -> int:
    """Do work in a child process, send it a signal after a while, and return its status as `subprocess` gives it."""
    child = os.fork()
    if not child:
        status = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            status = 0
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        finally:
            os._exit(status)
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


ATTACKS: dict[str, type[Attack]] = {
    "options": Options,
    "yaml": Yaml,
    "results": Results,
    "saved": Saved,
    "command": Command,
    "kills": Kills,
}


# --- counting ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A try that ended badly: its number, the outcome, and why."""

    kind: str
    number: int
    outcome: str
    why: str


def attack(kind: str, seed: int, tries: int | None = None, first: int = 0) -> tuple[Counter, list[Found]]:
    """Make the tries of one kind, and count their outcomes.

    Args:
        kind: a key of `ATTACKS`.
        seed: of all random generators.
        tries: how many; by default the number of the kind.
        first: number of the first try.
    """
    counts, found = Counter(dict.fromkeys(OUTCOMES, 0)), []
    with tempfile.TemporaryDirectory(prefix="attack-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        attacker = ATTACKS[kind](Path(folder))
        for number in range(first, first + (attacker.tries if tries is None else tries)):
            outcome, why = outcome_of(partial(attacker.strike, random.Random(f"{seed} {kind} {number}")))
            counts[outcome] += 1
            if outcome in BAD:
                found.append(Found(kind, number, outcome, why))
    return counts, found


def outcome_of(strike: Callable[[], None]) -> tuple[str, str]:
    """Make one try, and say how it ended, and why if it ended badly."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, HANG)
    try:
        strike()
    except Hang:
        return "hang", f"more than {HANG} s"
    except Bad as bad:
        return bad.outcome, str(bad)
    except CLEAR as error:
        said = str(error)
        if said.strip() and len(said) < 5000:
            return "clear", ""
        return "traceback", f"{type(error).__name__}: {said[:300]}"
    except Exception as error:
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        where = "" if trace is None else f" ({Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno})"
        return "traceback", f"{type(error).__name__}: {str(error)[:300]}{where}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
    return "works", ""


def table(counts: dict[str, Counter]) -> str:
    """Write the counts as a table in Markdown, with their sum."""
    total: Counter = Counter(dict.fromkeys(OUTCOMES, 0))
    for each in counts.values():
        total.update(each)
    heads = ["attack", "tried", "works", "clear", "traceback", "silently accepted", "hang", "lost data"]
    lines = {ATTACKS[kind].title: each for kind, each in counts.items()} | {"all": total}
    return markdown_table(
        heads, [[name, str(sum(each.values())), *(str(each[o]) for o in OUTCOMES)] for name, each in lines.items()]
    )


def write_page(text: str, seed: int) -> None:
    """Put the table between the marks of the page, with all that it depends on."""
    known = provenance.versions()
    versions = ", ".join(f"{name} {known[name]}" for name in ("vlmslim", "torch", "transformers", "lmms_eval"))
    commit = (provenance.git_commit() or "unknown")[:12]
    head, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    _, tail = rest.split(END)
    made = f"Seed {seed}, commit {commit}, {versions}, Python {sys.version.split()[0]}."
    PAGE.write_text(f"{head}{BEGIN}\n\n{text}\n\n{made}\n\n{END}{tail}", encoding="utf-8")


def main() -> None:
    """Read the command line, attack, print the table and write it into the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="kinds of attack")
    parser.add_argument("--tries", type=int, help="of each kind, instead of its own number")
    parser.add_argument("--first", type=int, default=0, help="number of the first try")
    given = parser.parse_args()
    torch.set_num_threads(1)
    counts, found = {}, []
    for kind in given.only:
        started = time.process_time()
        with contextlib.redirect_stderr(io.StringIO()):
            counts[kind], bad = attack(kind, given.seed, given.tries, given.first)
        found += bad
        for each in bad:
            print(f"{each.outcome}: {each.kind} {each.number}: {each.why}")
        print(f"{kind}: {dict(counts[kind])}, {time.process_time() - started:.0f} s", flush=True)
    print(f"\n{table(counts)}")
    if given.only == list(ATTACKS) and given.tries is None:
        write_page(table(counts), given.seed)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
