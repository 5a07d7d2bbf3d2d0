"""Parts that all kinds of attack share: the outcomes of a try, and the run that is attacked."""

import random
from abc import ABC, abstractmethod
from pathlib import Path

from vlmslim.evaluation.errors import CellError

# Mistakes that `vlmslim` reports in one line.
CLEAR = (ValueError, ImportError, OSError, CellError)


class Bad(Exception):
    """A try ended in one of the bad outcomes; the message says why."""

    def __init__(self, outcome: str, why: str):
        super().__init__(why)
        self.outcome = outcome


class Attack(ABC):
    """One kind of attack. `strike` makes one try, and raises what it found: nothing, a refusal, or `Bad`."""

    title = ""
    tries = 0

    def __init__(self, folder: Path):
        self.folder = folder

    @abstractmethod
    def strike(self, rng: random.Random) -> None:
        """Make one try."""


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


def small(output: Path) -> dict:
    """Make the configuration of a run of four cells."""
    return CONFIG | {
        "methods": ["divprune"], "budgets": [16], "baselines": False, "limit": None, "output": str(output)
    }  # fmt: skip
