"""HoloV against plain loops, and its two modes in models."""

import torch
from checks import kept_of
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, Picture, batch, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny

import vlmslim
from vlmslim.methods.holov import HoloV, chunk_sizes, chunks_of, quotas, released_weights, scaled_variance


def plain(attention: list[float], chunks: int, k: int) -> list[int]:
    """The kept tokens, chunk by chunk in plain loops."""
    n, parts, start = len(attention), [], 0
    for i in range(chunks):
        size = n // chunks + (1 if i < n % chunks else 0)
        if size:
            parts.append(list(range(start, start + size)))
        start += size
    means = [sum(attention[i] for i in part) / len(part) for part in parts]
    quota = [int(k * mean / sum(means)) for mean in means]
    by_mean = sorted(range(len(parts)), key=lambda c: (-means[c], c))
    for c in by_mean[: k - sum(quota)]:
        quota[c] += 1
    while True:
        quota = [min(q, len(part)) for q, part in zip(quota, parts, strict=True)]
        room = [c for c in by_mean if quota[c] < len(parts[c])]
        if sum(quota) == k:
            break
        for c in room[: k - sum(quota)]:
            quota[c] += 1
    kept = [i for part, q in zip(parts, quota, strict=True) for i in sorted(part, key=lambda i: (-attention[i], i))[:q]]
    return sorted(kept)


@some
@given(seeds, st.integers(1, 40), st.integers(1, 9), st.data())
def test_it_is_the_rule_by_chunks(seed, n, chunks, data):
    """Some chunks have nearly all the attention, so that quotas overflow."""
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    attention = torch.randint(1, 5, (2, n), generator=generator).float() / 16
    attention *= 64.0 ** torch.randint(0, 2, (2, chunks), generator=generator)[:, chunks_of(chunk_sizes(n, chunks))]
    got = HoloV(keep=k, chunks=chunks).search(k, (), torch.zeros(2, n, 3), attention)
    for i in range(2):
        assert got[i].sort().values.tolist() == plain(attention[i].tolist(), chunks, k)


def test_the_variance_of_similarities_does_not_weigh():
    x, attention, sizes = noise(0, 30, 6), noise(1, 30).exp(), chunk_sizes(30, 4)
    scaled, total = scaled_variance(x, attention, sizes), released_weights(x, attention, sizes)
    for c in range(4):
        own = (chunks_of(sizes) == c).nonzero()[:, 0].tolist()
        variance = []
        for i in own:
            like = [0.0 if i == j else cosine(x[i], x[j]) for j in own]
            mean = sum(like) / (len(own) - 1)
            variance.append(sum((s - mean) ** 2 for s in like) / (len(own) - 1))
        a = 1000 * attention[own]
        gamma = float(a.mean()) / (sum(variance) / len(own) + 1e-6)
        torch.testing.assert_close(scaled[own], gamma * torch.tensor(variance), rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(total[c], 1.09 * a.mean(), rtol=1e-4, atol=0)
    assert quotas(total, 11).tolist() == quotas(1000 * total, 11).tolist()


@torch.no_grad()
def test_what_a_full_chunk_cannot_take():
    """Released, it becomes zero vectors; corrected, other chunks take it."""
    model, row = tiny("llava"), [BOS, Picture(1), *words(0, 4)]

    class Hot(HoloV):
        def scores(self, image):
            return torch.cat([torch.full((4,), 100.0), torch.arange(12.0)]).to(image.features)

    _, _, ((_, result),), _ = kept_of(model, row, Hot, keep=8, chunks=4)
    assert result.index.tolist() == plain([100.0] * 4 + list(range(12)), 4, 8)
    _, _, ((image, result),), _ = kept_of(model, row, Hot, keep=8, chunks=4, mode="released")
    zero = (result.features == 0).all(1)
    assert len(result) == 8 and zero[-1] and not zero[:4].any()
    assert torch.equal(result.features[:4], image.features[:4])


@torch.no_grad()
def test_tokens_enter_in_reading_order_and_released_by_attention():
    model, found = tiny("next"), {}
    for mode in ("corrected", "released"):
        method, seen = watched(HoloV, keep=30, mode=mode, newline="drop")
        with vlmslim.patch(model, method):
            model(**batch(model, LONG_ROWS))
        found[mode] = seen
    for (image, corrected), (_, released) in zip(found["corrected"], found["released"], strict=True):
        assert (corrected.index.diff() > 0).all() and len(corrected.index) == 30
        assert (image.grid[corrected.index, 0] >= 0).all()
        real = released.features[(released.features != 0).any(1)]
        found_at = (real[:, None] == image.features).all(-1)
        assert found_at.any(1).all()
        assert not (found_at.byte().argmax(1).diff() > 0).all(), "released tokens follow attention within a chunk"


def test_rectified_tokens_are_means_at_their_medians():
    """Against plain loops: half is selected, the others join the anchor most like them."""
    model, row = tiny("llava"), [BOS, Picture(1), *words(0, 4)]
    with torch.no_grad():
        options = dict(keep=7, chunks=4, rectify=True, positions="original")
        _, _, ((image, result),), _ = kept_of(model, row, HoloV, **options)
        _, _, ((_, half),), _ = kept_of(model, row, HoloV, keep=3, chunks=4)
    x, kept = image.features, half.index.tolist()
    rest = [i for i in range(16) if i not in kept]
    total = {i: sum(cosine(x[i], x[j]) for j in rest) for i in rest}
    score = {}
    for i in rest:
        lower = [cosine(x[i], x[j]) for j in rest if total[j] < total[i]]
        score[i] = total[i] * (1 - (max(lower) if lower else 0))
    anchors = sorted(rest, key=lambda i: -score[i])[:4]
    groups = {a: [] for a in anchors}
    for i in rest:
        groups[i if i in anchors else max(anchors, key=lambda a: cosine(x[i], x[a]))].append(i)
    want = {i: x[i] for i in kept} | {own[(len(own) - 1) // 2]: x[own].mean(0) for own in groups.values()}
    assert result.index.tolist() == sorted(want)
    torch.testing.assert_close(result.features, torch.stack([want[i] for i in sorted(want)]))
