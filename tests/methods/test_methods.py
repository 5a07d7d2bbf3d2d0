"""Every registered method against its contract, and the first ones against independent references in float64."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from doubles import BUDGETED, options_of, registered
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import (
    BOS,
    DEPTH,
    IMAGE,
    LONG_ROWS,
    ROWS,
    SEVERAL,
    Clip,
    Picture,
    batch,
    close,
    greedy,
    lengths,
    merged_embeddings,
    reference,
    tiny,
    visual,
    words,
)

import vlmslim
from vlmslim.compressor import resolve_keep
from vlmslim.engine.families import kv_cache
from vlmslim.registry import method_class

METHODS = vlmslim.method_names()
FIRST = ["random", "uniform", "pool", "fastv", "divprune"]  # the methods whose count is exactly what was asked for
SELECTING = ["random", "uniform", "divprune"]
repeatable = settings(deadline=None, derandomize=True, max_examples=40)


def seen_by_language_model(model) -> tuple[list, object]:
    """Records the embeddings that enter the language model."""
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0].detach()))
    return seen, hook


def test_the_first_methods_are_there():
    assert {"none", *FIRST} <= set(METHODS)
    assert list(METHODS) == sorted(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_a_description_is_complete(name):
    """`str` of a method is its row in a table: every option is in it."""
    options = {"keep": 0.25, "weights": "random"}
    options = {option: value for option, value in options.items() if option in options_of(name)}
    method = vlmslim.method(name, **options)
    for f in fields(method):
        if f.repr:
            assert f"{f.name}=" in str(method)
    assert type(method).__doc__.strip()
    assert method == vlmslim.method(name, **options)


# --- counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 5, 13, 0.111, 0.5])
@pytest.mark.parametrize("name", FIRST)
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
    assert receipt["positions"] == ("original" if late else "renumbered")


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
        import json

        json.dumps(first, allow_nan=False)


@given(st.floats(1e-6, 1.0), st.integers(1, 5000))
@repeatable
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


# --- the contract ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_a_batch_is_its_rows(family, name):
    model = tiny(family)
    rows = [*LONG_ROWS, SEVERAL[0]]
    with vlmslim.patch(model, registered(name, 5)) as slim:
        out, logits = greedy(model, batch(model, rows))
        assert slim.receipt.summary()["had_effect"]
        padded = model(**batch(model, rows, "right")).logits
        for i, row in enumerate(rows):
            single = batch(model, [row])
            close(greedy(model, single)[1][0], logits[i], 5e-4)
            if i == 1:
                length = single["input_ids"].shape[1]
                close(model(**single).logits[0], padded[i][:length], 5e-4)


@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_methods_are_deterministic_and_leave_the_random_state(family, name):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    found = []
    for seed in (1, 2):
        with vlmslim.patch(model, registered(name, 5)):
            torch.manual_seed(seed)
            np.random.seed(seed)
            state = torch.get_rng_state()
            found.append(model(**inputs).logits)
            assert torch.equal(torch.get_rng_state(), state), "drew from the global generator"
    assert torch.equal(found[0], found[1])


@torch.no_grad()
def test_random_follows_its_seed_and_the_image(family):
    model = tiny(family)

    def kept(rows, seed):
        seen = []

        class Spy(method_class("random")):
            def compress(self, image):
                result = super().compress(image)
                seen.append(result.index.tolist())
                return result

        with vlmslim.patch(model, Spy(keep=5, seed=seed)):
            model(**batch(model, rows))
        return seen

    rows = [[BOS, Picture(i), *words(i, 3)] for i in range(4)]
    together = kept(rows, 0)
    assert together == kept(rows, 0)
    assert together != kept(rows, 1)
    assert together == [kept([row], 0)[0] for row in rows]
    assert together[::-1] == kept(rows[::-1], 0)
    assert len({tuple(index) for index in together}) == 4, "every image lost the same tokens"


@pytest.mark.parametrize("positions", ["renumbered", "original"])
@pytest.mark.parametrize("name", SELECTING)
@torch.no_grad()
def test_selections_are_fed_in_raster_order_at_their_positions(family, name, positions):
    """What enters layer 0 is a subsequence of the image's own tokens; the logits are those of feeding it by hand."""
    model = tiny(family)
    for row in (ROWS[1], SEVERAL[0]):
        inputs = batch(model, [row])
        embeds = merged_embeddings(model, inputs)[0]
        seen, hook = seen_by_language_model(model)
        with vlmslim.patch(model, name, keep=5, positions=positions):
            out = model(**inputs)
        hook.remove()
        equal = (embeds[None] - seen[0][0][:, None]).abs().amax(-1) < 1e-4  # (S, L); newlines are many alike
        origin, at = [], -1
        for line in equal:
            options = line.nonzero()[:, 0]
            options = options[options > at]
            assert len(options), "a token is not the image's own, or out of order"
            at = int(options[0])
            origin.append(at)
        assert len(origin) == len(embeds) - sum(len(place) - 5 for place in visual(inputs))
        if positions == "renumbered":
            want = reference(model, inputs, torch.tensor(origin)).logits()
            close(out.logits[0][origin][-1], want[-1])


