"""Decoders with sliding windows that are shorter than the prompts: a window counts the tokens that are left."""

from copy import deepcopy

import pytest
import torch
from compare import close
from doubles import BothClosed, Strided, StridedOriginal
from prompts import all_visual
from zoo import ROWS, SEVERAL, Reference, batch, build, renumbered, words

import vlmslim

SLIDING, FULL = "sliding_attention", "full_attention"


@pytest.fixture(params=["gemma3", pytest.param("aya_vision", marks=pytest.mark.slow), "cohere2_vision"])
def name(request) -> str:
    return request.param


@pytest.fixture
def model(name):
    """The family's tiny model, with layers that see eight tokens."""
    wide = build(name)
    config = deepcopy(wide.config)
    config.text_config.sliding_window = 8
    config.text_config.layer_types = [SLIDING, SLIDING, FULL, SLIDING]
    narrow = type(wide)(config).eval()
    narrow.load_state_dict(wide.state_dict())
    narrow.generation_config = wide.generation_config
    return narrow


def patched(model, method):
    return vlmslim.patch(model, method, keep=0.5) if method == "fastv" else vlmslim.patch(model, method)


@torch.no_grad()
def test_the_windows_are_short_and_keeping_everything_is_bit_identical(name, model):
    inputs = batch(name, model, SEVERAL)
    want = model(**inputs).logits
    assert not torch.allclose(build(name)(**inputs).logits, want)
    for method in ("divprune", "fastv"):
        with vlmslim.patch(model, method, keep=1.0):
            assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("method", [Strided(), StridedOriginal()], ids=str)
@torch.no_grad()
def test_tokens_kept_before_the_language_model_are_a_shorter_prompt(name, model, method):
    for row in (*ROWS, SEVERAL[0]):
        inputs = batch(name, model, [row])
        reference = Reference(name, model, inputs)
        with vlmslim.patch(model, method) as slim:
            found = model(**inputs).logits[0]
        visual = all_visual(inputs)
        keep, places = ~visual, visual.nonzero()[:, 0]
        for picture in places.split([image.tokens for image in slim.receipt.last.images[0]]):
            keep[picture[method.chosen(len(picture), None)]] = True
        kept = keep.nonzero()[:, 0]
        closed = method.positions == "renumbered"
        position = renumbered(reference.position(), kept, visual) if closed else None
        close(found[kept], reference.logits(kept, position))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", [Strided(), BothClosed(), "fastv"], ids=str)
@torch.no_grad()
def test_a_batch_equals_its_rows(name, model, method, padding):
    rows = [*SEVERAL, [1, *words(3, 7)]]
    inputs = batch(name, model, rows, padding)
    with patched(model, method):
        together = model(**inputs).logits
        for i, row in enumerate(rows):
            close(together[i][inputs["attention_mask"][i].bool()], model(**batch(name, model, [row])).logits[0])


@pytest.mark.parametrize("method", [Strided(), BothClosed()], ids=str)
@torch.no_grad()
def test_a_cache_that_forgets_gives_the_same_answer(name, model, method):
    inputs = batch(name, model, SEVERAL)
    settings = dict(max_new_tokens=12, do_sample=False)
    with patched(model, method):
        want = model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(model.generate(**inputs, **settings), want)
