"""VisPruner against plain loops, and its views in models."""

import torch
from checks import VIEWS, cls_attention, kept_of, views
from hypothesis import given
from hypothesis import strategies as st
from strategies import cosine, noise, seeds, some
from tiny import tiny

from vlmslim.methods.vispruner import VisPruner


def plain(x: list, attention: list[float], k: int, important: float, step: int, raster: bool) -> list[int]:
    """The same rule with lists."""
    order = sorted(range(len(x)), key=lambda i: (-attention[i], i))
    first = int(k * important)
    kept, left, diverse = order[:first], order[first:], k - first
    while diverse and len(left) > diverse:
        left = sorted(left) if raster else left
        even, odd = left[::2], left[1::2]
        drop = min(step, len(left) - diverse, len(even))
        score = [max(cosine(x[i], x[j]) for j in odd) for i in even]
        by_score = sorted(range(len(even)), key=lambda place: (-score[place], place))
        left = [even[place] for place in by_score[drop:]] + odd
    return kept + left[:diverse]


@some
@given(seeds, st.integers(1, 24), st.sampled_from([0.0, 0.5, 0.75, 1.0]), st.integers(1, 9), st.booleans(), st.data())
def test_it_is_the_rule_by_rounds(seed, n, important, step, raster, data):
    """Signed unit vectors and attention in quarters: every score is exact, and many tie."""
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    x = torch.eye(6)[torch.randint(6, (2, n), generator=generator)]
    x = x * (torch.randint(2, (2, n, 1), generator=generator) * 2 - 1)
    attention = torch.randint(1, 5, (2, n), generator=generator) / 4
    method = VisPruner(keep=k, important=important, step=step, rest="raster" if raster else "attention")
    got = method.search(k, (), x, attention).tolist()
    for i in range(2):
        assert len(set(got[i])) == k
        assert got[i] == plain(x[i].tolist(), attention[i].tolist(), k, important, step, raster)


def test_fastervlm_is_attention_alone():
    x, attention = noise(0, 1, 40, 8), noise(1, 1, 40).exp()
    assert torch.equal(VisPruner(keep=9, important=1.0).search(9, (), x, attention), attention.topk(9).indices)


@torch.no_grad()
def test_views_are_pruned_by_themselves():
    model = tiny("next", "eager")
    _, _, ((image, result),), _ = kept_of(model, VIEWS, VisPruner, keep=21, newline="drop", step=2)
    for x, attention, view in zip(image.tower, cls_attention(model, image), views(image, result), strict=True):
        given = x[view.place].tolist(), attention[view.place].tolist()
        assert sorted(plain(*given, len(view.own), 0.5, 2, False)) == view.own
