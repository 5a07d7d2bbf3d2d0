"""`slim.compress`: the shortened prompt as embeddings, run without the patch."""

import pytest
import torch
import zoo
from compare import close, greedy
from prompts import ROWS, batch, words
from tiny import BOS, tiny

import vlmslim

NEED_MORE = {"gemma3", "qwen3_vl"}  # masks by the type of a token, and features added after the first layers


@pytest.mark.parametrize("positions", ["renumbered", "original"])
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_the_prompt_has_the_logits_of_the_patched_model(family, positions, padding):
    model = tiny(family)
    inputs = batch(model, ROWS, padding)
    with vlmslim.patch(model, "divprune", keep=5, positions=positions) as slim:
        want = model(**inputs).logits
        kept = slim.receipt.summary()["visual_tokens_per_layer"]
        slim.reset_receipt()
        prompt = slim.compress(**inputs)
        assert slim.receipt.summary()["visual_tokens_per_layer"] == kept
    got = model(**prompt).logits
    last = inputs["attention_mask"].long().cumsum(1).argmax(1)
    close(got[:, -1], want[torch.arange(len(last)), last])
    assert prompt["inputs_embeds"].shape[1] < inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", sorted({*zoo.ZOO} - NEED_MORE))
@torch.no_grad()
def test_other_families_generate_from_it_with_a_static_cache(name):
    model = zoo.build(name)
    inputs = zoo.batch(name, model, zoo.ROWS)
    with vlmslim.patch(model, "divprune", keep=3) as slim:
        want, logits = greedy(model, inputs)
        prompt = slim.compress(**inputs)
    got, found = greedy(model, prompt, cache_implementation="static")
    assert torch.equal(got.sequences[:, -6:], want.sequences[:, -6:])
    close(found, logits)


@pytest.mark.parametrize("name", sorted(NEED_MORE))
def test_families_whose_layers_need_more_are_refused(name):
    model = zoo.build(name)
    with vlmslim.patch(model, "divprune", keep=3) as slim, pytest.raises(ValueError, match="need more than embeddings"):
        slim.compress(**zoo.batch(name, model, zoo.ROWS))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("rows", [ROWS, [*ROWS, [BOS, *words(3, 12)]]], ids=["pictures", "one row of text"])
@torch.no_grad()
def test_generate_goes_on_from_it(rows, options):
    model = tiny("llava")
    inputs = batch(model, rows)
    with vlmslim.patch(model, "divprune", keep=5) as slim:
        want, logits = greedy(model, inputs)
        prompt = slim.compress(**inputs)
    got, found = greedy(model, prompt, **options)
    assert torch.equal(got.sequences[:, -6:], want.sequences[:, -6:])
    close(found, logits)


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_model_runs_it():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, "divprune", keep=5) as slim:
        want = model(**inputs).logits[:, -1]
        prompt = slim.compress(**inputs)
    close(torch.compile(model)(**prompt).logits[:, -1], want)


def test_what_embeddings_cannot_carry_is_refused():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, "fastv", keep=5) as slim, pytest.raises(ValueError, match="between decoder layers"):
        slim.compress(**inputs)
    with vlmslim.patch(model, "divprune", keep=5) as slim:
        with pytest.raises(ValueError, match="no image"):
            slim.compress(input_ids=torch.tensor([[1, 5, 6]]))
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]  # the next call is as usual
