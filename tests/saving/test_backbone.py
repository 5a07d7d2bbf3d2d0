"""A trained part fits its backbone after casts and fine-tuning, and is refused by any other training."""

import json

import pytest
import torch
from accelerate import cpu_offload
from prompts import ROWS, batch
from tiny import tiny
from torch import nn
from transformers import AutoModelForImageTextToText

import vlmslim
from vlmslim import bundled
from vlmslim.saving import backbone
from vlmslim.saving import folder as saving

HALVES = [torch.bfloat16, torch.float16]
EVERYWHERE = {"embed_tokens.weight", "projector.weight", "projector.bias", "tower_norm.weight", "tower_norm.bias"}


def base_of(model: nn.Module) -> dict:
    return json.loads(json.dumps(backbone.describe(model, signed=True)))


@torch.no_grad()
def retrained(model: nn.Module, seed: int = 1) -> nn.Module:
    """The same model from another initialisation."""
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        if p.ndim > 1:
            p.normal_(0, float(p.std()), generator=generator)
        else:
            p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    return model


def fine_tuned(model: nn.Module, steps: int = 20, lr: float = 5e-4) -> nn.Module:
    inputs = batch(model, ROWS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def test_a_signature_has_the_same_parts_in_every_family(family):
    signature = backbone.signature(tiny(family))
    assert signature.keys() == EVERYWHERE
    assert all(len(set(values)) == backbone.SAMPLES for values in signature.values())


@pytest.mark.parametrize("dtype", HALVES, ids=["bf16", "fp16"])
def test_casts_and_fine_tuning_are_the_same_backbone(family, dtype):
    base = base_of(tiny(family))
    assert base_of(tiny(family)) == base
    backbone.check("it", base, tiny(family, dtype=dtype))
    backbone.check("it", base_of(tiny(family, dtype=dtype)), tiny(family))
    tuned = fine_tuned(tiny(family))
    assert backbone.signature(tuned) != base["signature"]
    backbone.check("it", base, tuned)


def test_another_training_is_another_backbone(family):
    base = base_of(tiny(family))
    with pytest.raises(ValueError, match="another backbone .* of the same sizes: .*embed_tokens.weight by .*train"):
        backbone.check("it", base, retrained(tiny(family)))


@pytest.mark.parametrize("name", sorted(EVERYWHERE))
@torch.no_grad()
def test_one_part_of_another_training_is_enough(name):
    model, other = tiny("llava"), retrained(tiny("llava"))
    core, new = model.model, other.model
    owners = {
        "embed_tokens": (core.language_model.embed_tokens, new.language_model.embed_tokens),
        "projector": (core.multi_modal_projector.linear_1, new.multi_modal_projector.linear_1),
        "tower_norm": (core.vision_tower.encoder.layers[0].layer_norm1, new.vision_tower.encoder.layers[0].layer_norm1),
    }
    base, (part, kind) = base_of(model), name.split(".")
    if name == "tower_norm.weight":  # both are near 1
        getattr(owners[part][1], kind).mul_(1.5)
    getattr(owners[part][0], kind).copy_(getattr(owners[part][1], kind))
    with pytest.raises(ValueError, match=f"weights differ here, {name} by"):
        backbone.check("it", base, model)


def test_a_trained_part_is_refused_by_another_training(tmp_path):
    with vlmslim.patch(tiny("llava"), "tokenflex", weights="random", keep=4) as slim:
        slim.save_pretrained(tmp_path)
    other = retrained(tiny("llava"))
    with pytest.raises(ValueError, match=r"\(tokenflex\) was trained for another backbone \(without a name\) of"):
        vlmslim.patch(other, tmp_path)
    assert not hasattr(other, "_vlmslim")
    vlmslim.patch(fine_tuned(tiny("llava"), steps=2), tmp_path).remove()
    path = tmp_path / "vlmslim.json"  # as written before there were signatures
    config = json.loads(path.read_text())
    del config["base"]["signature"]
    path.write_text(json.dumps(config))
    vlmslim.patch(other, tmp_path).remove()


def test_a_patch_without_trained_parts_fits_any_training(tmp_path):
    with vlmslim.patch(tiny("llava"), "divprune", keep=4) as slim:
        slim.save_pretrained(tmp_path)
    assert saving.read(tmp_path).base["signature"] is None
    vlmslim.patch(retrained(tiny("llava")), tmp_path).remove()


def test_offloaded_weights_are_read():
    model, other = tiny("llava"), retrained(tiny("llava"))
    base = base_of(model)
    cpu_offload(model, "cpu"), cpu_offload(other, "cpu")
    assert model.model.language_model.embed_tokens.weight.is_meta
    assert backbone.signature(model) == base["signature"]
    assert model.model.language_model.embed_tokens.weight.is_meta
    with pytest.raises(ValueError, match="of the same sizes"):
        backbone.check("it", base, other)


class Packed(nn.Parameter):
    """Stands in for the parameters of quantisation libraries: a subclass whose values are not the weights."""


def test_what_cannot_be_read_is_left_out_and_said():
    model = retrained(tiny("llava"))
    base, projector = base_of(tiny("llava")), model.model.multi_modal_projector
    projector.linear_1.weight = Packed(torch.zeros(7, dtype=torch.uint8), requires_grad=False)
    assert backbone.signature(model).keys() == EVERYWHERE - {"projector.weight"}
    with pytest.raises(ValueError, match="embed_tokens.weight by .*projector.bias by"):
        backbone.check("it", base, model)
    with pytest.warns(UserWarning, match="it: no weights of this model can be read"):
        backbone.check("it", base, model.to("meta"))


@pytest.mark.parametrize("name", ["tiny-atp-16", "tiny-atp-36", "tiny-tokenflex"])
def test_bundled_parts_know_their_backbone(name):
    saved = saving.read(f"bundled/{name}")
    path = bundled.resolve(saved.base["name"])
    for dtype in (torch.float32, *HALVES):
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
        assert backbone.signature(model).keys() == saved.base["signature"].keys() == EVERYWHERE
        vlmslim.patch(model, f"bundled/{name}").remove()
    with pytest.raises(ValueError, match=f"{name} .* another backbone .bundled/tiny-llava. of the same sizes"):
        vlmslim.patch(retrained(model.float()), f"bundled/{name}")