@pytest.mark.parametrize("name", ["random", "uniform", "pool", "divprune", "fastv"])
@torch.no_grad()
def test_videos_are_compressed(name):
    model = tiny("onevision")
    rows = [[BOS, Clip(0), *words(0, 4)], [BOS, *words(1, 6), Clip(1)]]
    inputs = batch(model, rows)
    with vlmslim.patch(model, name, keep=5) as slim:
        out, logits = greedy(model, inputs)
        for i, row in enumerate(rows):
            close(greedy(model, batch(model, [row]))[1][0], logits[i])
    assert slim.receipt.summary()["visual_tokens"] == 13
    assert lengths(kv_cache(out))[-1] == 7 + 5 + 5
    with vlmslim.patch(model, name, keep=1.0):
        kept = greedy(model, inputs)[1]
    assert torch.equal(kept, greedy(model, inputs)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_half_precision_runs(family, name, dtype):
    model = tiny(family, dtype=dtype)
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, registered(name, 5)) as slim:
        logits = greedy(model, inputs)[1]
    assert torch.isfinite(logits[:, :, 2:90]).all()
    assert slim.receipt.summary()["had_effect"]
    if name in FIRST:
        assert slim.receipt.summary()["visual_tokens_per_layer"][-1] == 15 / 4


@torch.no_grad()
def test_fractions_of_the_depth():
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    text = int((inputs["input_ids"] != IMAGE).sum())
    for layer, at in ((0.05, 1), (0.25, 1), (0.5, 2), (0.75, 3), (7 / 8, 3), (0.99, 3), (1, 1), (3, 3)):
        with vlmslim.patch(model, "fastv", keep=4, layer=layer):
            found = lengths(kv_cache(model(**inputs)))
        assert found == [text + (16 if i < at else 4) for i in range(DEPTH)]


# --- fastv, against the maps of eager attention ----------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_fastv_keeps_what_the_last_token_attends_to(family, layer, seed):
    """Ranked by hand from an eager model's attention map, in float64; dropped by hiding keys."""
    eager, model = tiny(family, "eager"), tiny(family)
    first, second = Picture(seed, (60, 30)), Picture(7 + seed, (32, 64))
    row = [BOS, *words(seed, 2), first, *words(9 + seed, 3), second, *words(5, 4)]
    keep = 3 + seed
    inputs = batch(model, [row])
    maps = eager(**inputs, output_attentions=True).attentions
    score = maps[layer - 1][0, :, -1].double().mean(0)
    gone = torch.zeros(len(score), dtype=torch.bool)
    for place in visual(inputs):
        ranked = sorted(place.tolist(), key=lambda i: -float(score[i]))
        assert float(score[ranked[keep - 1]] - score[ranked[keep]]) > 1e-6, "a draw: choose another seed"
        gone[ranked[keep:]] = True
    want = reference(eager, inputs, drops={layer: gone}).full_logits()
    for chosen in (model, eager):
        with vlmslim.patch(chosen, "fastv", keep=keep, layer=layer):
            close(chosen(**inputs).logits[0], want)
