"""Packed rows, guesses and masks: what a method sees is what it would see in the row alone."""

import pytest
import torch
from compare import close, greedy
from doubles import Both, BothOriginal, Ragged, Rule, Stairs, Strided, StridedOriginal, build, name_of
from prompts import ROWS, Picture, batch, packed, varied_row, words
from tiny import BOS, IMAGE, tiny

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

METHODS = [Both(), BothOriginal(), Stairs(), Strided(), Ragged(), "fastv", "divprune", "todre", "aim"]


# --- packed rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_packed_samples_are_compressed_one_by_one(family, backend, method):
    model = tiny(family, backend)
    rows = [varied_row(0), varied_row(1), [BOS, *words(5, 4)], varied_row(3)]
    inputs = packed(model, rows)
    with vlmslim.patch(model, build(method)) as slim:
        want = [model(**batch(model, [one]), use_cache=False, output_hidden_states=True) for one in rows]
        slim.reset_receipt()
        found = model(**inputs, output_hidden_states=True)
        assert slim.receipt.prompts == 4
    close(found.logits[0], torch.cat([x.logits[0] for x in want]))
    for i, hidden in enumerate(found.hidden_states):
        close(hidden[0], torch.cat([x.hidden_states[i][0] for x in want]))


def test_gradients_of_packed_samples():
    model = tiny("llava")
    inputs = packed(model, ROWS)
    with vlmslim.patch(model, Both()):
        model(**inputs).logits.square().sum().backward()
        found = model.model.multi_modal_projector.linear_1.weight.grad.clone()
        model.zero_grad()
        sum(model(**batch(model, [one]), use_cache=False).logits.square().sum() for one in ROWS).backward()
    close(found, model.model.multi_modal_projector.linear_1.weight.grad, 1e-3)


@torch.no_grad()
def test_packed_samples_with_a_cache_are_a_clear_error():
    model = tiny("llava")
    with vlmslim.patch(model, Both()), pytest.raises(ValueError, match="use_cache=False"):
        model(**packed(model, ROWS) | {"use_cache": True})


# --- where the prompt ends --------------------------------------------------------------------------------------------


class Last(Rule):
    """Looks at the last token between layers, and at the words before the language model."""

    layers = (1,)

    def chosen(self, n, prompt):
        return torch.arange(int(prompt.sum()) % 4, n)

    def retain(self, tokens):
        last = tokens.hidden[torch.arange(len(tokens.last)), tokens.last]
        score = torch.einsum("bsd,bd->bs", tokens.hidden, last)
        return tokens.top(score, 3) | (tokens.image == 0)


LOOKING = [Last(), "fastv", "todre", "aim", "recoverable"]


def looking(method):
    if method == "fastv":
        return vlmslim.method("fastv", keep=3)
    if method == "todre":
        return [{"method": "todre", "keep": 8, "tau": None}]
    return vlmslim.method("aim", keep=8) if method == "aim" else method


@pytest.mark.parametrize("method", LOOKING[:4], ids=str)
@torch.no_grad()
def test_guesses_do_not_change_what_a_method_sees(family, method):
    model = tiny(family)
    repeated = [BOS, Picture(0), *words(0, 3) * 4]
    inputs = batch(model, [repeated])
    with vlmslim.patch(model, looking(method)):
        want, logits = greedy(model, inputs, max_new_tokens=12)
        got, own = greedy(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(got.sequences, want.sequences)
    close(own, logits)


@pytest.mark.parametrize("method", LOOKING[:4], ids=str)
@torch.no_grad()
def test_a_scored_answer_does_not_change_what_a_method_sees(family, method):
    """The logits of an answer, in one forward, are those of decoding it."""
    model = tiny(family)
    answer = words(33, 3)
    inputs = batch(model, [varied_row(1)])
    whole = batch(model, [[*varied_row(1), *answer]])
    with vlmslim.patch(model, looking(method)):
        cache = kv_cache(first := model(**inputs, use_cache=True))
        steps, mask = [first.logits[:, -1]], inputs["attention_mask"]
        for token in answer:
            mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], 1)
            step = model(input_ids=torch.tensor([[token]]), attention_mask=mask, **{KV_CACHE: cache})
            steps.append(step.logits[:, -1])
        close(model(**whole, logits_to_keep=len(answer) + 1).logits[0], torch.cat(steps))


# --- what a mask hides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Both(), BothOriginal(), Stairs(), Strided(), StridedOriginal()], ids=name_of)
@torch.no_grad()
def test_a_hidden_picture_is_left_alone(family, method):
    """The first of two pictures is masked: the rest of the row reads as if it were not there."""
    model = tiny(family)
    pictures = [Picture(3, (60, 60)), Picture(4, (60, 60))]
    inputs = batch(model, [[BOS, pictures[0], *words(6, 2), pictures[1], *words(7, 4)]])
    ids = inputs["input_ids"][0]
    second = int((ids == IMAGE).nonzero()[-1]) - int((ids == IMAGE).sum()) // 2 + 1
    inputs["attention_mask"][0, : second - 2][ids[: second - 2] == IMAGE] = 0
    shown = inputs["attention_mask"][0].bool()
    hidden = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    hidden = {name: value[1:] if name != "batch_num_images" else value for name, value in hidden.items()}
    if family == "onevision":
        hidden["batch_num_images"] = torch.tensor([2])  # the same tokens as beside the other picture
    short = dict(input_ids=inputs["input_ids"][:, shown], position_ids=(shown.long().cumsum(0) - 1)[shown][None])
    if family in ("next", "onevision"):
        assert (ids == IMAGE).sum() % 2 == 0
    with vlmslim.patch(model, method) as slim:
        found = model(**inputs, position_ids=(shown.long().cumsum(0) - 1).clamp(min=0)[None]).logits[0, shown]
        assert slim.receipt.images == 1
        want = model(**short, **hidden, attention_mask=torch.ones_like(short["input_ids"])).logits[0]
    close(found, want)


@torch.no_grad()
def test_every_picture_is_hidden():
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    inputs["attention_mask"][inputs["input_ids"] == IMAGE] = 0
    want = model(**inputs).logits
    with vlmslim.patch(model, Both()) as slim:
        assert torch.equal(model(**inputs).logits, want)
        assert slim.receipt.images == 0 and slim.receipt.text_prompts == 1
