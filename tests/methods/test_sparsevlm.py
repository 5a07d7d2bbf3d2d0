"""SparseVLM against plain loops, on attention and embeddings of an unpatched model."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from by_hand import ByHand
from checks import check_a_batch_is_its_rows
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, SEVERAL, Picture, batch, words
from strategies import noise, seeds, some
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim.methods.sparsevlm import SparseVLM, clusters, guided_score, rotary_gravity, visual_words
from vlmslim.ops.density_peaks import density_peaks


def plain_raters(x: np.ndarray, words: np.ndarray) -> list[int]:
    mass = [0.0] * len(words)
    for token in x:
        z = [float(token @ word) for word in words]
        e = [math.exp(v - max(z)) for v in z]
        mass = [m + v / sum(e) / len(x) for m, v in zip(mass, e, strict=True)]
    found = [i for i, m in enumerate(mass) if m > 1 / len(words) + 1e-12]
    return found or list(range(len(words)))


def plain_score(paid: np.ndarray, gravity: np.ndarray | None, heads: int | None) -> list[float]:
    """paid (heads, raters, visual)."""
    gravity = np.ones(paid.shape[1:]) if gravity is None else gravity
    by_head = [[[a / w for a, w in zip(*row, strict=True)] for row in zip(head, gravity, strict=True)] for head in paid]
    order = sorted(range(len(by_head)), key=lambda h: (-sum(map(sum, by_head[h])), h))[: heads or len(by_head)]
    count = len(order) * len(paid[0])
    return [sum(by_head[h][i][j] for h in order for i in range(len(paid[0]))) / count for j in range(len(paid[0][0]))]


def plain_clusters(x: np.ndarray, amount: int) -> tuple[list[int], list[int]]:
    far = [[math.dist(a, b) / math.sqrt(len(a)) for b in x] for a in x]
    rho = [math.exp(-sum(d * d for d in sorted(row)[:amount]) / amount) for row in far]
    top = max(map(max, far))
    delta = [min((far[i][j] for j in range(len(x)) if rho[j] > rho[i]), default=top) for i in range(len(x))]
    centres = sorted(range(len(x)), key=lambda i: (-rho[i] * delta[i], i))[:amount]
    group = [min(range(amount), key=lambda c: (far[i][centres[c]], c)) for i in range(len(x))]
    for number, centre in enumerate(centres):
        group[centre] = number
    return centres, group


@some
@given(seeds, st.integers(1, 9), st.integers(1, 9))
def test_raters_are_the_words_that_look_visual(seed, n, t):
    x, text = noise(seed, n, 5), noise(seed + 1, t, 5)
    got = visual_words(x, text).nonzero()[:, 0].tolist()
    assert got == plain_raters(x.double().numpy(), text.double().numpy())


@some
@given(seeds, st.integers(1, 6), st.integers(1, 4), st.integers(1, 7), st.booleans(), st.data())
def test_the_score_of_raters(seed, heads, raters, n, divided, data):
    paid, gravity = noise(seed, heads, raters, n).exp(), noise(seed + 1, raters, n).abs() + 0.1
    best = data.draw(st.sampled_from([None, *range(1, heads + 1)]))
    got = guided_score(paid / gravity if divided else paid, torch.ones(raters, dtype=torch.bool), best)
    want = plain_score(paid.double().numpy(), gravity.double().numpy() if divided else None, best)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4)


def test_gravity_is_exact_also_where_it_crosses_zero():
    """With the positions of LLaVA-1.5 it does so at a distance of 1707."""
    frequency = 10000.0 ** -(torch.arange(64).double() / 64)
    gaps = torch.arange(1700, 1712)
    angle = torch.cat([torch.zeros(1), gaps])[:, None] * torch.cat([frequency, frequency])
    keys = torch.zeros(1, 1, len(angle), 128)
    tokens = SimpleNamespace(rotary=(angle.cos().float()[None], angle.sin().float()[None]), keys=keys)
    got = rotary_gravity(tokens, 0, torch.tensor([0]), torch.arange(1, len(angle)))[0]
    want = [2 / 128**0.5 * sum(math.cos(gap * f) for f in frequency.tolist()) for gap in gaps.tolist()]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-4)
    assert gaps[got < 0].min() == 1707


@some
@given(seeds, st.integers(1, 40))
def test_clusters_by_density_peaks(seed, dropped):
    of, amount = clusters(dropped)
    assert (of, amount) == (math.floor(0.3 * dropped) + 1, (math.floor(0.3 * dropped) + 1) // 10 + 1)
    x = noise(seed, of, 6)
    means, centres, group = density_peaks(x, amount)
    want_centres, want_group = plain_clusters(x.double().numpy(), amount)
    if amount != 2:  # of two neighbours the densities are equal, and rounding decides
        assert (centres.tolist(), group.tolist()) == (want_centres, want_group)
    for number in range(amount):
        close(means[number], x[group == number].mean(0), 1e-5)


def test_equal_densities_go_to_the_lower_index():
    x = torch.eye(12).repeat_interleave(2, 0)[:20]
    _, centres, group = density_peaks(x, 3)
    assert centres.tolist() == [0, 1, 2] and group[:3].tolist() == [0, 1, 2]


def by_rule(family: str, row: list, version: str, counts, layers=(1, 2, 3), heads: float = 14 / 32) -> ByHand:
    """The whole rule by hand: attention of the layer before, positions as the version has them, merging at centres."""
    hand = ByHand(family, row)
    embeds, ids = hand.x.clone(), hand.inputs["input_ids"][0]
    everywhere = torch.cat(hand.images)
    own = [embeds[place].double().numpy() for place in hand.images]
    ends = [int(place[-1]) for place in hand.images]
    hand.run(0)
    for layer in range(1, DEPTH):
        if layer in layers:
            stays, states = [], hand.x.clone()
            for i, place in enumerate(hand.images):
                after = [j for j in range(ends[i] + 1, len(ids)) if j not in everywhere.tolist()]
                raters = [int(hand.origin[-1])]  # without text after the image, the last token that is left
                if after:
                    raters = [after[j] for j in plain_raters(own[i], embeds[after].double().numpy())]
                rows, columns = (torch.searchsorted(hand.origin, torch.tensor(x)) for x in (raters, place.tolist()))
                paid = hand.maps[layer - 1][:, rows][:, :, columns].double().numpy()
                gravity = None
                if version == "2.0":
                    gap = (hand.position[rows][:, None] - hand.position[columns]).double()
                    frequency = hand.lm.rotary_emb.inv_freq.double()
                    gravity = (2 * (gap[..., None] * frequency).cos().sum(-1) / 8**0.5).numpy()
                    gravity = gravity if (gravity > 0).all() else None
                best = max(1, round(heads * len(paid))) if version == "2.0" else None
                score = plain_score(paid, gravity, best)
                order = sorted(range(len(place)), key=lambda j: (-score[j], j))
                k = counts[layers.index(layer)]
                stay = sorted(order[:k])
                if version != "2.0" and k < len(place):
                    of, amount = clusters(len(place) - k)
                    again = order[k : k + of]
                    centres, group = plain_clusters(hand.x[columns[again]].double().numpy(), amount)
                    for number, centre in enumerate(centres):
                        mine = [again[j] for j in range(of) if group[j] == number]
                        states[columns[again[centre]]] = hand.x[columns[mine]].mean(0)
                    stay = sorted([*stay, *(again[c] for c in centres)])
                stays.append(torch.tensor(stay))
            hand.x = states
            hand.drop(stays, closed=version != "2.0")
        hand.run(layer)
    return hand


@pytest.mark.parametrize("row", [LONG_ROWS[0], SEVERAL[0], [BOS, *words(1, 4), Picture(1)]], ids=["one", "two", "last"])
@pytest.mark.parametrize("version", ["1.5", "2.0"])
@torch.no_grad()
def test_it_is_the_rule(family, version, row):
    """Counts for which a stage does not drop 30 to 63 tokens: of two clusters rounding decides."""
    model = tiny(family)
    with vlmslim.patch(model, SparseVLM(version=version, layer=(1, 3), counts=(9, 4))) as slim:
        got = model(**batch(model, [row])).logits[0]
    hand = by_rule(family, row, version, (9, 4), (1, 3))
    last = -1 if isinstance(row[-1], Picture) else -3
    close(got[-1:] if last == -1 else got[last:], hand.logits()[last:], 5e-4)
    assert slim.receipt.last.visual[3] == [sum(map(len, hand.images))]


@torch.no_grad()
def test_recycled_tokens_count_in_the_budget_that_is_told():
    model = tiny("next")
    method = SparseVLM(version="1.5", counts=(20, 10, 5), layer=(1, 2, 3))
    with vlmslim.patch(model, method) as slim:
        model(**batch(model, [[BOS, Picture(0, (60, 60)), *words(0, 6)]]))
    (n,) = slim.receipt.last.visual[0]
    assert [x for (x,) in slim.receipt.last.visual] == [n, *method.left(n)]
    assert method.requested(n) == method.left(n)[-1] > 5


@torch.no_grad()
def test_version_1_keeps_by_rank():
    """The rank of two raters' attention is 2 at most."""
    model = tiny("llava")
    with vlmslim.patch(model, SparseVLM(version="1.0", scale=2.0, bias=1.0, layer=(1, 2), recycle=False)) as slim:
        model(**batch(model, [[BOS, Picture(0), *words(0, 2)]]))
    assert slim.receipt.last.visual[1][0] in (3, 5) and slim.receipt.summary()["requested"] is None


