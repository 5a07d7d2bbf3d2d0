"""Dropping every visual token late: against hidden keys on unpatched models, and shares of attention by plain loops."""

import numpy as np
import pytest
import torch
from compare import close, greedy, lengths
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, ROWS, SEVERAL, Picture, all_visual, batch, words
from strategies import thorough
from tiny import BOS, DEPTH, tiny
from unpatched import reference

import vlmslim
from vlmslim.compressor import resolve_layer
from vlmslim.engine.families import kv_cache
from vlmslim.methods.divprune import DivPrune
from vlmslim.methods.drop_visual import DropVisual, attention_mass
from vlmslim.methods.fastv import FastV


@pytest.mark.parametrize("layer", [1, 2, 0.75, 7 / 8])
@torch.no_grad()
def test_dropping_equals_hidden_keys(family, backend, layer):
    model = tiny(family, backend)
    at = layer if isinstance(layer, int) else int(layer * DEPTH)
    for row in (ROWS[1], SEVERAL[0]):
        inputs = batch(model, [row])
        gone = all_visual(inputs)
        want = reference(model, inputs, drops={at: gone})
        with vlmslim.patch(model, "drop_visual", layer=layer, tau=None) as slim:
            out = model(**inputs)
        close(out.logits[0], want.full_logits())
        n = len(gone)
        assert lengths(kv_cache(out)) == [n] * at + [n - int(gone.sum())] * (DEPTH - at)
        per_layer = slim.receipt.summary()["visual_tokens_per_layer"]
        assert per_layer == [int(gone.sum())] * at + [0] * (DEPTH - at)


@torch.no_grad()
def test_twenty_decoded_tokens_equal_the_masked_model(family):
    model = tiny(family)
    row = ROWS[1]
    inputs = batch(model, [row])
    with vlmslim.patch(model, DropVisual(layer=2, tau=1.0)):
        out, logits = greedy(model, inputs, max_new_tokens=20)
    said = out.sequences[0, inputs["input_ids"].shape[1] :]
    longer = inputs | dict(input_ids=out.sequences)
    want = reference(model, longer, drops={2: all_visual(longer)})
    close(logits[0], want.logits()[-21:-1])
    assert said.tolist() == want.logits()[-21:-1].masked_fill(suppressed(model), -torch.inf).argmax(-1).tolist()


def suppressed(model) -> torch.Tensor:
    mask = torch.zeros(100, dtype=torch.bool)
    mask[model.generation_config.suppress_tokens] = True
    return mask


def shares(model, inputs: dict, layer: int, text: str = "after") -> tuple[float, float]:
    """Both shares by plain sums over the attention map that an unpatched eager model returns for one row."""
    maps = model(**inputs, output_attentions=True).attentions[layer - 1][0].double().mean(0)  # (L, L)
    gone = all_visual(inputs).tolist()
    v = [i for i, is_visual in enumerate(gone) if is_visual]
    t = [i for i, is_visual in enumerate(gone) if not is_visual and (text == "all" or i > v[0])]
    tv = sum(maps[i, j].item() for i in t for j in v) / sum(maps[i].sum().item() for i in t)
    vt = sum(maps[i, j].item() for i in v for j in t) / sum(maps[i].sum().item() for i in v)
    return tv, vt


INTERLEAVED = [
    [BOS, Picture(3, (60, 30)), *words(6, 2), Picture(4, (32, 64)), *words(7, 4)],
    [BOS, Picture(5), *words(20, 30), Picture(6, (32, 64)), 7],
    [BOS, *words(21, 12), Picture(8, (60, 60)), *words(22, 2)],
    [BOS, Picture(9), *words(23, 25)],
]


