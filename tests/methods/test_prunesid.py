"""PruneSID against plain loops, and its two modes in models."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from checks import VIEWS, cls_attention, kept_of, views
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, Picture, batch, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny

import vlmslim
from vlmslim.methods.prunesid import PruneSID, choose
from vlmslim.ops.components import loadings


def plain(x: list, weight: list, score: list[float], k: int, cls: bool = False) -> list[int]:
    """The same rule with lists. cls: CLS takes one of the k, and patches of score 0 count as suppressed."""
    n, groups = len(x), len(weight[0])
    pairs = [cosine(x[i], x[j]) for i in range(n) for j in range(i)]
    threshold = k / 32 * sum(pairs) / max(1, len(pairs))
    ranked, alive = [], []
    for g in range(groups):
        members = [i for i in range(n) if max(range(groups), key=lambda c: (weight[i][c], -c)) == g]
        taken: list[int] = []
        for i in sorted(members, key=lambda i: (-score[i], i)):
            if all(cosine(x[i], x[j]) <= threshold for j in taken) and (score[i] > 0 or not cls):
                taken.append(i)
        rest = sorted((i for i in members if i not in taken), key=lambda i: (-score[i], i))
        ranked.append(taken + rest)
        alive.append(len(taken))
    upper = [min(5 * math.ceil(k / 64), a) for a in alive]
    while sum(upper) < min(k, n):
        upper = [min(u + 1, len(r)) for u, r in zip(upper, ranked, strict=True)]
    lower = [min(1, len(r)) for r in ranked]
    k, done, quota = k - cls, 0, []
    other = max(0, k - sum(lower))
    for g in range(groups):
        before = round(Fraction(other * done, sum(alive) or 1))
        done += alive[g]
        quota.append(min(lower[g] + round(Fraction(other * done, sum(alive) or 1)) - before, upper[g]))
    for g in sorted(range(groups), key=lambda g: -alive[g]):
        while quota[g] < upper[g] and sum(quota) < k:
            quota[g] += 1
    return [i for r, q in zip(ranked, quota, strict=True) for i in r[:q]]


@some
@given(seeds, st.integers(1, 24), st.integers(1, 6), st.booleans(), st.data())
def test_it_is_the_rule_with_lists(seed, n, q, cls, data):
    """Unit vectors with copies; loadings and scores in quarters, so that many tie and some are 0."""
    k = data.draw(st.integers(min(q, n), n)) + cls
    generator = torch.Generator().manual_seed(seed)
    x = torch.eye(5)[torch.randint(5, (n,), generator=generator)]
    weight = torch.randint(0, 9, (n, q), generator=generator) / 8
    score = torch.randint(0, 5, (n,), generator=generator) / 4
    got = choose(x, weight, score, k, cls).tolist()
    assert len(got) == k - cls == len(set(got))
    assert got == plain(x.tolist(), weight.tolist(), score.tolist(), k, cls)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_loadings_are_those_of_the_principal_components(shape):
    x = noise(0, *shape)
    sample = x.double().numpy()
    want = np.abs(np.linalg.svd((sample - sample.mean(1, keepdims=True)).T)[2][:4].T)
    np.testing.assert_allclose(loadings(x, 4).numpy(), want, atol=1e-5)
    half = loadings(x.bfloat16(), 4, noise(1, 12, 4).double())
    assert half.shape == (shape[0], 4) and half.dtype == torch.float32


def test_a_start_in_the_right_space_gives_the_exact_components():
    x = noise(0, 12, 30)
    start = torch.linalg.svd((x - x.mean(1, keepdim=True)).T)[2][:4].T
    torch.testing.assert_close(loadings(x, 4, start), loadings(x, 4), rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_views_are_searched_by_themselves():
    model = tiny("next", "eager")
    _, _, ((image, result),), _ = kept_of(model, VIEWS, PruneSID, keep=31, newline="drop")
    for x, attention, view in zip(image.tower, cls_attention(model, image), views(image, result), strict=True):
        given, own = x[view.place], view.own
        weight = loadings(given.sigmoid(), max(1, len(own) // 4))
        assert sorted(plain(given.tolist(), weight.tolist(), attention[view.place].tolist(), len(own))) == own


@torch.no_grad()
def test_released_sends_cls_first_and_repeats_with_its_seed():
    model = tiny("llava", "eager")
    found = {}
    for name, seed in (("a", 0), ("again", 0), ("b", 1)):
        method, seen = watched(PruneSID, keep=8, mode="released", seed=seed)
        with vlmslim.patch(model, method):
            model(**batch(model, LONG_ROWS))
        found[name] = [result.features for _, result in seen]
    image = seen[0][0]
    state = model.model.vision_tower(image.pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(found["a"][0][0], model.model.multi_modal_projector(state[:, :1])[0, 0])
    assert all(len(x) == 8 for x in found["a"])
    assert all(torch.equal(x, y) for x, y in zip(found["a"], found["again"], strict=True))
    assert not all(torch.equal(x, y) for x, y in zip(found["a"], found["b"], strict=True))


@torch.no_grad()
def test_towers_without_cls_score_by_the_loading():
    model = tiny("siglip")
    with pytest.raises(ValueError, match="score='loading'"):
        vlmslim.patch(model, "prunesid", mode="released")
    _, _, ((image, result),), _ = kept_of(model, [BOS, Picture(1), *words(0, 4)], PruneSID, keep=8)
    weight = loadings(image.tower[0].sigmoid(), 2)
    want = plain(image.tower[0].tolist(), weight.tolist(), weight.amax(1).tolist(), 8)
    assert result.index.tolist() == sorted(want)


def test_a_score_that_is_not_known():
    with pytest.raises(ValueError, match="'loading'"):
        vlmslim.method("prunesid", score="received")
