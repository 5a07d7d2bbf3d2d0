"""Every registered method against its contract, and the first ones against independent references in float64."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from doubles import patch_or_skip, registered
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
    keep_only,
    lengths,
    merged_embeddings,
    reference,
    tiny,
    visual,
    words,
)
from torch.nn import functional as F
from vector_checks.divprune import check_greedy, distances

import vlmslim
from vlmslim.compressor import ImageTokens, resolve_keep
from vlmslim.methods import method_class
from vlmslim.methods.divprune import DivPrune, farthest_points
from vlmslim.selection import grid_cells, largest_remainder, share_out

METHODS = vlmslim.method_names()
PRUNING = [name for name in METHODS if name != "none"]
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
    options = {} if name == "none" or "keep" not in {f.name for f in fields(method_class(name))} else {"keep": 0.25}
    if "weights" in {f.name for f in fields(method_class(name))}:
        options["weights"] = "random"
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
    assert lengths(out.past_key_values) == [whole if late and layer < 2 else pruned for layer in range(DEPTH)]
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


@pytest.mark.parametrize("name", PRUNING)
@torch.no_grad()
def test_a_batch_is_its_rows(family, name):
    model = tiny(family)
    rows = [*LONG_ROWS, SEVERAL[0]]
    with patch_or_skip(model, registered(name, 5)) as slim:
        out, logits = greedy(model, batch(model, rows))
        assert slim.receipt.summary()["had_effect"]
        padded = model(**batch(model, rows, "right")).logits
        for i, row in enumerate(rows):
            single = batch(model, [row])
            close(greedy(model, single)[1][0], logits[i], 5e-4)
            if i == 1:
                length = single["input_ids"].shape[1]
                close(model(**single).logits[0], padded[i][:length], 5e-4)


@pytest.mark.parametrize("name", PRUNING)
@torch.no_grad()
def test_methods_are_deterministic_and_leave_the_random_state(family, name):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    found = []
    for seed in (1, 2):
        with patch_or_skip(model, registered(name, 5)):
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


@torch.no_grad()
def test_selection_order_feeds_in_the_order_of_picks(family):
    model = tiny(family)
    row = ROWS[0]
    inputs = batch(model, [row])
    (place,) = visual(inputs)
    embeds = merged_embeddings(model, inputs)[0]
    picks = place[farthest_points(embeds[place], 6)]
    short = torch.cat([embeds[: place[0]], embeds[picks], embeds[place[-1] + 1 :]])[None]
    kept = keep_only(inputs, [picks.sort().values - place[0]])
    want = reference(model, inputs, kept, embeds=short).full_logits()
    raster = reference(model, inputs, kept).full_logits()
    with vlmslim.patch(model, "divprune", keep=6, order="selection"):
        close(model(**inputs).logits[0], want)
    with vlmslim.patch(model, "divprune", keep=6):
        close(model(**inputs).logits[0], raster)
    assert (want - raster).abs().max() > 0.1


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
    assert lengths(out.past_key_values)[-1] == 7 + 5 + 5
    with vlmslim.patch(model, name, keep=1.0):
        kept = greedy(model, inputs)[1]
    assert torch.equal(kept, greedy(model, inputs)[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("name", PRUNING)
@torch.no_grad()
def test_half_precision_runs(family, name, dtype):
    model = tiny(family, dtype=dtype)
    inputs = batch(model, LONG_ROWS)
    with patch_or_skip(model, registered(name, 5)) as slim:
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
            found = lengths(model(**inputs).past_key_values)
        assert found == [text + (16 if i < at else 4) for i in range(DEPTH)]


# --- divprune, against float64 ---------------------------------------------------------------------------------------


def tokens_of(seed: int, n: int, d: int, kind: str) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    if kind == "copies":
        x = x[rng.integers(0, max(1, n // 3), n)]
    elif kind == "signs":
        x = np.sign(x)
    elif kind == "zeros":
        x[rng.random(n) < 0.3] = 0
    elif kind == "alike":
        x = rng.normal(size=d) + 1e-4 * x
    elif kind == "scaled":
        x = x * 10.0 ** rng.integers(-3, 4, (n, 1))
    return x.astype(np.float32)


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(2, 24), st.data())
@settings(repeatable, max_examples=80)
def test_divprune_is_greedy_farthest_point_selection(seed, n, d, data):
    kind = data.draw(st.sampled_from(["plain", "copies", "signs", "zeros", "alike", "scaled"]))
    k = data.draw(st.integers(1, n))
    x = tokens_of(seed, n, d, kind)
    picks = farthest_points(torch.from_numpy(x), k).tolist()
    assert len(set(picks)) == k
    assert set(picks) <= set(range(n))
    distance = distances(x)
    if n > 1:
        check_greedy(picks, distance)
    assert farthest_points(torch.from_numpy(x), n).tolist()[:k] == picks


@given(st.integers(0, 10**6), st.integers(2, 40), st.integers(1, 4))
@repeatable
def test_divprune_batches_are_their_members(seed, n, batch_size):
    x = torch.from_numpy(np.stack([tokens_of(seed + i, n, 8, "plain") for i in range(batch_size)]))
    k = max(1, n // 2)
    together = farthest_points(x, k)
    for i in range(batch_size):
        check_greedy(together[i].tolist(), distances(x[i].numpy()))


@torch.no_grad()
def test_divprune_newlines():
    """pool: at most one newline. drop: none. rows: those of rows that keep a token. Counts exact in each."""
    model = tiny("next")
    row = [BOS, Picture(1, (60, 60)), *words(0, 4)]
    counts = {}
    for newline in ("pool", "drop", "rows"):
        seen = []

        class Spy(DivPrune):
            def compress_images(self, images, seen=seen):
                results = super().compress_images(images)
                seen += zip(images, results, strict=True)
                return results

        with vlmslim.patch(model, Spy(keep=20, newline=newline)):
            model(**batch(model, [row]))
        ((image, result),) = seen
        index = result.index
        assert len(index) == 20 == len(set(index.tolist())) == len(result.features)
        component, line, _ = image.mosaic.unbind(1)
        newlines = index[component[index] < 0]
        counts[newline] = len(newlines)
        if newline == "rows":
            at = (component < 0).nonzero()[:, 0].tolist()
            alive = set(line[index[component[index] == 1]].tolist())
            assert {at.index(i) for i in newlines.tolist()} == alive
    assert counts["pool"] <= 1
    assert counts["drop"] == 0
    assert counts["rows"] > 1


# --- uniform and pool ------------------------------------------------------------------------------------------------


def made_up(features: torch.Tensor, side: int) -> ImageTokens:
    """One image on a side x side grid."""
    n = side * side
    at = torch.arange(n)
    grid = torch.stack([torch.zeros_like(at), at // side, at % side], 1)
    return ImageTokens(features, torch.zeros(1, n, 4), torch.zeros(1, 3, side, side), layout=lambda: grid)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@repeatable
def test_grid_cells_partition_the_grid_into_rectangles(height, width, data):
    k = data.draw(st.integers(1, height * width))
    cells = grid_cells(height, width, k)
    assert cells.shape == (height, width)
    assert set(cells.flatten().tolist()) == set(range(k))
    for cell in range(k):
        rows, columns = (cells == cell).nonzero().unbind(1)
        box = cells[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == cell).all(), "not a rectangle"
    sizes = cells.flatten().bincount()
    assert sizes.max() <= 4 * height * width / k + 1, "a cell is much larger than its share"


@given(st.integers(1, 500), st.lists(st.integers(0, 60), min_size=1, max_size=8))
@repeatable
def test_budgets_are_shared_in_proportion(k, sizes):
    if k > sum(sizes):
        with pytest.raises(ValueError):
            share_out(k, sizes)
        return
    parts = share_out(k, sizes)
    assert sum(parts) == k
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size
        assert abs(part - k * size / sum(sizes)) < 1


@given(st.integers(0, 3000))
def test_the_budget_is_split_without_a_rest(k):
    parts = largest_remainder(k, (0.5, 0.3, 0.2))
    assert sum(parts) == k
    assert all(abs(part - k * share) < 1 for part, share in zip(parts, (0.5, 0.3, 0.2), strict=True))
    assert largest_remainder(1, (0.0, 0.0, 1.0)) == [0, 0, 1]


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10**6))
@repeatable
def test_pool_is_average_pooling(outer, inner, seed):
    side = outer * inner
    x = torch.randn(side * side, 6, generator=torch.Generator().manual_seed(seed))
    got = vlmslim.method("pool", keep=outer * outer).compress(made_up(x, side)).features
    want = F.avg_pool2d(x.double().T.view(1, 6, side, side), inner)[0].flatten(1).T
    close(got.double(), want, 1e-5)


@given(st.integers(2, 9), st.data())
@repeatable
def test_pool_averages_every_token_once(side, data):
    n = side * side
    k = data.draw(st.integers(1, n))
    weights = vlmslim.method("pool", keep=k).compress(made_up(torch.eye(n), side)).features  # (k, n)
    assert weights.shape == (k, n)
    assert ((weights > 0).sum(0) == 1).all(), "a token is in no cell, or in two"
    close(weights.sum(1), torch.ones(k), 1e-5)
    for row in weights:
        close(row[row > 0], torch.full_like(row[row > 0], 1 / int((row > 0).sum())), 1e-5)


@given(st.integers(2, 9), st.integers(1, 4))
@repeatable
def test_uniform_takes_the_same_place_of_every_block(outer, inner):
    side = outer * inner
    image = made_up(torch.zeros(side * side, 2), side)
    index = vlmslim.method("uniform", keep=outer * outer).compress(image).index
    row, column = index // side, index % side
    blocks = (row // inner * outer + column // inner).tolist()
    assert blocks == list(range(outer * outer))
    assert len({(int(r % inner), int(c % inner)) for r, c in zip(row, column, strict=True)}) == 1


@given(st.integers(2, 9), st.data())
@repeatable
def test_uniform_leaves_no_region_out(side, data):
    n = side * side
    k = data.draw(st.integers(1, n))
    index = vlmslim.method("uniform", keep=k).compress(made_up(torch.zeros(n, 2), side)).index
    assert len(index) == k == len(set(index.tolist()))
    assert (index.diff() > 0).all()
    at = torch.stack([torch.arange(n) // side, torch.arange(n) % side], 1)
    reach = (at[:, None] - at[index][None]).abs().amax(-1).amin(1).max()
    assert reach <= 2 * (n / k) ** 0.5


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
