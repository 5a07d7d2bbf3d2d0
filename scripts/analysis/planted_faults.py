"""Plant one-line faults in a copy of the package, and report which of them the test suite catches.

    python scripts/analysis/planted_faults.py                      # all faults, two at a time
    python scripts/analysis/planted_faults.py --only engine stats  # those whose name or file contains a word
    python scripts/analysis/planted_faults.py --jobs 1 --journal faults.jsonl --output assets/planted_faults.md

A fault is an entry of `planted_faults.yaml`: the file, the text to replace (it must occur exactly once), the text to
put there, and the tests that should fail. Each test that caught a fault must pass on the sound code, where the script
runs all of them at the end. It exits with status 1 if a fault survives, or if an entry no longer fits the code.

With a journal, a run that was interrupted goes on where it stopped: faults that were caught are not planted again.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue

import pytest
import yaml

from vlmslim.io.files import markdown_table

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".yaml")
COPIED = (
    "vlmslim",
    "tests",
    "scripts",
    "docs",
    "eval_configs",
    "assets/bank",
    "assets/bench",
    "pyproject.toml",
    "README.md",
)
TIMEOUT = 900  # seconds that the tests of one fault may take
#: what most tests import; a process of tests that starts with it saves its seconds
LIBRARIES = (
    "hypothesis",
    "transformers.generation.utils",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llava", "llava_next", "llava_onevision")),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("llama", "mistral", "qwen2", "clip", "siglip")),
)


@dataclass(frozen=True)
class Fault:
    """One mistake that a change of the code could make.

    name  : what is wrong then
    file  : path of the file in the repository
    old   : text that stands in it exactly once
    new   : text to replace it by
    tests : arguments of pytest that should fail
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def stale(self) -> str | None:
        """Say why the fault no longer fits the code; None if it does."""
        path = ROOT / self.file
        if not path.is_file():
            return f"{self.file} does not exist"
        found = path.read_text(encoding="utf-8").count(self.old)
        return None if found == 1 else f"{self.file} has its text {found} times, not once"


@dataclass(frozen=True)
class Outcome:
    """The tests' answer to one fault: `verdict` is caught, survived, unclear, timeout or stale."""

    fault: Fault
    verdict: str
    detail: str
    seconds: float


def read_faults(path: Path = LIST) -> list[Fault]:
    """Read the list of faults.

    Raises:
        ValueError: two faults have one name.
    """
    faults = [
        Fault(entry["name"], entry["file"], entry["old"], entry["new"], tuple(shlex.split(entry["tests"])))
        for entry in yaml.safe_load(path.read_text(encoding="utf-8"))
    ]
    names = [fault.name for fault in faults]
    if doubled := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path.name}: two faults are called {', '.join(sorted(doubled))}")
    return faults


def copy_repository(folder: Path) -> None:
    """Copy the parts of the repository that tests read."""
    for name in COPIED:
        source, target = ROOT / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy2(source, target)


def load_libraries() -> None:
    """Import the libraries, of which every process of tests gets a copy."""
    if not import_module("torch").cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as tests/conftest.py does, before anything imports Triton
    for library in LIBRARIES:
        import_module(library)


def run_tests(folder: Path, tests: Sequence[str], timeout: float | None = None) -> tuple[bool, str]:
    """Run tests in a copy of the repository: whether they passed, and the last line that says something.

    Raises:
        TimeoutError: they take longer than `timeout` seconds.
    """
    output = folder / "output.txt"
    process = get_context("fork").Process(target=_test_process, args=(folder, tests, output))
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        raise TimeoutError
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    telling = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    if process.exitcode not in (0, 1, 2, 5):  # 2: a module of tests could not be imported; 5: no test was selected
        raise RuntimeError(f"pytest could not run {' '.join(tests)}: {' '.join(lines[-5:])}")
    return process.exitcode in (0, 5), telling[0] if telling else ""


def _test_process(folder: Path, tests: Sequence[str], output: Path) -> None:
    """Be a process of pytest. It has the libraries that the script has imported, but vlmslim from `folder`."""
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    paths = [str(folder), str(folder / "scripts" / "analysis")]
    sys.path[:0] = paths
    os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "TOKENIZERS_PARALLELISM": "false"}
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] == "vlmslim"]:
        del sys.modules[name]
    sys.exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no_shrinking", *tests])))


