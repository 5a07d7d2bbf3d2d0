"""DART against plain lists, on the keys and states of an unpatched model."""

import pytest
import torch
from checks import check_a_batch_is_its_rows
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, SEVERAL, Picture, batch, visual, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny
from unpatched import reference

import vlmslim
from vlmslim.engine.families import kv_cache
from vlmslim.methods.dart import DART, unlike


def plain(norm: list, state: list, image: list[int], text: list[int], k: int, released: bool) -> set[int]:
    """Select the tokens that stay of an image, by norms and states of the whole row."""
    visual_pivots = sorted(image, key=lambda i: (-norm[i], i))[: 4 if released else min(4, k)]
    all_pivots = visual_pivots + sorted(text, key=lambda i: (-norm[i], i))[:4]
    pool, kept = [i for i in image if i not in visual_pivots], set(visual_pivots)
    rest = k - len(visual_pivots)
    for number, pivot in enumerate(set(all_pivots) if released else all_pivots):
        share = k // 8 if released else rest // len(all_pivots) + (number < rest % len(all_pivots))
        for i in sorted(pool, key=lambda i: (cosine(state[i], state[pivot]), i))[:share]:
            pool.remove(i)
            kept.add(i)
    return kept


@pytest.mark.parametrize("mode", ["corrected", "released"])
@pytest.mark.parametrize("keep", [3, 7, 13])
@pytest.mark.parametrize(
    "row", [LONG_ROWS[0], SEVERAL[0], [BOS, *words(1, 4), Picture(1)]], ids=["one", "two", "no_text_after"]
)
@torch.no_grad()
def test_it_keeps_pivots_and_what_is_unlike_them(family, row, keep, mode):
    model = tiny(family)
    inputs = batch(model, [row])
    out = model(**inputs, output_hidden_states=True)
    keys, released = kv_cache(out).layers[1].keys[0].double(), mode == "released"
    norm = keys.norm(p=1 if released else 2, dim=2).sum(0).tolist()
    state = model.model.language_model.norm(out.hidden_states[2][0]).double()
    length, places = inputs["input_ids"].shape[1], visual(inputs)
    everywhere = {i for place in places for i in place.tolist()}
    gone = torch.zeros(length, dtype=torch.bool)
    for place in places:
        image = place.tolist()
        text = [i for i in range(image[-1] + 1, length) if i not in everywhere]
        kept = plain(norm, state.tolist(), image, text, keep, released)
        assert released or len(kept) == keep
        gone[[i for i in image if i not in kept]] = True
    want = reference(model, inputs, drops={2: gone}).full_logits()
    with vlmslim.patch(model, DART(keep=keep, mode=mode)) as slim:
        close(model(**inputs).logits[0], want)
    assert slim.receipt.last.visual[2:] == [[len(everywhere) - int(gone.sum())]] * 2


@some
@given(seeds, st.integers(1, 20), st.lists(st.integers(0, 6), min_size=1, max_size=5))
def test_each_pivot_takes_what_is_least_like_it(seed, n, counts):
    """Signed unit vectors: cosines are exact, and many tie, so the lower index goes first."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.eye(3)[torch.randint(3, (n + len(counts),), generator=generator)]
    x = axes * (torch.randint(2, (len(axes), 1), generator=generator) * 2 - 1)
    pool, pivots = x[:n], x[n:]
    left, want = list(range(n)), []
    for pivot, count in zip(pivots.tolist(), counts, strict=True):
        picks = sorted(left, key=lambda i: (cosine(pool[i], pivot), i))[:count]
        left = [i for i in left if i not in picks]
        want.append(picks)
    assert [pick.tolist() for pick in unlike(pool, pivots, counts)] == want


def test_scale_and_channel_weights():
    x, pivots = noise(0, 9, 4), noise(1, 2, 4)
    assert [p.tolist() for p in unlike(x, pivots, [3, 2])] == [p.tolist() for p in unlike(7 * x, pivots / 3, [3, 2])]


def test_what_the_release_makes_of_a_budget():
    released = dict(mode="released")
    assert [DART(keep=k, **released).requested(576) for k in (128, 64, 192, 3)] == [132, 68, 196, 4]
    assert [DART(keep=1 - r, **released).requested(576) for r in (0.778, 0.889, 2 / 3, 0.667)] == [124, 60, 196, 188]
    assert DART(keep=1.0, **released).requested(576) == 576


def test_a_batch_is_its_rows(family):
    check_a_batch_is_its_rows(tiny(family), LONG_ROWS, DART(keep=9, mode="released"))
