"""The baselines on a regular grid: `uniform` takes the middle of each cell, `pool` its mean."""

import torch
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from strategies import mosaic, noise, seeds, shapes, some
from torch.nn import functional as F

import vlmslim
from vlmslim.compressor import ImageTokens


def square_image(features: torch.Tensor, side: int) -> ImageTokens:
    """One image on a side x side grid."""
    n = side * side
    at = torch.arange(n)
    grid = torch.stack([torch.zeros_like(at), at // side, at % side], 1)
    return ImageTokens(features, torch.zeros(1, n, 4), torch.zeros(1, 3, side, side), make_grid=lambda: grid)


@some
@given(st.integers(2, 9), st.integers(2, 4), seeds)
def test_pool_is_average_pooling(outer, inner, seed):
    side = outer * inner
    x = noise(seed, side * side, 6)
    got = vlmslim.method("pool", keep=outer * outer).compress(square_image(x, side)).features
    want = F.avg_pool2d(x.double().T.view(1, 6, side, side), inner)[0].flatten(1).T
    close(got.double(), want, 1e-5)


@some
@given(st.integers(2, 9), st.data())
def test_pool_averages_every_token_once(side, data):
    n = side * side
    k = data.draw(st.integers(1, n - 1))
    result = vlmslim.method("pool", keep=k).compress(square_image(torch.eye(n), side))
    weights = result.features  # (k, n)
    assert weights.shape == (k, n)
    assert ((weights > 0).sum(0) == 1).all(), "a token is in no cell, or in two"
    for row, slot in zip(weights, result.index.tolist(), strict=True):
        close(row[row > 0], torch.full_like(row[row > 0], 1 / int((row > 0).sum())), 1e-5)
        assert slot == int(row.nonzero()[0]), "a mean takes the slot of its cell's first token"
    assert (result.index.diff() > 0).all()


@some
@given(shapes(), st.integers(0, 8))
def test_pool_sends_newlines_in_their_places_when_patches_run_out(shape, newlines):
    side, tiles, top, left, seed = shape
    grid = mosaic(side, tiles, top, left)
    tower, pixels = torch.zeros(1 + tiles[0] * tiles[1], side**2, 1), torch.zeros(1, 3, 2, 2)
    image = ImageTokens(noise(seed, len(grid), 3), tower, pixels, tiles=tiles, make_grid=lambda: grid)
    k = min(int((grid[:, 0] >= 0).sum()) + newlines, len(grid) - 1)
    result = vlmslim.method("pool", keep=k).compress(image)
    assert len(result.index) == k and (result.index.diff() > 0).all()
    close(result.features, image.features[result.index], 1e-6)


@some
@given(st.integers(2, 9), st.integers(1, 4))
def test_uniform_takes_the_same_place_of_every_block(outer, inner):
    side = outer * inner
    image = square_image(torch.zeros(side * side, 2), side)
    index = vlmslim.method("uniform", keep=outer * outer).compress(image).index
    row, column = index // side, index % side
    blocks = (row // inner * outer + column // inner).tolist()
    assert blocks == list(range(outer * outer))
    ((down, right),) = {(int(r % inner), int(c % inner)) for r, c in zip(row, column, strict=True)}
    if inner % 2:
        assert (down, right) == (inner // 2, inner // 2), "not the middle"


@some
@given(st.integers(2, 9), st.data())
def test_uniform_leaves_no_region_out(side, data):
    n = side * side
    k = data.draw(st.integers(1, n))
    index = vlmslim.method("uniform", keep=k).compress(square_image(torch.zeros(n, 2), side)).index
    assert len(index) == k == len(set(index.tolist()))
    assert (index.diff() > 0).all()
    at = torch.stack([torch.arange(n) // side, torch.arange(n) % side], 1)
    reach = (at[:, None] - at[index][None]).abs().amax(-1).amin(1).max()
    assert reach <= 2 * (n / k) ** 0.5
