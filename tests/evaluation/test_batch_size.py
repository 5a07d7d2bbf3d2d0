"""`batch_size: auto`: batches that do not fit into memory are halved, and the answers are those of that batch size."""

from importlib.util import find_spec

import pytest
import torch

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from vlmslim.evaluation.answering import Answerer
from vlmslim.evaluation.config import RunConfig, validated
from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.evaluation.export import export_cells
from vlmslim.evaluation.harness import Harness
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store
from vlmslim.evaluation.verify import verify
from vlmslim.leaderboard.notes import protocol

NARROW = """
from dataclasses import dataclass
import torch
from vlmslim.compressor import Compressor

@dataclass
class Narrow(Compressor):
    \"\"\"Keep the first tokens, on a device that has memory for three prompts.\"\"\"
    keep: int

    def setup(self, model):
        model.lm_head.register_forward_pre_hook(refuse)

    def compress(self, image):
        return image.pick(torch.arange(self.keep, device=image.features.device))

def refuse(_, inputs):
    if len(inputs[0]) > 3:
        raise torch.OutOfMemoryError("no memory left")
"""


@pytest.fixture
def config(tmp_path):
    def make(output: str, batch_size: int | str) -> RunConfig:
        file = tmp_path / "narrow.py"
        file.write_text(NARROW)
        return validated(
            {
                "model": {"pretrained": "bundled/tiny-llava", "device": "cpu", "dtype": "float32"},
                "tasks": ["scenes_colour", "scenes_choice"],
                "methods": [{"method": f"{file}:Narrow", "keep": 36, "label": "narrow"}],
                "baselines": False,
                "batch_size": batch_size,
                "limit": 7,
                "timing": None,
                "output": tmp_path / output,
            }
        )

    return make


def told(output) -> dict:
    """Read the answers, the receipts and the batch size of all cells."""
    store, found = Store(output), {}
    for path in output.glob("cells/*/*.json"):
        cell = store.cell(path.parent.name, path.stem)
        receipt = cell["receipt"] | {"selection_ms": None}
        found[path.parent.name, path.stem] = path.with_suffix(".jsonl").read_bytes(), receipt, cell["batch_size"]
    return found


def test_a_batch_that_does_not_fit_is_halved_and_the_number_is_recorded(config, tmp_path):
    run(config("fixed", 3))
    board = run(config("auto", "auto"))
    assert told(tmp_path / "auto") == told(tmp_path / "fixed")  # 7 prompts were tried, then 3
    assert len(told(tmp_path / "auto")) == 4 and {size for *_, size in told(tmp_path / "auto").values()} == {3}
    assert "; batch size auto (3); " in protocol(board)
    checked = verify(tmp_path / "auto", questions=4)
    assert checked.passed and "batch size 1 instead of 3" in checked.how


def test_a_prompt_that_does_not_fit_alone_fails(config, monkeypatch):
    def full(self, batch):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(Answerer, "answer", full)
    with pytest.raises(CellError, match=r"none on scenes_colour failed: RequestError: .*OutOfMemoryError: no memory"):
        run(config("none", "auto"))


def test_dialogues_are_halved_too(config, monkeypatch):
    monkeypatch.setattr(Harness, "asked", lambda self, task: None)  # as if each question depended on answers
    made = config("dialogues", "auto")
    harness, variant = Harness(made), made.variants()[1]
    cell = harness.evaluate(variant, "scenes_colour")
    assert cell.batch_size == 2 and len(cell.samples) == 7  # 8 prompts were tried, then 4


@pytest.mark.slow
def test_workers_find_it_too(config, tmp_path):
    if find_spec("ray") is None:
        pytest.skip("the extra vlmslim[ray] is not installed")
    run(config("fixed", 3))
    run(config("workers", "auto"), workers=2)
    assert told(tmp_path / "workers") == told(tmp_path / "fixed")


def test_plain_files_need_a_number(config, tmp_path):
    with pytest.raises(ConfigError, match="batch_size: auto is found by vlmslim run; for plain files write a number"):
        export_cells(config("plain", "auto"), tmp_path / "plain")


def test_other_words_are_refused(config):
    with pytest.raises(ConfigError, match="batch_size: Input should be 'auto'"):
        config("word", "large")
