"""Plant one-line faults in a copy of the package, and report which of them the test suite catches.

    python scripts/analysis/planted_faults.py                      # all faults, two at a time
    python scripts/analysis/planted_faults.py --only engine stats  # those whose name or file contains a word
    python scripts/analysis/planted_faults.py --jobs 1 --output assets/planted_faults.md

A fault is an entry of `planted_faults.yaml`: the file, the text to replace (it must occur exactly once), the text to
put there, and the tests that should fail. The script first runs these tests on the sound code, where they must pass. It
exits with status 1 if a fault survives, or if an entry no longer fits the code.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import yaml

from vlmslim.io.files import markdown_table

ROOT = Path(__file__).resolve().parents[2]
LIST = Path(__file__).with_suffix(".yaml")
COPIED = ("vlmslim", "tests", "scripts", "docs", "eval_configs", "assets/bench", "pyproject.toml", "README.md")
TIMEOUT = 900  # seconds that the tests of one fault may take


@dataclass(frozen=True)
class Fault:
    """One mistake that somebody could make.

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
    """How the tests answered one fault: `verdict` is caught, survived, timeout or stale."""

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


def run_tests(folder: Path, tests: Sequence[str], timeout: float | None = None) -> tuple[bool, str]:
    """Run tests in a copy of the repository: whether they passed, and the last line that says something."""
    command = [sys.executable, "-B", "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *tests]
    environment = os.environ | {"PYTHONPATH": str(folder), "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout)
    lines = done.stdout.splitlines()
    telling = [line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines[-1:]
    if done.returncode not in (0, 1, 2):  # 2: a module of tests could not be imported
        raise RuntimeError(f"pytest could not run {' '.join(tests)}: {(done.stderr or done.stdout)[-500:]}")
    return done.returncode == 0, telling[0] if telling else ""


def plant(fault: Fault, folder: Path) -> Outcome:
    """Plant a fault in a copy of the repository, run its tests, and take it out again."""
    path, start = folder / fault.file, time.perf_counter()
    sound = path.read_text(encoding="utf-8")
    path.write_text(sound.replace(fault.old, fault.new), encoding="utf-8")
    try:
        passed, line = run_tests(folder, fault.tests, TIMEOUT)
        verdict, detail = ("survived", " ".join(fault.tests)) if passed else ("caught", line)
    except subprocess.TimeoutExpired:
        verdict, detail = "timeout", " ".join(fault.tests)
    finally:
        path.write_text(sound, encoding="utf-8")
    return Outcome(fault, verdict, detail, time.perf_counter() - start)


def examine(faults: Sequence[Fault], jobs: int, check_first: bool) -> list[Outcome]:
    """Plant every fault, `jobs` at a time, each job in a copy of its own."""
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as place:
        free: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            folder = Path(place) / str(number)
            copy_repository(folder)
            free.put(folder)

        if check_first:
            tests = sorted({test for fault in faults for test in fault.tests if test.startswith("tests/")})
            passed, line = run_tests(Path(place) / "0", ["-n", str(jobs), *tests])
            if not passed:
                raise SystemExit(f"the tests fail on the sound code, so that no fault can be told: {line}")

        def examine_one(fault: Fault) -> Outcome:
            if reason := fault.stale():
                return Outcome(fault, "stale", reason, 0.0)
            folder = free.get()
            try:
                outcome = plant(fault, folder)
            finally:
                free.put(folder)
            print(f"{outcome.verdict:9s} {outcome.seconds:5.0f} s  {fault.name}", flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(examine_one, faults))


def report(outcomes: Sequence[Outcome]) -> str:
    """Write the outcomes as a page in Markdown."""
    caught = sum(outcome.verdict == "caught" for outcome in outcomes)
    rows = [
        [outcome.fault.name, f"`{outcome.fault.file}`", outcome.verdict, f"`{outcome.detail.split(' - ')[0]}`"]
        for outcome in outcomes
    ]
    head = f"# Planted faults\n\nThe suite catches {caught} of {len(outcomes)} planted faults."
    table = markdown_table(["fault", "file", "verdict", "first test that failed"], rows)
    return f"{head} Made by `scripts/analysis/planted_faults.py`.\n\n{table}\n"


def main() -> None:
    """Read the command line, plant the faults, write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="faults whose name or file has a word")
    parser.add_argument("--jobs", type=int, default=2, help="faults at a time")
    parser.add_argument("--output", type=Path, help="write the outcomes to this file in Markdown")
    parser.add_argument("--suite-passed", action="store_true", help="do not run the tests on the sound code first")
    given = parser.parse_args()
    faults = read_faults()
    if given.only:
        faults = [f for f in faults if any(word in f"{f.name} {f.file}" for word in given.only)]
    outcomes = examine(faults, given.jobs, check_first=not given.suite_passed)
    failures = [outcome for outcome in outcomes if outcome.verdict != "caught"]
    for outcome in failures:
        print(f"{outcome.verdict}: {outcome.fault.name}: {outcome.detail}")
    print(f"{len(outcomes) - len(failures)} of {len(outcomes)} faults are caught")
    if given.output:
        given.output.write_text(report(outcomes), encoding="utf-8")
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
