"""ATP-LLaVA's maths against loops in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import some

from vlmslim.methods import atp
from vlmslim.methods.atp import ATP, layer_index, losses
from vlmslim.methods.atp.score_maps import attention_from_image_and_text, normalise

seeds = st.integers(0, 10_000)


def attention_by_hand(full, image, text):
    """(B, H, S, S), (B, S), (B, S) -> the two sums for each token."""
    rows, heads, size, _ = full.shape
    own, cross = np.zeros((rows, size)), np.zeros((rows, size))
    for b in range(rows):
        for key in range(size):
            if not image[b, key]:
                continue
            for query in range(size):
                paid = sum(full[b, h, query, key] for h in range(heads)) / heads
                if image[b, query] == image[b, key]:
                    own[b, key] += paid
                elif text[b, query]:
                    cross[b, key] += paid
    return own, cross


@some
@given(seeds, st.integers(1, 9), st.booleans())
def test_received_attention_is_that_of_a_loop(seed, chunk, blind):
    rng = np.random.default_rng(seed)
    full = rng.dirichlet(np.ones(9), (2, 3, 9))
    kind = rng.integers(0, 2 if blind else 4, (2, 9))  # 0 padding, 1 text, 2 and 3 two images
    image, text = np.where(kind > 1, kind - 1, 0), kind == 1
    asked = []

    def attend(rows):
        asked.append(rows.shape[1])
        return torch.from_numpy(full).float().gather(2, rows[:, None, :, None].expand(-1, 3, -1, 9))

    got = attention_from_image_and_text(attend, torch.from_numpy(image), torch.from_numpy(text), chunk)
    for a, b in zip(got, attention_by_hand(full, image, text), strict=True):
        np.testing.assert_allclose(a.numpy(), b, atol=1e-5)
    assert max(asked, default=0) <= chunk


@some
@given(seeds, st.integers(1, 12))
def test_masks_are_those_of_a_loop(seed, n):
    rng = np.random.default_rng(seed)
    score, alive = rng.random((2, n)).round(2), rng.random((2, n)) < 0.7
    spatial, theta_r, theta_s = rng.choice([0, 0.25, 0.75], n), rng.random(2), rng.random(2)
    tensors = [torch.from_numpy(x) for x in (score, spatial, theta_r, theta_s)]
    flat = normalise(tensors[0], torch.from_numpy(alive))
    soft, hard = atp.soft_mask(*tensors, 10.0), atp.hard_mask(*tensors)
    strong = atp.top_k_alive(tensors[0], torch.from_numpy(alive), 2)
    for b in range(2):
        values = [score[b, i] for i in range(n) if alive[b, i]]
        best = sorted((i for i in range(n) if alive[b, i]), key=lambda i: (-score[b, i], i))[:2]
        for i in range(n):
            spread = max(values) - min(values) if values else 0
            want = (score[b, i] - min(values)) / spread if alive[b, i] and spread else 0
            assert math.isclose(flat[b, i], want, abs_tol=1e-5)
            parts = [1 / (1 + math.exp(-10 * x)) for x in (score[b, i] - theta_r[b], spatial[i] - theta_s[b])]
            assert math.isclose(soft[b, i], max(parts), rel_tol=1e-9)
            assert hard[b, i] == (score[b, i] > theta_r[b] or spatial[i] > theta_s[b])
            assert strong[b, i] == (i in best)


@pytest.mark.parametrize(("side", "strides"), [(24, (2, 3, 4, 6, 8, 12)), (12, (6, 2)), (5, (2, 3)), (4, ())])
def test_a_patch_scores_by_its_coarsest_grid(side, strides):
    score = atp.spatial_score(side, strides).view(side, side)
    for row in range(side):
        for column in range(side):
            grids = [1 - 3 / s**2 for s in strides if row % s == 0 and column % s == 0]
            assert math.isclose(score[row, column], max(grids, default=0), rel_tol=1e-6)
    if strides == (2, 3, 4, 6, 8, 12):
        assert int((score > 0).sum()) == 192  # strides 2 and 3 are not nested
        assert int((score > 0.95).sum()) == 12  # strides 8 and 12 share the corner


@some
@given(seeds)
def test_losses_are_those_of_a_loop(seed):
    rng = np.random.default_rng(seed)
    counts, layers, full, depth = rng.random((3, 2)) * 16, (1, 4), 16, 8
    got = torch.from_numpy(counts)
    want = sum(np.mean(counts[:, m]) / full * layer for m, layer in enumerate(layers))
    assert math.isclose(losses.depth_loss(got, layers, full), want)
    seen = [[full if i <= 1 else row[0] if i <= 4 else row[1] for i in range(depth)] for row in counts]
    everywhere = losses.mean_tokens(got, layers, full, depth)
    np.testing.assert_allclose(everywhere, np.mean(seen, axis=1))
    assert math.isclose(losses.target_loss(everywhere, 5), abs(np.mean(seen) - 5))
    assert math.isclose(losses.target_loss(losses.mean_tokens(got, layers, full), 5), abs(np.mean(counts) - 5))


def test_modules_stand_where_the_paper_has_them():
    shares = ATP().after
    places = {32: (4, 14, 24), 40: (5, 17, 30), 28: (3, 12, 21), 24: (3, 10, 18), 8: (1, 3, 6), 4: (0, 1, 2)}
    for depth, layers in places.items():
        assert tuple(layer_index(share, depth) for share in shares) == layers
