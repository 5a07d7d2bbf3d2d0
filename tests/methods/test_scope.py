"""SCOPE against plain loops, and its views in models."""

import pytest
import torch
from checks import kept_of
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import Picture, batch, words
from strategies import cosine, noise, seeds, some
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
    """Signed unit vectors and saliencies in quarters: every score is exact, and many tie."""
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    x = torch.eye(4)[torch.randint(4, (2, n), generator=generator)]
    x = x * (torch.randint(2, (2, n, 1), generator=generator) * 2 - 1)
    saliency = torch.randint(0, 4, (2, n), generator=generator) / 4
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
    row = [BOS, Picture(1, (60, 60)), *words(0, 4)]
    _, _, ((image, result),), _ = kept_of(model, row, SCOPE, keep=21, newline="drop", mode=mode)
    attention = model.model.vision_tower(image.pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].sum(1)
    views = len(image.pixels)
    assert views == 5
    if mode == "released":  # padding and all, equal budgets rounded down, projected here
        picks = salient_coverage(image.tower, attention, 21 // views).sort(dim=1).values
        kept = torch.cat([image.tower[i][picks[i]] for i in range(views)])
        assert len(result.features) == len(kept) == 20
        want = model.model.multi_modal_projector(kept)
        nearest = torch.cdist(result.features, want).argmin(1)
        assert nearest[:4].tolist() == [0, 1, 2, 3]
        torch.testing.assert_close(result.features, want[nearest])
        assert sorted(nearest.tolist()) == list(range(20))
        return
    assert len(result.index) == 21
    for view in range(views):
        slots = (image.grid[:, 0] == view).nonzero()[:, 0]
        own = (result.index[:, None] == slots).any(0).nonzero()[:, 0]
        place = image.grid[slots, 1] * 4 + image.grid[slots, 2]
        picks = salient_coverage(image.tower[view][place][None], attention[view][place][None], len(own))
        assert picks[0].sort().values.tolist() == own.tolist()
        assert abs(len(own) - 21 * len(slots) / int((image.grid[:, 0] >= 0).sum())) < 1


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
