"""Saved patches, their backbones, and equal-cost budgets on families beyond LLaVA."""

import copy

import pytest
import torch
from zoo import ZOO, Pic, batch, build, words
from zoo_checkpoints import checkpoint

import vlmslim
from vlmslim.cost.budget import solve
from vlmslim.cost.flops import DecoderShape, prefill_flops
from vlmslim.saving import backbone

FEW = ("qwen2_5_vl", "qwen3_vl", "gemma3")
every_family = pytest.mark.parametrize(
    "name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ZOO]
)


@pytest.mark.parametrize(
    "name", ["qwen3_vl", *(pytest.param(n, marks=pytest.mark.slow) for n in ("idefics3", "gemma3"))]
)
@torch.no_grad()
def test_a_saved_patch_comes_back_with_its_checkpoint(name, tmp_path):
    folder = checkpoint(name, tmp_path / "model")
    slim = vlmslim.from_pretrained(folder, "divprune", keep=0.5)
    slim.save_pretrained(tmp_path / "slim", with_base=True)
    again = vlmslim.from_pretrained(tmp_path / "slim")
    assert [(stage.name, stage.method.keep) for stage in again.stages] == [("divprune", 0.5)]
    prompt = again.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}], tokenize=False
    )
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    inputs = again.processor(text=[prompt], images=[[picture]], return_tensors="pt")
    assert torch.equal(slim.model(**inputs).logits, again.model(**inputs).logits)
    summary = again.receipt.summary()
    assert 0 < summary["kept"] < summary["visual_tokens"]


@every_family
def test_a_backbone_is_recognised(name):
    model = build(name)
    base = backbone.describe(model, signed=True)
    backbone.check("it", base, model)
    assert {"embed_tokens.weight", "projector.weight"} - base["signature"].keys() <= (
        {"projector.weight"} if name == "gemma3" else set()  # its projector is a bare parameter
    )
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.normal_()
    with pytest.raises(ValueError, match="was trained for another backbone .* of the same sizes"):
        backbone.check("it", base, other)


@every_family
@torch.no_grad()
def test_equal_costs(name):
    """The costs are those of receipts; the ratio is that of the formula, with the tokens that are left."""
    model = build(name)
    rows = [[1, Pic(i, 64, 64), *words(i, 6)] for i in range(2)]
    prompts = [batch(name, model, [row]) for row in rows]
    with vlmslim.patch(model, "none") as slim:
        model(**prompts[0])
        n, text = slim.receipt.last.images[0][0].tokens, slim.receipt.last.text[0]
    wanted = n // 2
    assert solve(model, "divprune", prompts, equivalent_tokens=wanted).value in (wanted, wanted / n)
    shape = DecoderShape.from_config(model.config)
    ratio = prefill_flops(shape, wanted + text) / prefill_flops(shape, n + text)
    solved = solve(model, "random", prompts, flops_ratio=ratio)
    with vlmslim.patch(model, list(solved.stages)) as slim:
        model(**prompts[0])
        assert slim.receipt.last.images[0][0].kept == wanted
    late = solve(model, "fastv", prompts, equivalent_tokens=3 * n / 4, layer=2)
    assert late.achieved == pytest.approx(3 * n / 4, rel=0.02)
