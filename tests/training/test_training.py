"""The training scripts end to end on micro configs: they run, export, and resume to the same loss."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
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


def run(script, *args):
    command = [sys.executable, str(SCRIPTS / "bundled" / script), *map(str, args), *MICRO]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_unknown_key_is_refused():
    sys.path.insert(0, str(SCRIPTS))
    from vlmslim.training.config import read_config

    with pytest.raises(ValueError, match="no setting 'stepz'"):
        read_config(SCRIPTS / "bundled" / "tiny_clip.yaml", ["stepz=3"])


def test_settings_are_replaced_whole_or_by_the_option():
    sys.path.insert(0, str(SCRIPTS))
    from vlmslim.training.config import override

    given = {"lr": 1.0, "method": {"keep": 4, "pool": "resize"}}
    changed = override(given, ["lr=5e-4", "method.keep=9", "method.weights=random:3"])
    assert changed == {"lr": 5e-4, "method": {"keep": 9, "pool": "resize", "weights": "random:3"}}
    assert override(given, ["method={keep: 1}"])["method"] == {"keep": 1}
    assert given == {"lr": 1.0, "method": {"keep": 4, "pool": "resize"}}
    for wrong, says in (("lr", "'lr' sets nothing"), ("lr.a=1", "lr has no options"), ("rl=1", "no setting 'rl'")):
        with pytest.raises(ValueError, match=says):
            override(given, [wrong])


@pytest.mark.slow
def test_train_resume_and_export(tmp_path):
    clip, llava = ("train_tiny_clip.py", CLIP, SECOND), ("train_tiny_llava.py", LLAVA, "eval_scenes=4", "turns=3")
    run(*clip, "--out", tmp_path / "clip")
    run(*clip, "--out", tmp_path / "clip2", "--stop", 2)
    run(*clip, "--out", tmp_path / "clip2")
    assert len(losses(tmp_path / "clip")) == 4
    assert losses(tmp_path / "clip") == pytest.approx(losses(tmp_path / "clip2"), rel=1e-3)

    tower = ("--clip", tmp_path / "clip" / "tiny-clip")
    run(*llava, *tower, "--out", tmp_path / "llava")
    run(*llava, *tower, "--out", tmp_path / "llava2", "--stop", 2)
    run(*llava, *tower, "--out", tmp_path / "llava2")
    assert len(losses(tmp_path / "llava")) == 4
    assert losses(tmp_path / "llava") == pytest.approx(losses(tmp_path / "llava2"), rel=1e-3)

    from transformers import AutoProcessor, LlavaForConditionalGeneration

    exported = tmp_path / "llava" / "tiny-llava"
    model = LlavaForConditionalGeneration.from_pretrained(exported)
    assert model.config.image_seq_length == 144
    assert AutoProcessor.from_pretrained(exported).tokenizer.padding_side == "left"


@pytest.mark.slow
def test_train_resume_and_export_the_anyres_model(tmp_path):
    script = ("train_tiny_llava_next.py", "reading=1", "tower_steps=3", "eval_pages=2", "turns=3")
    run(*script, "--out", tmp_path / "a")
    run(*script, "--out", tmp_path / "b", "--stop", 3)
    run(*script, "--out", tmp_path / "b")
    assert len(losses(tmp_path / "a")) == 4
    assert losses(tmp_path / "a") == pytest.approx(losses(tmp_path / "b"), rel=1e-3)

    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

    sys.path.insert(0, str(SCRIPTS))
    from pages import PINPOINTS

    exported = tmp_path / "a" / "tiny-llava-next"
    model = LlavaNextForConditionalGeneration.from_pretrained(exported)
    assert model.config.image_grid_pinpoints == PINPOINTS
    processor = AutoProcessor.from_pretrained(exported)
    assert type(processor).__name__ == "LlavaNextProcessor" and processor.tokenizer.padding_side == "left"
    # the tower moved while it was trained, and is stored exactly once it was frozen
    saved = torch.load(tmp_path / "a" / "last.pt", weights_only=True)["model"]
    name = "model.vision_tower.encoder.layers.0.mlp.fc1.weight"
    tower = model.get_parameter(name)
    assert torch.equal(tower, saved[f"next.{name}"])
    start = LlavaForConditionalGeneration.from_pretrained(SCRIPTS.parent / "vlmslim" / "bundled" / "tiny-llava")
    assert not torch.equal(tower, start.get_parameter(name))


def test_the_projector_computes_the_same_when_its_inputs_are_standardised():
    import torch

    sys.path.insert(0, str(SCRIPTS))
    from train_common import standardise_inputs

    torch.manual_seed(0)
    projector = torch.nn.Module()
    projector.linear_1 = torch.nn.Linear(4, 3)
    features = torch.randn(50, 4) * torch.tensor([1.0, 5.0, 0.2, 2.0]) + 3
    before = projector.linear_1(features)
    standardise_inputs(projector, features, fresh=False)
    assert torch.allclose(projector.linear_1(features), before, atol=1e-4)


@pytest.mark.slow
def test_other_config_is_not_mixed_in(tmp_path):
    run("train_tiny_clip.py", CLIP, SECOND, "--out", tmp_path, "--stop", 2)
    command = [
        sys.executable,
        str(SCRIPTS / "bundled" / "train_tiny_clip.py"),
        CLIP,
        SECOND,
        "--out",
        str(tmp_path),
        *MICRO,
        "seed=1",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0 and "other values of seed" in done.stderr
