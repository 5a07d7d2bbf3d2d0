"""Budgets as counts and shares, and the numbers of tokens that caches and receipts show for the simple methods."""

import json

import pytest
import torch
from compare import greedy, lengths
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, ROWS, SEVERAL, batch, visual
from strategies import some
from tiny import DEPTH, tiny

import vlmslim
from vlmslim.compressor import resolve_keep
from vlmslim.engine.families import kv_cache


@pytest.mark.parametrize("keep", [1, 5, 13, 0.111, 0.5])
@pytest.mark.parametrize("name", ["random", "uniform", "pool", "fastv", "divprune"])
@torch.no_grad()
def test_kept_counts_are_exact(family, name, keep):
    model = tiny(family)
    rows = [*LONG_ROWS, *SEVERAL]
    inputs = batch(model, rows)
    sizes = [[len(place) for place in visual(batch(model, [row]))] for row in rows]
    text = [int(m.sum()) - sum(n) for m, n in zip(inputs["attention_mask"], sizes, strict=True)]
    budgets = [[keep if isinstance(keep, int) else max(1, round(keep * n)) for n in row] for row in sizes]
    flat, asked = [n for row in sizes for n in row], [k for row in budgets for k in row]
    with vlmslim.patch(model, name, keep=keep) as slim:
        out = model(**inputs)
    pruned = max(t + sum(k) for t, k in zip(text, budgets, strict=True))
    whole = max(t + sum(n) for t, n in zip(text, sizes, strict=True))
    late = name == "fastv"
    assert lengths(kv_cache(out)) == [whole if late and layer < 2 else pruned for layer in range(DEPTH)]
    receipt = slim.receipt.summary()
    assert receipt["images"] == len(flat)
    assert receipt["prompts"] == len(rows)
    assert receipt["visual_tokens"] == pytest.approx(sum(flat) / len(flat))
    assert receipt["requested"] == pytest.approx(sum(asked) / len(asked))
    assert receipt["kept"] == pytest.approx(sum(flat if late else asked) / len(flat))
    per_layer = [sum(flat if late and layer < 2 else asked) / len(rows) for layer in range(DEPTH)]
    assert receipt["visual_tokens_per_layer"] == pytest.approx(per_layer)
    assert receipt["equivalent_tokens"] == pytest.approx(sum(per_layer) / DEPTH)
    assert receipt["text_tokens"] == pytest.approx(sum(text) / len(rows))
    tokens = sum(v + sum(text) / len(rows) for v in per_layer)
    assert receipt["kv_bytes"] == pytest.approx(tokens * 2 * 2 * 8 * 4)  # keys and values, 2 KV heads of 8, fp32
    assert receipt["had_effect"] is True
    assert receipt["backend"] == "sdpa"
    assert receipt["dtype"] == "float32"
    assert receipt["positions"] == "original"


@torch.no_grad()
def test_the_receipt_of_nothing(family):
    model = tiny(family)
    with vlmslim.patch(model, "none") as slim:
        assert slim.receipt.summary()["images"] == 0
        model(**batch(model, ROWS))
        first = slim.receipt.summary()
        assert first["visual_tokens"] == first["kept"] == first["visual_tokens_per_layer"][-1]
        assert first["images"] == first["prompts"] == 2
        assert first["had_effect"] is False
        greedy(model, batch(model, [ROWS[0]]), use_cache=True)
        assert slim.receipt.summary()["images"] == 3, "decode steps were counted, or a generate() was not"
        slim.reset_receipt()
        assert slim.receipt.summary()["images"] == slim.receipt.summary()["prompts"] == 0
        json.dumps(first, allow_nan=False)


@given(st.floats(1e-6, 1.0), st.integers(1, 5000))
@some
def test_shares_become_counts_as_python_rounds(share, n):
    assert resolve_keep(share, n) == max(1, int(round(share * n)))
    assert 1 <= resolve_keep(share, n) <= n
    assert resolve_keep(1.0, n) == n
    assert resolve_keep(1, n) == 1
    assert resolve_keep(n, n) == n
    with pytest.raises(ValueError):
        resolve_keep(n + 1, n)


def test_known_roundings():
    table = [(0.098, 576, 56), (0.5, 5, 2), (0.5, 7, 4), (0.098, 2880, 282), (0.2, 576, 115), (0.001, 16, 1)]
    assert [resolve_keep(share, n) for share, n, _ in table] == [k for *_, k in table]
