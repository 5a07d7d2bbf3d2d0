"""Rare ways to call a patched model: right, or a warning or a refusal in a sentence."""

import pytest
import torch
from compare import close
from doubles import Both, Halve, Strided, expect
from prompts import ROWS, Picture, batch, words
from tiny import BOS, tiny
from unpatched import merged_embeddings

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache


@pytest.mark.parametrize("method", [Strided(), Halve(), Both()], ids=str)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_attention_maps_have_the_callers_length(method, padding):
    """Kept tokens pay what they pay in the shortened row; nothing is paid to dropped ones."""
    model = tiny("llava", "eager")
    inputs = batch(model, ROWS, padding)
    with vlmslim.patch(model, method):
        maps = model(**inputs, output_attentions=True).attentions
    for i, row in enumerate(ROWS):
        own = inputs["attention_mask"][i].bool()
        eager, seen = tiny("llava", "eager"), []
        for layer in eager.model.language_model.layers:
            layer.self_attn.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out[1][0]))
        ref = expect(eager, row, method)
        for n, want in enumerate(seen[-4:]):
            got = maps[n][i][:, own][:, :, own]
            assert maps[n].shape[-2:] == (inputs["input_ids"].shape[1],) * 2
            alive = ref.alive(n)
            places = ref.origin[alive]
            close(got[:, places][:, :, places], want[:, alive][:, :, alive], 1e-4)
            gone = torch.ones(got.shape[-1], dtype=torch.bool).index_fill(0, places, False)
            assert not got[:, :, gone].any()
            close(got[:, places[0] :].sum(-1), torch.ones(got.shape[0], got.shape[1] - int(places[0])), 1e-4)


@torch.no_grad()
def test_attention_maps_of_later_steps_are_refused():
    model = tiny("llava", "eager")
    with vlmslim.patch(model, "divprune", keep=5), pytest.raises(ValueError, match="call the model once"):
        model.generate(**batch(model, ROWS), max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)


@pytest.mark.parametrize("method", ["divprune", "fastv", "todre", "aim"])
@torch.no_grad()
def test_a_text_that_the_cache_holds_already_may_stand_before_a_picture(method):
    model, prefix = tiny("llava"), [BOS, *words(5, 7)]
    inputs = batch(model, [[*prefix, Picture(0), *words(6, 5)]])
    with vlmslim.patch(model, method, keep=5) as slim:
        want = model(**inputs)
        kept = slim.receipt.summary()["visual_tokens_per_layer"]
        slim.reset_receipt()
        first = model(input_ids=inputs["input_ids"][:, : len(prefix)], use_cache=True)
        rest = inputs | {"input_ids": inputs["input_ids"][:, len(prefix) :], KV_CACHE: kv_cache(first)}
        got = model(**rest)
        assert slim.receipt.summary()["visual_tokens_per_layer"] == kept
        close(got.logits[:, -5:], want.logits[:, -5:], 1e-4)  # a place before the first kept token has nothing to show
        token, mask = torch.tensor([[7]]), torch.ones(1, inputs["input_ids"].shape[1] + 1, dtype=torch.long)
        steps = [model(input_ids=token, attention_mask=mask, **{KV_CACHE: kv_cache(out)}).logits for out in (want, got)]
        close(*steps, 1e-4)


@torch.no_grad()
def test_pictures_that_the_caller_merged_bring_a_warning():
    model = tiny("llava")
    embeds = merged_embeddings(model, batch(model, [ROWS[0]]))
    with vlmslim.patch(model, "divprune", keep=5), pytest.warns(UserWarning, match="merged into it already"):
        model(inputs_embeds=embeds)


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (3, 400), (400, 3)], ids=str)
@pytest.mark.parametrize("mode", ["corrected", "released"])
@torch.no_grad()
def test_strips_of_a_picture(size, mode):
    """Unpadding leaves nothing of a strip's mosaic; the thumbnail is compressed alone, or kept as released."""
    model = tiny("next")
    with vlmslim.patch(model, "globalcom2", keep=0.5, mode=mode) as slim:
        model(**batch(model, [[BOS, Picture(0, size), 5, 6]]))
    assert slim.receipt.summary()["kept"] >= 8
