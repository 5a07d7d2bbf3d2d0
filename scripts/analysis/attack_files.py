"""Attacks on what vlmslim writes: the files of a run, saved patches, and processes that are killed while they write."""

import contextlib
import json
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import yaml
from attack_base import Attack, Bad, small
from evaluation_doubles import FakeHarness
from nonsense import same, spoil_bytes, spoil_value
from tiny import tiny

import vlmslim
from vlmslim.cli import app
from vlmslim.evaluation import harness
from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import digest
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.render import render
from vlmslim.saving.folder import read


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