@pytest.mark.parametrize(
    "mode, scale, count, left", [("corrected", 0.4, 2, 1), ("released", 0.4, 2, 0), ("released", 0.2, 40, 2)]
)
@torch.no_grad()
def test_a_rank_of_few_or_of_all_tokens(mode, scale, count, left):
    """A low rank keeps nothing in the release; where the rank is the number of tokens, nothing goes."""
    model = tiny("llava")
    method = SparseVLM(version="1.0", mode=mode, scale=scale, layer=(1, 2, 3), recycle=False)
    with vlmslim.patch(model, method) as slim:
        model(**batch(model, [[BOS, Picture(0), *words(0, count)]]))
    assert [x for (x,) in slim.receipt.last.visual] == [16, left, left, left]


@torch.no_grad()
def test_the_release_prunes_the_first_image():
    model = tiny("llava")
    with vlmslim.patch(model, SparseVLM(mode="released", counts=(4, 2, 1))) as slim:
        model(**batch(model, [SEVERAL[0]]))
    assert slim.receipt.last.visual[3] == [17]


def test_prompts_without_ids_are_rated_by_all_their_text():
    model = tiny("llava")
    inputs = batch(model, [LONG_ROWS[0]])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad(), vlmslim.patch(model, SparseVLM(keep=4)) as slim:
        model(inputs_embeds=embeds, pixel_values=inputs["pixel_values"], attention_mask=inputs["attention_mask"])
    assert slim.receipt.last.visual[3] == [4]


@pytest.mark.parametrize("version", ["1.5", "2.0"])
def test_a_batch_is_its_rows(family, version):
    check_a_batch_is_its_rows(tiny(family), LONG_ROWS, SparseVLM(keep=4, version=version))


def test_counts():
    assert SparseVLM().kept(576) == [66, 34, 20] and SparseVLM(version="1.5").kept(576) == [66, 30, 17]
    assert SparseVLM(counts=(300, 200, 118)).kept(576) == [300, 200, 118]
    assert SparseVLM(counts=(300, 200, 118), keep=59).kept(576) == [150, 100, 59]
    assert SparseVLM(keep=1.0).kept(20) == [20, 20, 20]
    seen = SparseVLM(version="1.5").visual_tokens(576, 32)
    assert (seen[2], seen[3], seen[7], seen[16]) == (576, 82, 32, 18)
