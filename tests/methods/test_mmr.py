"""MMR against plain loops in float64."""

import pytest
import torch
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, batch
from strategies import cosine, noise, seeds, some, tied_tokens
from tiny import tiny

import vlmslim
from vlmslim.methods.mmr import MMR, marginal_relevance, scaled


def plain(x: list, importance: list[float], k: int, weight: float, at_once: int) -> list[int]:
    """The same rule, written down token by token."""
    chosen: list[int] = []
    while len(chosen) < k:
        score = {}
        for i in (i for i in range(len(x)) if i not in chosen):
            nearest = max((cosine(x[i], x[j]) for j in chosen), default=None)
            score[i] = importance[i] if nearest is None else weight * importance[i] - (1 - weight) * nearest
        chosen += sorted(score, key=lambda i: (-score[i], i))[: min(at_once, k - len(chosen))]
    return chosen


@some
@given(seeds, st.integers(1, 20), st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(1, 3), st.data())
def test_it_is_the_greedy_rule(seed, n, weight, at_once, data):
    k = data.draw(st.integers(1, n))
    x, importance = tied_tokens(seed, n, 4)
    x = x * torch.randint(1, 3, (2, n, 1)) * 2.0
    got = marginal_relevance(x, importance, k, weight, at_once).tolist()
    for i in range(2):
        assert got[i] == plain(x[i].tolist(), importance[i].tolist(), k, weight, at_once)


def test_one_weight_alone():
    x, importance = noise(0, 1, 30, 8), noise(1, 1, 30).exp()
    top = importance[0].argsort(descending=True, stable=True)
    assert torch.equal(marginal_relevance(x, importance, 9, 1.0)[0], top[:9])
    assert marginal_relevance(x, importance, 30)[0].sort().values.tolist() == list(range(30))
    want = plain(x[0].tolist(), importance[0].tolist(), 9, 0.0, 1)
    assert marginal_relevance(x, importance, 9, 0.0)[0].tolist() == want and want[0] == top[0]


def test_scales():
    score, group = torch.tensor([1.0, 5.0, 3.0, 40.0, 20.0]), torch.tensor([0, 0, 0, 2, 2])
    torch.testing.assert_close(scaled(score, group), torch.tensor([0, 1, 0.5, 1, 0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(scaled(score, group, "rank"), torch.tensor([0, 2 / 3, 1 / 3, 1 / 2, 0]))
    log = scaled(score, group, "log")
    torch.testing.assert_close(log[2], torch.tensor(3.0).log() / torch.tensor(5.0).log(), atol=1e-5, rtol=0)
    zero = torch.zeros(5, dtype=torch.long)
    torch.testing.assert_close(scaled(3 * score + 7, zero), scaled(score, zero), atol=1e-6, rtol=0)


@torch.no_grad()
def test_importance_is_the_attention_from_cls_of_the_layer_that_llava_reads():
    """With weight 1 the kept tokens are those of highest attention, by the tower's own maps, or of largest norm."""
    model = tiny("llava", "eager")
    for options in ({}, {"score": "norm"}):
        method, seen = watched(MMR, keep=5, weight=1.0, **options)
        with vlmslim.patch(model, method):
            model(**batch(model, LONG_ROWS))
        for image, result in seen:
            maps = model.model.vision_tower(image.pixels, output_attentions=True).attentions[-2][0, :, 0, 1:]
            want = image.tower[0].norm(dim=-1) if options else maps.mean(0)
            assert result.index.tolist() == want.topk(5).indices.sort().values.tolist()


@torch.no_grad()
def test_towers_without_cls_read_the_attention_that_patches_receive():
    model = tiny("siglip", "eager")
    with pytest.raises(ValueError, match="score='received'"):
        vlmslim.patch(model, "mmr", score="cls")
    method, seen = watched(MMR, keep=5, weight=1.0)
    with vlmslim.patch(model, method):
        model(**batch(model, LONG_ROWS))
    for image, result in seen:
        maps = model.model.vision_tower(image.pixels, output_attentions=True).attentions[-2][0]
        assert result.index.tolist() == maps.mean((0, 1)).topk(5).indices.sort().values.tolist()
