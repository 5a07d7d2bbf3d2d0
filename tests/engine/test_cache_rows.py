"""Rows of a cache that move, are copied, cropped, reset and lost: the plan of a patch goes with them."""

import copy
import io

import pytest
import torch
from compare import close, greedy
from doubles import Both, BothOriginal, Ragged, Stairs, Strided, name_of
from prompts import ROWS, batch, varied_row, words
from tiny import BOS, tiny
from transformers import DynamicCache

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

CUT = [Both(), BothOriginal(), Stairs(), Strided(), Ragged()]


def prefilled(model, rows) -> tuple:
    inputs = batch(model, rows)
    return kv_cache(model(**inputs, use_cache=True)), inputs["attention_mask"]


def next_logits(model, cache, mask, tokens: list[int]) -> torch.Tensor:
    """The logits of one more token for each row."""
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    return model(input_ids=torch.tensor(tokens)[:, None], attention_mask=mask, **{KV_CACHE: cache}).logits[:, -1]


MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "reorder and drop": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 2])), [1, 1, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("method", CUT, ids=name_of)
@torch.no_grad()
def test_the_plan_moves_with_the_rows_of_a_cache(family, method, move):
    change, order = MOVES[move]
    model, rows = tiny(family), [varied_row(i) for i in range(3)]
    with vlmslim.patch(model, method):
        cache, mask = prefilled(model, rows)
        change(cache)
        found = next_logits(model, cache, mask[order], [7 + i for i in order])
        for i, logits in zip(order, found, strict=True):
            alone, ones = prefilled(model, [rows[i]])
            close(logits, next_logits(model, alone, ones, [7 + i])[0])


@pytest.mark.parametrize("method", CUT, ids=name_of)
@torch.no_grad()
def test_copies_of_a_cache(method):
    model = tiny("llava")
    with vlmslim.patch(model, method):
        cache, mask = prefilled(model, [ROWS[0]])
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        copies = [copy.deepcopy(cache), torch.load(file, weights_only=False)]
        want = next_logits(model, cache, mask, [7])
        for other in copies:
            assert torch.equal(next_logits(model, other, mask, [7]), want)


@torch.no_grad()
def test_a_reset_cache_is_an_empty_one():
    model = tiny("llava")
    text = batch(model, [[BOS, *words(3, 6)]])
    plain = greedy(model, text)[1]
    with vlmslim.patch(model, Both()):
        cache, _ = prefilled(model, [ROWS[0]])
        kind = type(cache)
        cache.reset()
        assert type(cache) is DynamicCache is not kind
        assert torch.equal(greedy(model, text, **{KV_CACHE: cache})[1], plain)


@pytest.mark.parametrize("method", [Both(), BothOriginal(), Stairs()], ids=name_of)
@torch.no_grad()
def test_crops_of_a_cache(method):
    """Tokens after the picture may be cropped. A crop into the shortened prompt is an error."""
    model = tiny("llava")
    with vlmslim.patch(model, method):
        cache, mask = prefilled(model, [ROWS[0]])
        want = next_logits(model, copy.deepcopy(cache), mask, [7])
        next_logits(model, cache, mask, [9])
        cache.crop(-1)
        close(next_logits(model, cache, mask, [7]), want, 1e-5)
        cache.crop(-7)  # the decoded token, the five words, and one token of the picture
        with pytest.raises(ValueError, match="cropped into its compressed prompt"):
            next_logits(model, cache, mask, [7])


@torch.no_grad()
def test_other_rows_than_the_cache_holds_are_a_clear_error():
    model = tiny("llava")
    with vlmslim.patch(model, Both()):
        cache, mask = prefilled(model, ROWS)
        for layer in cache.layers:
            layer.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ValueError, match="holds 2 rows and 1 came in"):
            next_logits(model, cache, mask[1:], [7])
