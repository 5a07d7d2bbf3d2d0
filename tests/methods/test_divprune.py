"""DivPrune against an independent greedy search in float64, and its orders and newlines in models."""

import numpy as np
import torch
from checks import kept_of
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import ROWS, Picture, batch, visual, words
from strategies import some, thorough
from tiny import BOS, tiny
from unpatched import keep_only, merged_embeddings, reference
from vector_checks.divprune import check_greedy, distances
from watch import Watch

import vlmslim
from vlmslim.methods.divprune import DivPrune, farthest_points


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
@thorough
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
@some
def test_divprune_batches_are_their_members(seed, n, batch_size):
    x = torch.from_numpy(np.stack([tokens_of(seed + i, n, 8, "plain") for i in range(batch_size)]))
    k = max(1, n // 2)
    together = farthest_points(x, k)
    for i in range(batch_size):
        check_greedy(together[i].tolist(), distances(x[i].numpy()))


def test_selection_is_not_done_in_half_precision():
    """Near duplicates in 4096 dimensions: as many distinct picks as asked for, and those of fp32 on the same values."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(24, 4096, generator=generator)
    x = centres[torch.arange(256) % 24] + 0.05 * torch.randn(256, 4096, generator=generator)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        picks = farthest_points(half, 58).tolist()
        assert len(set(picks)) == 58
        assert picks == farthest_points(half.float(), 58).tolist()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert farthest_points(half, 58).tolist() == picks
    zero = torch.randn(32, 16, generator=generator)
    zero[5] = 0
    assert len(set(farthest_points(zero, 8).tolist())) == 8
    copies = torch.randn(16, 8, generator=generator).repeat(4, 1)
    picks = farthest_points(copies, 32).tolist()
    assert len(set(picks)) == 32
    assert len({p % 16 for p in picks[:16]}) == 16, "a copy was taken before every distinct token was"


def test_selection_does_not_wait_for_the_device():
    """The greedy loop makes no host synchronisation, however many tokens it picks, and is O(k n)."""
    x = torch.randn(2, 300, 32)
    for k in (2, 100):
        with Watch() as watch:
            farthest_points(x, k)
        assert watch.syncs() == 0
    largest = max(torch.tensor(shape).prod().item() for shape in watch.shapes)
    assert largest <= 2 * 300 * 300
    big = [shape for shape in watch.shapes if torch.tensor(shape).prod().item() > 2 * 300 * 32]
    assert len(big) < 20, "a matrix is made at every step"


@torch.no_grad()
def test_divprune_newlines():
    """pool: at most one newline. drop: none. rows: those of rows that keep a token. Counts exact in each."""
    model = tiny("next")
    row = [BOS, Picture(1, (60, 60)), *words(0, 4)]
    counts = {}
    for newline in ("pool", "drop", "rows"):
        _, _, ((image, result),), _ = kept_of(model, row, DivPrune, keep=20, newline=newline)
        index = result.index
        assert len(index) == 20 == len(set(index.tolist())) == len(result)
        component, line, _ = image.mosaic.unbind(1)
        newlines = index[component[index] < 0]
        counts[newline] = len(newlines)
        if newline == "rows":
            at = (component < 0).nonzero()[:, 0].tolist()
            alive = set(line[index[component[index] == 1]].tolist())
            kept = {at.index(i) for i in newlines.tolist()}
            assert kept <= alive
            assert len(alive) - len(kept) <= 1, "the budget may end between a token and its row's newline"
    assert counts["pool"] <= 1
    assert counts["drop"] == 0
    assert counts["rows"] > 1


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
    raster = reference(model, inputs, kept, positions="original").full_logits()
    with vlmslim.patch(model, "divprune", keep=6, order="selection"):
        close(model(**inputs).logits[0], want)
    with vlmslim.patch(model, "divprune", keep=6):
        close(model(**inputs).logits[0], raster)
    assert (want - raster).abs().max() > 0.1