@pytest.mark.parametrize("text", ["after", "all"])
@pytest.mark.parametrize("layer", [1, 3])
@torch.no_grad()
def test_each_prompt_decides_by_its_own_shares(family, layer, text):
    eager = tiny(family, "eager")
    found = [shares(eager, batch(eager, [row]), layer, text) for row in INTERLEAVED]
    if text == "after":
        assert found[2][1] == found[3][1] == 0, "visual tokens see no text after them"
        assert found[1][1] > 0
    values = sorted({0.0, 1.0, *(round(max(pair), 6) for pair in found), *(round(pair[0], 6) for pair in found)})
    model = tiny(family)
    inputs = batch(model, INTERLEAVED)
    outcomes = set()
    for low, high in zip(values, values[1:], strict=False):
        tau = (low + high) / 2
        want = [max(pair) < tau for pair in found]
        outcomes.add(sum(want))
        with vlmslim.patch(model, DropVisual(layer=layer, tau=tau, text=text)) as slim:
            out = model(**inputs)
        counts = [int(all_visual(batch(model, [row])).sum()) for row in INTERLEAVED]
        left = sum(0 if drop else n for drop, n in zip(want, counts, strict=True))
        assert slim.receipt.summary()["visual_tokens_per_layer"][-1] * len(INTERLEAVED) == left
        for i, row in enumerate(INTERLEAVED):
            single = batch(model, [row])
            drops = {layer: all_visual(single)} if want[i] else {}
            n = single["input_ids"].shape[1]
            close(out.logits[i, -n:], reference(model, single, drops=drops).full_logits())
    assert len(outcomes) > 2, "the thresholds did not tell the prompts apart"


@torch.no_grad()
def test_a_list_of_layers_asks_until_it_fires():
    eager, model = tiny("llava", "eager"), tiny("llava")
    inputs = batch(model, [ROWS[1]])
    first, second = (max(shares(eager, inputs, layer)) for layer in (1, 2))
    for tau in ((first + second) / 2, 1.0, 0.0):
        fires = next((layer for layer, share in ((1, first), (2, second)) if share < tau), DEPTH)
        with vlmslim.patch(model, {"method": "drop_visual", "layer": [1, 2], "tau": tau}):
            out = model(**inputs)
        n = inputs["input_ids"].shape[1]
        assert lengths(kv_cache(out)) == [n] * fires + [n - 16] * (DEPTH - fires)


@torch.no_grad()
def test_prompts_that_end_in_an_image_keep_it(family):
    model = tiny(family)
    rows = [[BOS, *words(0, 3), Picture(0)], [BOS, Picture(1), *words(1, 3), Picture(2)]]
    for row in rows:
        inputs = batch(model, [row])
        want = model(**inputs).logits
        for tau in (None, 1.0):
            with vlmslim.patch(model, DropVisual(tau=tau)):
                close(model(**inputs).logits, want)


@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 3), st.integers(1, 12), st.integers(1, 5))
@thorough
def test_attention_mass_agrees_with_plain_loops(seed, rows, heads, size, chunk):
    rng = np.random.default_rng(seed)
    maps = rng.random((rows, heads, size, size))
    source, target = rng.random((2, rows, size)) < 0.5
    asked = []

    def attend(index):
        asked.append(index.shape[1])
        gathered = np.take_along_axis(maps, index.numpy()[:, None, :, None], axis=2)
        return torch.tensor(gathered, dtype=torch.float32)

    got = attention_mass(attend, torch.tensor(source), torch.tensor(target), chunk)
    for b in range(rows):
        want = sum(
            maps[b, h, i, j] / heads
            for h in range(heads) for i in range(size) for j in range(size) if source[b, i] and target[b, j]
        )  # fmt: skip
        np.testing.assert_allclose(got[b], want, rtol=1e-4, atol=1e-6)
    assert all(n <= chunk for n in asked)


def test_shares_of_the_depth_round_down():
    want = {1: 1, 2: 1, 4: 3, 22: 19, 24: 21, 28: 24, 32: 28, 36: 31, 40: 35}
    assert {depth: resolve_layer(7 / 8, depth) for depth in want} == want
    assert [resolve_layer(share, 100) for share in (0.29, 0.57, 0.58)] == [29, 57, 58]
    assert [resolve_layer(share, depth) for share, depth in ((0.01, 32), (0.999, 2), (0.5, 1))] == [1, 1, 1]
    assert resolve_layer(3, 4) == 3


@pytest.mark.parametrize("first", [DivPrune(keep=5), {"method": "pool", "keep": 4}, FastV(keep=5, layer=1)], ids=str)
@torch.no_grad()
def test_dropping_after_another_method(family, first):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, [first, DropVisual(layer=0.75, tau=None)]) as slim:
        out, logits = greedy(model, inputs)
        singles = [greedy(model, batch(model, [row]))[1][0] for row in LONG_ROWS]
    close(logits, torch.stack(singles))
    assert slim.receipt.summary()["visual_tokens_per_layer"][-1] == 0
    assert lengths(kv_cache(out))[-1] < lengths(kv_cache(out))[2]
