"""SCOPE against plain loops, and its views in models."""

import pytest
import torch
from checks import VIEWS, cls_attention, kept_of, views
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import Picture, batch, words
from strategies import cosine, noise, seeds, some, tied_tokens
from tiny import BOS, tiny

import vlmslim
from vlmslim.methods.scope import SCOPE, salient_coverage


def plain(x: list, saliency: list[float], k: int, alpha: float, combine: str) -> list[int]:
    """The same rule, patch by patch."""
    chosen: list[int] = []

    def covered(u: int, by: list[int]) -> float:
        return max([0.0, *(cosine(x[u], x[v]) for v in by)])

    while len(chosen) < k:
        score = {}
        for v in (v for v in range(len(x)) if v not in chosen):
            gain = sum(covered(u, [*chosen, v]) - covered(u, chosen) for u in range(len(x)))
            score[v] = gain * saliency[v] ** alpha if combine == "multiply" else gain + saliency[v] ** alpha
        chosen.append(min(score, key=lambda v: (-score[v], v)))
    return chosen


@some
@given(seeds, st.integers(1, 12), st.sampled_from([0.0, 1.0, 2.0]), st.sampled_from(["multiply", "add"]), st.data())
def test_it_is_the_greedy_rule(seed, n, alpha, combine, data):
    k = data.draw(st.integers(1, n))
    x, saliency = tied_tokens(seed, n, 4)
    got = salient_coverage(x, saliency, k, alpha, combine).tolist()
    for i in range(2):
        assert got[i] == plain(x[i].tolist(), saliency[i].tolist(), k, alpha, combine)


def test_scales_change_nothing_and_small_budgets_are_prefixes():
    x, saliency = noise(0, 1, 40, 8), noise(1, 1, 40).exp()
    order = salient_coverage(x, saliency, 40)
    assert order[0].sort().values.tolist() == list(range(40))
    assert torch.equal(salient_coverage(x * 4.0, saliency * 8.0, 9), order[:, :9])
    x[0, 3] = 0  # a zero patch is like no other, and is not NaN
    assert salient_coverage(x, saliency, 40)[0].tolist().index(3) >= 30


@pytest.mark.parametrize("mode", ["corrected", "released"])
@torch.no_grad()
def test_views_are_searched_by_themselves(mode):
    """Every view keeps the patches that the function picks among its own, by the tower's own attention maps."""
    model = tiny("next", "eager")
    _, _, ((image, result),), _ = kept_of(model, VIEWS, SCOPE, keep=21, newline="drop", mode=mode)
    attention = cls_attention(model, image)
    assert len(attention) == 5
    if mode == "released":  # padding and all, equal budgets rounded down, projected here
        picks = salient_coverage(image.tower, attention, 21 // 5).sort(dim=1).values
        kept = torch.cat([image.tower[i][picks[i]] for i in range(5)])
        assert len(result.features) == len(kept) == 20
        want = model.model.multi_modal_projector(kept)
        nearest = torch.cdist(result.features, want).argmin(1)
        assert nearest[:4].tolist() == [0, 1, 2, 3]
        torch.testing.assert_close(result.features, want[nearest])
        assert sorted(nearest.tolist()) == list(range(20))
        return
    assert len(result.index) == 21
    for x, paid, view in zip(image.tower, attention, views(image, result), strict=True):
        picks = salient_coverage(x[view.place][None], paid[view.place][None], len(view.own))
        assert picks[0].sort().values.tolist() == view.own
        assert abs(len(view.own) - 21 * len(view.slots) / int((image.grid[:, 0] >= 0).sum())) < 1


@torch.no_grad()
def test_an_image_alone_is_released_like_corrected():
    """On LLaVA-1.5 both modes keep the same tokens, and so do the sum and the mean over heads unless they are added."""
    model, found = tiny("llava"), {}
    for options in (dict(), dict(mode="released"), dict(features="projected"), dict(combine="add", alpha=0.01)):
        method, seen = watched(SCOPE, keep=6, **options)
        with vlmslim.patch(model, method):
            model(**batch(model, [[BOS, Picture(1), *words(0, 4)]]))
        found[str(options)] = seen[0][1].index.tolist()
    assert found["{}"] == found["{'mode': 'released'}"]
    assert len({str(index) for index in found.values()}) > 1


def test_the_release_has_no_onevision():
    with pytest.raises(ValueError, match="Onevision.*use mode='corrected'"):
        vlmslim.patch(tiny("onevision"), "scope", mode="released")
