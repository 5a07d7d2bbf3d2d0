"""Subjects of `vlmslim bench`: made-up prompts, random models of public sizes, and the ideal."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from compare import lengths
from doubles import Rule
from snapshots import changes, model_state
from tiny import BACKENDS, FAMILIES, tiny
from transformers import AutoModelForImageTextToText
from zoo import ZOO, build

import vlmslim
from vlmslim.cost.bench.ideal import ideal
from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.cost.bench.shapes import SHAPES, random_model, shape_config
from vlmslim.cost.timing import time_generation
from vlmslim.engine.families import kv_cache

FEW = ("qwen2_5_vl", "qwen3_vl", "smolvlm")


@dataclass
class FirstTokens(Rule):
    """Keeps the first half of an image, and from layer 2 on the first four tokens."""

    layers: ClassVar = (2,)

    def chosen(self, n, prompt):
        return torch.arange(8)

    def left(self, layer, n, text):
        return torch.arange(4)


@pytest.mark.parametrize("images, visual", [(1, [8, 8, 4, 4]), (2, [16, 16, 13, 11])])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ideal_is_the_model_that_keeps_the_first_tokens(family, backend, images, visual):
    """Its caches have the lengths asked for, and its logits are those of a method that keeps the same tokens."""
    model = tiny(family, backend)
    prompt = SyntheticPrompt.make(model, batch=2, images=images, text_tokens=9)
    time_generation(model, prompt.inputs(), 2)  # the first generation leaves a trace in the model
    before = model_state(model)
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with ideal(model, prompt, visual) as inputs, torch.inference_mode():
        bound = model.generate(**inputs, **options)
    assert changes(before, model_state(model)) == []
    assert lengths(kv_cache(bound)) == [v + 9 + 3 for v in visual]
    if images == 1:
        with vlmslim.patch(model, FirstTokens()), torch.inference_mode():
            patched = model.generate(**prompt.inputs(), **options)
        torch.testing.assert_close(torch.stack(bound.logits), torch.stack(patched.logits), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("visual", [[8] * 3, [4, 8, 8, 8], [17] * 4])
def test_the_ideal_refuses_impossible_lengths(visual):
    model = tiny("llava")
    prompt = SyntheticPrompt.make(model, text_tokens=4)
    with pytest.raises(ValueError, match="never rising, and at most 16"), ideal(model, prompt, visual):
        pass


def test_the_ideal_refuses_a_patched_model():
    model = tiny("llava")
    prompt = SyntheticPrompt.make(model, text_tokens=4)
    with (
        vlmslim.patch(model, "none"),
        pytest.raises(RuntimeError, match="already patched"),
        ideal(model, prompt, [8] * 4),
    ):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_size_they_say(family):
    model = tiny(family)
    prompt = SyntheticPrompt.make(model, batch=2, images=2, text_tokens=9, image_size=(64, 32))
    inputs = prompt.inputs()
    assert inputs["input_ids"].shape == (2, 9 + prompt.visual_tokens)
    assert (inputs["input_ids"] == prompt.image_token).sum() == 2 * prompt.visual_tokens
    assert not torch.equal(*inputs["input_ids"])
    long = SyntheticPrompt.make(model, batch=2, text_tokens=2000)  # placeholders are no words
    assert (long.inputs()["input_ids"] == prompt.image_token).sum() == 2 * long.visual_tokens
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    assert prompt.crops == (3 if family == "next" else 1)  # OneVision cuts no tiles if there are several images
    with pytest.raises(ValueError, match="at least 2"):
        SyntheticPrompt.make(model, text_tokens=1)


@pytest.mark.parametrize("name", [n if n in FEW else pytest.param(n, marks=pytest.mark.slow) for n in ZOO])
@torch.inference_mode()
def test_prompts_and_the_ideal_of_other_families(name):
    """Every image of the prompt is one picture for vlmslim; the ideal has the lengths asked for and leaves no trace."""
    model = build(name)
    prompt = SyntheticPrompt.make(model, batch=2, images=2, text_tokens=9, image_size=(64, 48))
    n, options = prompt.tokens, dict(do_sample=False, return_dict_in_generate=True)
    with vlmslim.patch(model, "none") as slim:
        model(**prompt.inputs())
        assert slim.receipt.summary()["visual_tokens_range"] == [n, n] and slim.receipt.images == 4
    model.generate(**prompt.inputs(), max_new_tokens=2, **options)  # the first generation leaves a trace in the model
    before, visual = model_state(model), [n, n, n // 2 + 1, n // 2]
    with ideal(model, prompt, visual) as inputs:
        bound = model.generate(**inputs, max_new_tokens=4, **options)
    left = [change for change in changes(before, model_state(model)) if not change.endswith("rope_deltas")]
    assert left == [], "the offset of positions is upstream's, of the latest forward"
    assert lengths(kv_cache(bound)) == [v + prompt.text_tokens + 3 for v in visual]


@torch.inference_mode()
def test_a_decoder_may_have_fewer_layers_than_the_tower_has_features_for():
    """As `vlmslim bench --shape qwen3-vl-8b --layers 2` builds it."""
    model = build("qwen3_vl")
    lm = model.model.language_model
    lm.layers, lm.config.num_hidden_layers = lm.layers[:2], 2
    prompt = SyntheticPrompt.make(model, text_tokens=9, image_size=(64, 48))
    n, options = prompt.tokens, dict(max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    with ideal(model, prompt, [n, n // 2]) as inputs:
        assert lengths(kv_cache(model.generate(**inputs, **options))) == [v + 9 + 2 + 2 for v in (n, n // 2)]
    want = model(**prompt.inputs()).logits
    with vlmslim.patch(model, "fastv", keep=n, layer=1):
        torch.testing.assert_close(model(**prompt.inputs()).logits, want)


#: Parameters of the public checkpoints, in billions.
PARAMETERS = {
    "llava-1.5-7b": 7.063,
    "llava-1.5-13b": 13.351,
    "llava-next-7b": 7.567,
    "llava-onevision-7b": 8.030,
    "qwen2.5-vl-7b": 8.292,
    "qwen3-vl-8b": 8.767,
    "internvl3-8b": 7.944,
    "smolvlm-256m": 0.256,
}


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_those_of_the_public_models(name):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(shape_config(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == PARAMETERS[name]


def test_a_shape_that_does_not_fit_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("vlmslim.cost.bench.shapes.free_bytes", lambda device: 20 * 2**30)
    with pytest.raises(ValueError, match=r"the weights need 49\.7 GiB in float32 and cpu has 20\.0 GiB free"):
        random_model(shape_config("llava-1.5-13b"), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="unknown shape 'llava-2'"):
        shape_config("llava-2")
    with pytest.raises(ValueError, match="llava-1.5-7b has 32 decoder layers; use 1 to 32"):
        shape_config("llava-1.5-7b", layers=33)


def test_a_random_model_works_and_follows_from_its_seed():
    config = tiny("onevision").config
    model = random_model(config, dtype=torch.bfloat16, device="cpu", attention="eager")
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.text_config._attn_implementation == "eager"
    with torch.inference_mode():
        assert model(**SyntheticPrompt.make(model, text_tokens=4).inputs()).logits.isfinite().all()
    again = random_model(config, dtype=torch.bfloat16, device="cpu")
    assert all(map(torch.equal, model.parameters(), again.parameters()))
