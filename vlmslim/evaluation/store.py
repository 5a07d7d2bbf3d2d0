"""The output directory of a run. Every file is whole or absent, and says which run it belongs to.

run.json                     the configuration, and what every cell shares
cells/LABEL/TASK.json        lmms-eval's results of one cell, with the record of how they were made
cells/LABEL/TASK.jsonl       the samples of the cell, one question per line
solutions.json               how budgets that are costs were solved
verification.json            what `vlmslim verify` found
parts/LABEL/TASK/PART.json   answers to a part of a task that is not finished; `vlmslim.evaluation.parts`
tokens/TASK/QUESTION.json    where the visual tokens of a question went, under every row
timing.json                  prefill and decode times of all methods, measured together
leaderboard.{md,csv,json,html}
report/                      the leaderboard as a page; `vlmslim.leaderboard.report` lists its files
frames/{rows,cells,samples,pairs}.parquet
submission.json              the run as `vlmslim submit` wrote it
"""

import glob
import hashlib
import json
import unicodedata
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vlmslim.evaluation.errors import ConfigError
from vlmslim.io.files import check_writable, write_atomically
from vlmslim.io.messages import one_line, shown

LONGEST = 200  # bytes of a label or a task; file systems allow 255 for a name with its ending

#: Files beside the cells that `clear` deletes.
RESULTS = (
    "run.json",
    "solutions.json",
    "timing.json",
    "submission.json",
    "verification.json",
    *(f"leaderboard.{end}" for end in ("md", "csv", "json", "html")),
    *(f"report/{name}" for name in ("index.html", "report.css", "chart.js", "report.js")),
    *(f"frames/{name}.parquet" for name in ("rows", "cells", "samples", "pairs")),
)


def digest(value: object) -> str:
    """Hash anything that JSON can hold. The order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def timing_key(label: str, made_with: dict) -> list:
    """Return what the times of a row belong to.

    Args:
        label: of the row.
        made_with: a record of the row's stages, and of its weights and its code where they are known, as in a cell.
    """
    weights = [made_with["weights"]] if "weights" in made_with else []
    code = [digest(made_with["code"])] if "code" in made_with else []
    return [label, made_with["stages"], *weights, *code]


def check_file_names(key: str, names: Iterable[str]) -> None:
    """Refuse labels or tasks whose results have no file of their own.

    Raises:
        ConfigError: a name is a place such as "..", or too long; or two names share a file, here or on a file system
            that does not tell upper from lower case.
    """
    taken: dict[str, str] = {}
    for name in names:
        file = file_name(name)
        if not file.strip(".") or len(file.encode(errors="replace")) > LONGEST or "\0" in file:
            raise ConfigError(f"{key}: {shown(name)} names no file: use at most {LONGEST} bytes, not only dots")
        same = unicodedata.normalize("NFC", file).casefold()
        if same in taken:
            what = f"two are called {name!r}" if taken[same] == name else f"{taken[same]!r} and {name!r} share a file"
            raise ConfigError(f"{key}: {what}; give one of them another {'label' if key == 'methods' else 'name'!r}")
        taken[same] = name


def file_name(task: str) -> str:
    """Return the name of a task's files, without their ending."""
    return task.replace("/", "_")


def _sealed(record: dict) -> str:
    """Write a record as JSON, with a hash of itself."""
    record = json.loads(json.dumps(record, default=str))
    return json.dumps({**record, "seal": digest(record)}, indent=1, ensure_ascii=False) + "\n"


