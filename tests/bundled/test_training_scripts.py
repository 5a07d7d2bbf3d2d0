"""The scripts that train the bundled models, end to end on tiny settings: they run, export and resume."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

pytest.importorskip("open_clip", reason="the extra vlmslim[train] is not installed")

from pages import PINPOINTS
from train_common import standardise_inputs

from vlmslim import bundled
from vlmslim.training.config import read_config

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts" / "bundled"
CLIP = (
    "model={embed_dim: 16, vision_cfg: {image_size: 192, patch_size: 16, width: 32, layers: 2, head_width: 16}, "
    "text_cfg: {context_length: 77, vocab_size: 49408, width: 16, heads: 1, layers: 1}}"
)
LLAVA = (
    "decoder={hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 1, "
    "intermediate_size: 48}"
)
SECOND = "second_stage={steps: 1, dense_weight: 0.0, contrast_weight: 1.0}"
MICRO = ["steps=4", "batch=2", "workers=0", "device=cpu", "log_every=1", "eval_every=2"]


def run(script, *args) -> subprocess.CompletedProcess:
    command = [sys.executable, str(SCRIPTS / script), *MICRO, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def run_whole_and_in_pieces(folder, stop, *args) -> None:
    """Run a script at once and in two calls, which must reach the same losses."""
    for pieces in (["--out", folder / "whole"], *(["--out", folder / "pieces", *s] for s in (["--stop", stop], []))):
        done = run(*args, *pieces)
        assert done.returncode == 0, done.stderr[-2000:]
    assert len(losses(folder / "whole")) == 4
    assert losses(folder / "whole") == pytest.approx(losses(folder / "pieces"), rel=1e-3)


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_unknown_key_is_refused():
    with pytest.raises(ValueError, match="no setting 'stepz'"):
        read_config(SCRIPTS / "tiny_clip.yaml", ["stepz=3"])


@pytest.mark.slow
def test_train_resume_and_export(tmp_path):
    clip, llava = tmp_path / "clip", tmp_path / "llava"
    run_whole_and_in_pieces(clip, 2, "train_tiny_clip.py", CLIP, SECOND)
    other = run("train_tiny_clip.py", CLIP, SECOND, "--out", clip / "whole", "seed=1")
    assert other.returncode != 0 and "other values of seed" in other.stderr

    tower = ("--clip", clip / "whole" / "tiny-clip")
    run_whole_and_in_pieces(llava, 2, "train_tiny_llava.py", LLAVA, "eval_scenes=4", "turns=3", *tower)
    exported = llava / "whole" / "tiny-llava"
    model = LlavaForConditionalGeneration.from_pretrained(exported)
    assert model.config.image_seq_length == 144
    assert AutoProcessor.from_pretrained(exported).tokenizer.padding_side == "left"


@pytest.mark.slow
def test_train_resume_and_export_the_anyres_model(tmp_path):
    options = ("reading=1", "tower_steps=3", "eval_pages=2", "turns=3")
    run_whole_and_in_pieces(tmp_path, 3, "train_tiny_llava_next.py", *options)
    exported = tmp_path / "whole" / "tiny-llava-next"
    model = LlavaNextForConditionalGeneration.from_pretrained(exported)
    assert model.config.image_grid_pinpoints == PINPOINTS
    processor = AutoProcessor.from_pretrained(exported)
    assert type(processor).__name__ == "LlavaNextProcessor" and processor.tokenizer.padding_side == "left"
    # the tower moved while it was trained, and is stored exactly once it was frozen
    saved = torch.load(tmp_path / "whole" / "last.pt", weights_only=True)["model"]
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    tower = model.get_parameter(name)
    assert torch.equal(tower, saved[f"next.{name}"])
    start = LlavaForConditionalGeneration.from_pretrained(bundled.resolve("bundled/tiny-llava"))
    assert not torch.equal(tower, start.get_parameter(name))


def test_the_projector_computes_the_same_when_its_inputs_are_standardised():
    projector = torch.nn.Module()
    projector.linear_1 = torch.nn.Linear(4, 3)
    features = torch.randn(50, 4) * torch.tensor([1.0, 5.0, 0.2, 2.0]) + 3
    before = projector.linear_1(features)
    standardise_inputs(projector, features, fresh=False)
    assert torch.allclose(projector.linear_1(features), before, atol=1e-4)