def plant(fault: Fault, folder: Path) -> Outcome:
    """Plant a fault in a copy of the repository, run its tests, and take it out again."""
    path, start = folder / fault.file, time.perf_counter()
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        passed, line = run_tests(folder, fault.tests, TIMEOUT)
        verdict, detail = ("survived", " ".join(fault.tests)) if passed else ("caught", line)
        if verdict == "caught" and not line.startswith("FAILED"):
            verdict = "unclear"  # no test failed: a file could not be imported, or pytest broke off
    except TimeoutError:
        verdict, detail = "timeout", " ".join(fault.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    return Outcome(fault, verdict, detail, time.perf_counter() - start)


def read_journal(path: Path | None) -> dict[Fault, Outcome]:
    """Read the faults that earlier runs caught, by what was planted."""
    lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
    outcomes = []
    for entry in map(json.loads, lines):
        fault = Fault(**entry["fault"] | {"tests": tuple(entry["fault"]["tests"])})
        outcomes.append(Outcome(**entry | {"fault": fault}))
    return {outcome.fault: outcome for outcome in outcomes if outcome.verdict == "caught"}


def examine(faults: Sequence[Fault], jobs: int, journal: Path | None, check: bool) -> list[Outcome]:
    """Plant the faults that are not in the journal, `jobs` at a time, each job in a copy; none if `jobs` is 0."""
    known = read_journal(journal)
    load_libraries()
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as place:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(max(1, jobs)):
            folder = Path(place) / str(number)
            copy_repository(folder)
            free.put(folder)

        def examine_one(fault: Fault) -> Outcome:
            if reason := fault.stale():
                return Outcome(fault, "stale", reason, 0.0)
            if fault in known:
                return known[fault]
            if not jobs:
                return Outcome(fault, "not planted", " ".join(fault.tests), 0.0)
            folder = free.get()
            try:
                outcome = plant(fault, folder)
            finally:
                free.put(folder)
            print(f"{outcome.verdict:9s} {outcome.seconds:5.0f} s  {fault.name}", flush=True)
            if journal:
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(outcome)) + "\n")
            return outcome

        with ThreadPoolExecutor(max(1, jobs)) as pool:
            outcomes = list(pool.map(examine_one, faults))
        if check:
            check_sound(Path(place) / "0", outcomes)
        return outcomes


def failed_test(outcome: Outcome) -> str:
    """Name the test that caught a fault."""
    return outcome.detail.split(" ", 1)[1].split(" - ")[0]


def check_sound(folder: Path, outcomes: Sequence[Outcome]) -> None:
    """Run the tests that caught faults on the sound code.

    Raises:
        SystemExit: one of them fails there too.
    """
    tests = sorted({failed_test(outcome) for outcome in outcomes if outcome.verdict == "caught"})
    passed, line = run_tests(folder, tests) if tests else (True, "")
    if not passed:
        raise SystemExit(f"this test fails on the sound code too, so it tells nothing about its fault: {line}")


def report(outcomes: Sequence[Outcome]) -> str:
    """Write the outcomes as a page in Markdown."""
    caught = sum(outcome.verdict == "caught" for outcome in outcomes)
    rows = [
        [
            outcome.fault.name,
            f"`{outcome.fault.file}`",
            outcome.verdict,
            f"`{failed_test(outcome) if outcome.verdict == 'caught' else outcome.detail}`",
        ]
        for outcome in outcomes
    ]
    planted = sum(outcome.verdict != "not planted" for outcome in outcomes)
    head = f"# Planted faults\n\nThe suite catches {caught} of {planted} planted faults."
    if planted < len(outcomes):
        head += f" {len(outcomes) - planted} more of the list were not planted this time."
    table = markdown_table(["fault", "file", "verdict", "first test that failed"], rows)
    return f"{head} Made by `scripts/analysis/planted_faults.py`.\n\n{table}\n"


def main() -> None:
    """Read the command line, plant the faults, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="faults whose name or file has a word")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time; 0 reports the journal")
    parser.add_argument("--output", type=Path, help="write the outcomes to this file in Markdown")
    parser.add_argument("--journal", type=Path, help="note each outcome in this file, and plant no caught fault again")
    parser.add_argument("--suite-passed", action="store_true", help="do not run the tests on the sound code at the end")
    given = parser.parse_args()
    faults = read_faults()
    if given.only:
        faults = [f for f in faults if any(word in f"{f.name} {f.file}" for word in given.only)]
    outcomes = examine(faults, given.jobs, given.journal, check=not given.suite_passed)
    failures = [outcome for outcome in outcomes if outcome.verdict not in ("caught", "not planted")]
    for outcome in failures:
        print(f"{outcome.verdict}: {outcome.fault.name}: {outcome.detail}")
    print(f"{sum(outcome.verdict == 'caught' for outcome in outcomes)} of {len(outcomes)} faults are caught")
    if given.output:
        given.output.write_text(report(outcomes), encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
