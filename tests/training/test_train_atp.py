"""train_atp.py on the bundled checkpoint: it runs, resumes to the same weights, and its weights patch the model."""

import csv
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

import vlmslim

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))
pytest.importorskip("pydantic")

import train_atp  # noqa: E402
from kept_by_question import kept  # noqa: E402
from make_benchmark import BENCHMARKS  # noqa: E402

from vlmslim.methods.atp import Decision, Modules  # noqa: E402
from vlmslim.training.finetune import Answers  # noqa: E402

FEW = ["steps=3", "batch=1", "questions=2", "pictures=3", "workers=0", "device=cpu", 'precision="no"', "save_every=1"]
FEW += ["log_every=1"]


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def train(monkeypatch, out: Path, *arguments: str) -> list[dict]:
    """Run the script; returns its log."""
    monkeypatch.setattr(sys, "argv", ["train_atp.py", "--out", str(out), *FEW, *arguments])
    train_atp.main()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_training_runs_and_resumes_to_the_same_loss(tmp_path, monkeypatch):
    whole = train(monkeypatch, tmp_path / "whole")
    assert len(train(monkeypatch, tmp_path / "parts", "--stop", "2")) == 2
    assert not (tmp_path / "parts" / "final").exists()
    parts = train(monkeypatch, tmp_path / "parts")
    for a, b in zip(whole, parts, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    states = [load_file(tmp_path / run / "final" / "model.safetensors") for run in ("whole", "parts")]
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert all(0 < float(line[k]) <= 144 for line in whole for k in ("soft", "hard", "after_1", "after_3", "after_6"))
    slim = vlmslim.from_pretrained(tmp_path / "whole" / "final")
    prompt = "USER: <image>\nIs there a cat? ASSISTANT:"
    inputs = slim.processor(text=prompt, images=Image.new("RGB", (192, 192), (200, 80, 10)), return_tensors="pt")
    with torch.no_grad():
        slim.model(**inputs)
    layers = slim.receipt.summary()["visual_tokens_per_layer"]
    assert layers[:2] == [144, 144] and layers == sorted(layers, reverse=True) and slim.receipt.summary()["had_effect"]


@pytest.mark.parametrize("target", [36, 16])
def test_bundled_modules_meet_their_target(target):
    """On held-out questions, to within 10 %, with counts that differ between questions and layers."""
    slim = vlmslim.from_pretrained(f"bundled/tiny-atp-{target}")
    rows = pq.read_table(BENCHMARKS["scenes"].file("count")).to_pylist()[:24]
    counts = kept(slim, rows, batch=12)[:, [2, 4, 7]]
    assert abs(counts.mean() - target) <= 0.1 * target
    assert counts.mean(1).std() > 0.2 and (counts[:, 0] > counts[:, 2]).all()


def test_the_temperature_rises_geometrically():
    modules = Modules((0, 2), 4, 3)
    set_temperature = train_atp.Budget(target=2).anneal(modules, 5)
    seen = []
    for step in range(5):
        set_temperature(step)
        seen.append(modules.temperature)
    assert seen == pytest.approx([10 * 6 ** (i / 4) for i in range(5)])


@pytest.mark.parametrize(("average", "away"), [("modules", 1.0), ("layers", 4 * 1 / 4 + 3 * 2 / 4 + 3 / 4 - 2)])
def test_the_loss_is_the_sum_of_equation_14(average, away):
    """Four layers of which the first and the third are followed by modules: 4, 3, 3 and 3 tokens, or so."""
    modules = Modules((0, 2), 4, 3)
    answers = Answers(torch.tensor(0.5), None, None, None)
    loss = train_atp.Budget(target=2, average=average).loss(modules, depth=4)
    assert loss(answers, {}, 0) == (answers.loss, {})  # text alone
    for layer, soft in ((0, [4.0, 2.0]), (2, [4.0, 2.0])):
        counts = torch.tensor(soft)
        modules.decisions.append(Decision(layer, counts, counts.long(), counts, counts))
    total, numbers = loss(answers, {}, 0)
    assert total.item() == pytest.approx(0.5 + 0.05 * (3 / 4 * 2) + 0.2 * away)
    assert numbers["hard"].item() == pytest.approx(2 + away) and numbers["after_2"].item() == 3
    assert not modules.decisions


def test_a_budget_says_what_it_averages():
    with pytest.raises(ValueError, match="average='everything': use one of 'modules', 'layers'"):
        train_atp.Budget(target=2, average="everything")
    with pytest.raises(TypeError, match="target"):
        train_atp.Budget()
