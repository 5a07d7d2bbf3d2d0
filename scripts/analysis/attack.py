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
import random
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))  # the tiny models and the stand-in for lmms-eval

from attack_base import CLEAR, Attack, Bad
from attack_files import Kills, Results, Saved
from attack_inputs import Command, Options, Yaml

from vlmslim.io import provenance
from vlmslim.io.files import markdown_table

OUTCOMES = ("works", "clear", "traceback", "accepted", "hang", "lost")
BAD = OUTCOMES[2:]
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- begin of the table of scripts/analysis/attack.py -->", "<!-- end of the table -->"
HANG = 20  # seconds of processor time
ATTACKS: dict[str, type[Attack]] = {
    "options": Options,
    "yaml": Yaml,
    "results": Results,
    "saved": Saved,
    "command": Command,
    "kills": Kills,
}


class Hang(BaseException):
    """A try took too long."""


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
    except Exception as error:  # every other exception is the outcome that this script looks for
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
