"""Patches that take turns on the same inputs: one encoding, and the answers and receipts of each patch alone."""

import prompts
import pytest
import torch
import zoo
from tiny import tiny

import vlmslim
from vlmslim.engine.families import KV_CACHE, encoder_layers, kv_cache
from vlmslim.patching import shared_encoding

METHODS = {
    "none": {},
    "divprune": {"keep": 3},
    "hiprune": {"keep": 3},  # reads two layers of the tower
    "fastv": {"keep": 3, "layer": 2},
    "random": {"keep": 3, "seed": 1},
}


def inputs_of(name: str):
    if name in ("llava", "next", "onevision"):
        model = tiny(name)
        return model, prompts.batch(model, prompts.LONG_ROWS)
    model = zoo.build(name)
    return model, zoo.batch(name, model, zoo.ROWS)


def prefilled(model, inputs: dict) -> list[torch.Tensor]:
    """The logits of a prefill, and of what follows in its cache."""
    output = model(**inputs, use_cache=True)
    follow = model(input_ids=inputs["input_ids"][:, -1:], **{KV_CACHE: kv_cache(output)})
    return [output.logits, follow.logits]


def generated(model, inputs: dict) -> list[torch.Tensor]:
    """Two beams, and their scores."""
    options = {"num_beams": 2, "max_new_tokens": 3, "do_sample": False, "output_scores": True}
    beams = model.generate(**inputs, **options, return_dict_in_generate=True)
    return [beams.sequences, beams.sequences_scores]


def without_times(slim) -> dict:
    return slim.receipt.summary() | {"selection_ms": None}


@pytest.mark.parametrize("name", ["llava", "next", "onevision", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("answers", [prefilled, generated])
@torch.no_grad()
def test_patches_that_share_an_encoding_answer_bit_for_bit_as_each_alone(name, answers):
    model, inputs = inputs_of(name)
    methods = {k: v for k, v in METHODS.items() if k != "hiprune" or name in ("llava", "next", "onevision")}
    expected, receipts = {}, {}
    for method, options in methods.items():
        with vlmslim.patch(model, method, **options) as slim:
            expected[method] = answers(model, inputs)
        receipts[method] = without_times(slim)
    slims = {}
    for method, options in methods.items():
        slims[method] = vlmslim.patch(model, method, **options)
        slims[method].remove()
    calls = []
    encoder_layers(model.model)[0].register_forward_hook(lambda *_: calls.append(1))
    shared = shared_encoding(slims.values())
    for again in range(2):  # the second time on copies of the pictures: nothing of the first may be left
        given = {name: value.clone() for name, value in inputs.items()}
        for method, slim in slims.items():
            slim.reset_receipt()
            with slim.attach(shared):
                for ours, alone in zip(answers(model, given), expected[method], strict=True):
                    assert torch.equal(ours, alone), method
            assert without_times(slim) == receipts[method]
        assert len(calls) == again + 1


@torch.no_grad()
def test_other_pictures_are_encoded_anew():
    model = tiny("llava")
    slims = [vlmslim.patch(model, "none")]
    slims[0].remove()
    shared, calls = shared_encoding(slims), []
    encoder_layers(model.model)[0].register_forward_hook(lambda *_: calls.append(1))
    first, second = (prompts.batch(model, [row]) for row in prompts.ROWS)
    with slims[0].attach(shared):
        for inputs in (first, second, second, first):
            model(**inputs)
    assert len(calls) == 3  # one batch is held, not all that were ever seen
