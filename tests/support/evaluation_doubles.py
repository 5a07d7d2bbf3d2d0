"""A stand-in for `vlmslim.evaluation.harness.Harness` that evaluates nothing and always says the same."""

import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import yaml

from vlmslim.cost.budget import BudgetError, Solution
from vlmslim.cost.flops import DecoderShape
from vlmslim.evaluation.harness import Cell
from vlmslim.evaluation.progress import Display, RowLine
from vlmslim.evaluation.store import Store

SHAPE = DecoderShape(layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, mlp=96, vocab=300)


def write_config(folder: Path, **changes) -> Path:
    config = {
        "model": {"pretrained": "tiny"},
        "tasks": ["count", "text"],
        "budgets": [64, 16],
        "methods": ["divprune"],
        "baselines": ["random"],
        "output": str(folder / "out"),
    } | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def stage(name="fastv", acted=0, layers=(2,), tokens=(144.0, 144.0), keeps_all=False, decides=False, prompts=700):
    """Make the line of one stage in a receipt; by default the stage did nothing although it was asked to."""
    tokens_in, tokens_out = tokens
    return {
        "name": name,
        "layers": list(layers),
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "prompts": prompts,
        "acted": acted,
        "keeps_all": keeps_all,
        "decides": decides,
    }


def receipt(method: str, kept: float, requested: float | None) -> dict:
    """Make the receipt of four prompts of 144 visual tokens, and of one stage before the language model."""
    done = stage(method, 4 * (kept < 144), (), (144.0, kept), requested in (None, 144.0), prompts=4)
    return {
        "method": "Fake()",
        "images": 4,
        "prompts": 4,
        "visual_tokens": 144.0,
        "requested": requested,
        "kept": kept,
        "visual_tokens_per_layer": [kept] * 4,
        "equivalent_tokens": kept,
        "text_tokens": 20.0,
        "kv_bytes": (kept + 20) * 4 * 2 * 2 * 16 * 4,
        "selection_ms": 0.5,
        "had_effect": kept < 144,
        "stages": [done],
        "positions": "renumbered",
        "backend": "sdpa",
        "dtype": "float32",
    }


class FakeHarness:
    """Behaves like a `Harness`, and like the class that makes one: a call gives itself."""

    protocol: dict = {}  # as of a vlmslim that did not record it

    def __init__(
        self,
        fail_at=None,
        failure=None,
        without_effect=(),
        identity="weights-1",
        scores=None,
        questions=4,
        definition="as it was",
    ):
        self.definition = {"settings": definition}
        self.fail_at, self.failure, self.without_effect, self.identity = fail_at, failure, without_effect, identity
        self.scores, self.questions = scores or {}, questions
        self.evaluated, self.timed, self.loads = [], [], 0
        self.refused = {}  # by label or task, what is raised when it is opened
        self.tokens = None  # visual tokens of every image, where the checkpoint tells
        self.undefined = {}  # by method, why the checkpoint cannot have it

    def __call__(self, config, make_bar):
        self.tasks = SimpleNamespace(leaves=config.tasks, definition=lambda task: dict(self.definition))
        return self

    def describe_checkpoint(self):
        known = {} if self.tokens is None else {"visual_tokens": self.tokens}
        return {
            "identity": self.identity,
            "shape": asdict(SHAPE),
            "tower_flops": 1e6,
            **known,
            "undefined": self.undefined,
        }

    def load(self):
        self.loads += 1

    def check_method(self, variant):
        if self.refused.get(variant.label):
            raise self.refused[variant.label]

    def check_task(self, task):
        if self.refused.get(task):
            raise self.refused[task]

    def check_split(self, todo):
        pass

    def close(self):
        pass

    def answer_all(self, todo, begin, parts=None):
        for task, variants in todo.items():
            yield task, {variant.label: None for variant in variants}

    def cell(self, variant, task, answers) -> Cell:
        return self.evaluate(variant, task)

    def evaluate(self, variant, task) -> Cell:
        if self.fail_at == (variant.label, task):
            raise self.failure
        self.evaluated.append((variant.label, task))
        right = self.scores.get(
            (variant.label, task), zlib.crc32(f"{variant.label} {task}".encode()) % self.questions + 1
        )
        samples = [
            {
                "doc_id": i,
                "target": "yes",
                "arguments": [f"{task} {i}?"],
                "resps": [["yes" if i < right else "no"]],
                "filtered_resps": ["yes" if i < right else "no"],
                "doc_hash": "x",
                "acc": float(i < right),
            }
            for i in range(self.questions)
        ]
        results = {
            "results": {
                task: {
                    "alias": task,
                    "acc,none": right / self.questions,
                    "acc_stderr,none": 0.05,
                    "submission,none": "N/A",
                }
            },
            "higher_is_better": {task: {"acc": True, "submission": True}},
        }
        name, budget = variant.stages[0]["method"], variant.budget
        keeps_all = budget is None or variant.label in self.without_effect
        done = receipt(name, 144.0 if keeps_all else float(budget), budget and float(budget))
        return Cell(results, samples, done, self.protocol, method_flops=0.0 if variant.unpatched else 1e6)

    def time(self, variants, timing, tick) -> dict:
        self.timed = [v.label for v in variants]
        return {
            v.label: {
                "ttft_ms": 10.0 * (i + 1),
                "ttft_ratio": 1.0 * (i + 1),
                "decode_ms": 2.0,
                "decode_ratio": 1.0,
            }
            for i, v in enumerate(variants)
        }


COST = {"equivalent_tokens": 40}


class Solving(FakeHarness):
    """Solves every budget by keep=40, which costs what was asked, or `cost`."""

    def __init__(self, cost=40.0, impossible=(), **options):
        super().__init__(**options)
        self.solved, self.cost, self.impossible = [], cost, impossible

    def solve(self, variant):
        self.solved.append(variant.label)
        if variant.label in self.impossible:
            raise BudgetError("it cannot")
        return Solution(({**variant.stages[0], "keep": 40},), "keep", 40, variant.budget, 40.0, 4)

    def evaluate(self, variant, task):
        return super().evaluate(replace(variant, budget=self.cost) if variant.cost else variant, task)


class Listening(Display):
    """Keeps what a run says, and its finished rows."""

    def __init__(self):
        self.said: list[str] = []
        self.rows: list[RowLine] = []

    def message(self, text):
        self.said.append(text)

    def finish_row(self, line):
        self.rows.append(line)


def stored(folder: Path) -> dict[Path, bytes]:
    """Read every file in a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rewrite(store: Store, label: str, task: str, without: str = "", **changes) -> None:
    """Save a cell again, without a part of its record, or with another one."""
    added = {"label", "task", "samples_sha256"}  # by the store
    kept = {name: value for name, value in store.cell(label, task).items() if name not in added | {without}}
    store.save_cell(label, task, kept | changes, store.samples(label, task))
