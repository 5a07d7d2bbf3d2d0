"""AgilePruner against plain loops, and its budgets in models."""

import torch
from checks import VIEWS, cls_attention, kept_of, views
from hypothesis import given
from hypothesis import strategies as st
from strategies import cosine, noise, seeds, some, tied_tokens
from tiny import tiny

from vlmslim.methods.agilepruner import AgilePruner, walk
from vlmslim.ops.effective_rank import effective_rank


def plain(x: list, attention: list[float], k: int, reach: list[float]) -> list[int]:
    """The same rule with lists; `reach` is by place."""
    ranking = sorted(range(len(x)), key=lambda i: (-attention[i], i))
    taken: list[int] = []
    struck: list[int] = []
    for place, i in enumerate(ranking):
        if len(taken) < k and i not in struck:
            taken.append(i)
            struck += [
                j for j in ranking if j not in taken and j not in struck and 1 - cosine(x[i], x[j]) < reach[place]
            ]
    return taken + [i for i in ranking if i in struck and i not in taken][: k - len(taken)]


@some
@given(seeds, st.integers(1, 20), st.sampled_from([0.0, 0.05, 0.3, 1.0]), st.sampled_from([0.0, 0.7, 1.5]), st.data())
def test_it_is_the_rule_with_lists(seed, n, slope, limit, data):
    """Distances are 0, 1 or 2."""
    k = data.draw(st.integers(1, n))
    x, attention = tied_tokens(seed, n, 6, low=1)
    got = walk(x, attention, k, torch.full((2,), slope), torch.full((2,), limit)).tolist()
    reach = [min((p + 1) * slope, limit) for p in range(n)]
    for i in range(2):
        assert len(set(got[i])) == k
        assert got[i] == plain(x[i].tolist(), attention[i].tolist(), k, reach)


def test_no_distance_is_attention_alone():
    x, attention = noise(0, 1, 40, 8), noise(1, 1, 40).exp()
    top = attention.topk(9).indices
    for options in (dict(slope=0.0), dict(threshold=0.0), dict(limit=0.0)):
        assert torch.equal(AgilePruner(keep=9, **options).search(9, (), x, attention), top)
    far = AgilePruner(keep=9, threshold=0.9).search(9, (), x, attention)
    want = plain(x[0].tolist(), attention[0].tolist(), 9, [0.9] * 40)
    assert far[0].tolist() == want != top[0].tolist()


@torch.no_grad()
def test_views_walk_by_themselves():
    model = tiny("next", "eager")
    _, _, ((image, result),), _ = kept_of(model, VIEWS, AgilePruner, keep=21, newline="drop", average=5.0, slope=0.1)
    for attention, view in zip(cls_attention(model, image), views(image, result), strict=True):
        x = image.features[view.slots]
        step = effective_rank(x[None]).item() / 5 * 0.1
        reach = [min((p + 1) * step, 0.25) for p in range(len(x))]
        assert sorted(plain(x.tolist(), attention[view.place].tolist(), len(view.own), reach)) == view.own