def _unsealed(path: Path) -> dict | None:
    """Read a record; None if the file is absent, cut short or changed."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        seal = record.pop("seal")
    except (OSError, ValueError, RecursionError, LookupError, AttributeError, TypeError):
        return None
    return record if seal == digest(record) else None


@contextmanager
def reading(directory: Path | str) -> Iterator[None]:
    """Turn the error over a record of another form than vlmslim writes into a sentence; its seal may be right.

    Raises:
        ConfigError: the message names the directory and says how to continue.
    """
    try:
        yield
    except (ConfigError, OSError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{directory} holds a record of another form than vlmslim writes ({type(error).__name__}: "
            f"{one_line(error)}); use another --output directory, or start over with --fresh"
        ) from error


class Store:
    """Reads and writes one output directory."""

    def __init__(self, directory: Path | str):
        self.directory = Path(directory)

    def prepare(self) -> None:
        """Make the directory.

        Raises:
            ConfigError: the directory cannot be written to, or has files of other origin that a run would replace.
        """
        try:
            check_writable(self.directory)
        except ValueError as error:
            raise ConfigError(f"output: {error}") from error
        cells = list(self.directory.glob("cells/*/*"))
        if self.run is None and not any(_unsealed(path) is not None for path in cells if path.suffix == ".json"):
            present = [name for name in RESULTS if (self.directory / name).exists()]
            present = [name for name in present if _unsealed(self.directory / name) is None]  # of a refused run
            if present := present + [str(path.relative_to(self.directory)) for path in cells]:
                raise ConfigError(
                    f"output: {self.directory} holds {present[0]}, and nothing there says that vlmslim wrote it; move "
                    "it away, or use another --output directory"
                )

    # ------------------------------------------------------------------ the run

    @property
    def run(self) -> dict | None:
        """The record that `save_run` wrote; None in a directory without a run."""
        return _unsealed(self.directory / "run.json")

    def check_run(self, shared: dict) -> str:
        """Check that new results may be added to those in the directory. Nothing is written.

        Args:
            shared: everything that changes the numbers of all cells.

        Returns:
            The hash of `shared`, which every cell carries.

        Raises:
            ConfigError: the directory holds results that are not comparable; the message names what differs.
        """
        before = self.run
        if not any(self.directory.glob("cells/*/*.json")) and not any(self.directory.glob("parts/*/*/*.json")):
            return digest(shared)  # an earlier run failed before its first answers: there is nothing to mix with
        if before is None:
            raise ConfigError(f"{self.directory} holds cells but no readable run.json; use another --output or --fresh")
        if lines := differences(before["shared"], json.loads(json.dumps(shared))):
            raise ConfigError(
                f"{self.directory} holds results of another run, and numbers must not be mixed:\n"
                + "\n".join(f"  {line}" for line in lines)
                + "\nUse another --output directory, restore the configuration, or start over with --fresh"
            )
        return digest(shared)

    def save_run(self, shared: dict, config: dict) -> None:
        """Write what every cell shares, and the configuration, which may list more methods and tasks than before."""
        write_atomically(self.directory / "run.json", _sealed({"shared": shared, "config": config}))

    def clear(self) -> None:
        """Delete the results, and no other file in the directory: cells are known by their seal."""
        for path in self.directory.glob("cells/*/*.json"):
            if _unsealed(path) is not None:
                path.unlink()
                path.with_suffix(".jsonl").unlink(missing_ok=True)
        for path in (*self.directory.glob("tokens/*/*.json"), *self.directory.glob("parts/*/*/*.json")):
            if _unsealed(path) is not None:
                path.unlink()
        for path in (*(self.directory / name for name in RESULTS), *self.directory.glob("report/data/*.js")):
            path.unlink(missing_ok=True)
        emptied = ("cells", "tokens", "parts", "report/data", "report", "frames")
        folders = [
            path for name in ("cells/*", "tokens/*", "parts/*/*", "parts/*") for path in self.directory.glob(name)
        ]
        for folder in (*folders, *(self.directory / name for name in emptied)):
            with suppress(OSError):  # something else is in it
                folder.rmdir()

    def save_solutions(self, record: dict) -> None:
        """Write how budgets that are costs were solved."""
        write_atomically(self.directory / "solutions.json", _sealed(record))

    @property
    def solutions(self) -> dict | None:
        """The record that `save_solutions` wrote; None if there is none, or if the file is not whole."""
        return _unsealed(self.directory / "solutions.json")

    # ------------------------------------------------------------------ cells

    def _path(self, label: str, task: str) -> Path:
        return self.directory / "cells" / label / f"{file_name(task)}.json"

    def save_cell(self, label: str, task: str, record: dict, samples: Iterable[dict]) -> None:
        """Write a finished cell: the samples first, then the record with their hash."""
        path = self._path(label, task)
        lines = "".join(json.dumps(s, default=str, ensure_ascii=False) + "\n" for s in samples)
        write_atomically(path.with_suffix(".jsonl"), lines)
        seal = hashlib.sha256(lines.encode()).hexdigest()
        write_atomically(path, _sealed({**record, "label": label, "task": task, "samples_sha256": seal}))

    def cell(self, label: str, task: str) -> dict | None:
        """Read the record of a finished cell; None if it is absent, moved from elsewhere, or not whole."""
        path = self._path(label, task)
        record = _unsealed(path)
        samples = path.with_suffix(".jsonl")
        if record is None or not samples.is_file() or (record.get("label"), record.get("task")) != (label, task):
            return None
        whole = hashlib.sha256(samples.read_bytes()).hexdigest() == record.get("samples_sha256")
        return record if whole else None

    def is_damaged(self, label: str, task: str) -> bool:
        """Tell whether there is a cell that is not whole."""
        return self._path(label, task).exists() and self.cell(label, task) is None

    def samples(self, label: str, task: str) -> list[dict]:
        """Read the samples of a finished cell, in the order of the task's questions."""
        text = self._path(label, task).with_suffix(".jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.split("\n")[:-1]]

    def samples_hash(self, label: str, task: str) -> str | None:
        """Return the hash of the samples of a cell; None where there is no cell that is whole."""
        cell = self.cell(label, task)
        return None if cell is None else cell["samples_sha256"]

    # ------------------------------------------------------------------ parts of unfinished cells

    def _parts_path(self, label: str, task: str) -> Path:
        return self.directory / "parts" / label / file_name(task)

    def save_part(self, label: str, task: str, name: str, record: dict) -> None:
        """Write the answers to a part of a task that is not finished."""
        path = self._parts_path(label, task) / f"{name}.json"
        write_atomically(path, _sealed({**record, "label": label, "task": task, "name": name}))

    def part(self, label: str, task: str, name: str) -> dict | None:
        """Read what `save_part` wrote; None if it is absent, moved from elsewhere, or not whole."""
        record = _unsealed(self._parts_path(label, task) / f"{name}.json")
        place = {"label": label, "task": task, "name": name}
        return record if record is not None and record | place == record else None

    def parts(self, label: str, task: str) -> list[dict]:
        """Read all parts of an unfinished cell that are whole."""
        names = sorted(path.stem for path in self._parts_path(label, task).glob("*.json"))
        return [record for name in names if (record := self.part(label, task, name)) is not None]

    def delete_parts(self, label: str, task: str) -> None:
        """Delete the parts of a cell, which is finished or has failed."""
        folder = self._parts_path(label, task)
        for path in folder.glob("*.json"):
            path.unlink()
        for empty in (folder, folder.parent, folder.parent.parent):
            with suppress(OSError):  # something else is in it, or there was no part
                empty.rmdir()

    # ------------------------------------------------------------------ tokens

    def _tokens_path(self, task: str, question: int) -> Path:
        return self.directory / "tokens" / file_name(task) / f"{question}.json"

    def save_tokens(self, task: str, question: int, record: dict) -> None:
        """Write where the tokens of one question went."""
        write_atomically(self._tokens_path(task, question), _sealed({**record, "task": task, "question": question}))

    def tokens(self, task: str, question: int) -> dict | None:
        """Read what `save_tokens` wrote; None if there is nothing, or if it is not whole."""
        record = _unsealed(self._tokens_path(task, question))
        return record if record is not None and record.get("task") == task else None

    def questions_with_tokens(self, task: str) -> list[int]:
        """List the questions of a task whose tokens were recorded."""
        paths = self.directory.glob(f"tokens/{glob.escape(file_name(task))}/*.json")
        return sorted(int(path.stem) for path in paths if path.stem.isdecimal())

    # ------------------------------------------------------------------ timings

    def save_timing(self, record: dict) -> None:
        """Write the times of all methods, which were measured together."""
        write_atomically(self.directory / "timing.json", _sealed(record))

    @property
    def timing(self) -> dict | None:
        """The record that `save_timing` wrote; None if there is none, or if the file is not whole."""
        return _unsealed(self.directory / "timing.json")

    # ------------------------------------------------------------------ verification

    def save_verification(self, record: dict) -> None:
        """Write what came out when a sample of the run's questions was asked again."""
        write_atomically(self.directory / "verification.json", _sealed(record))

    @property
    def verification(self) -> dict | None:
        """The record that `save_verification` wrote; None if there is none, or if the file is not whole."""
        return _unsealed(self.directory / "verification.json")


def differences(before: dict, now: dict, where: str = "") -> list[str]:
    """Write one line for each key, also of nested dictionaries, that has two values."""
    lines = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{where}{key}.")
        elif old != new:
            lines.append(f"{where}{key}: {old!r} there, {new!r} now")
    return lines
