"""Even cells, shared budgets, and the two methods made of them: uniform and pool."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import close
from torch.nn import functional as F

import vlmslim
from vlmslim.compressor import ImageTokens
from vlmslim.methods.uniform import even_cells
from vlmslim.ops.selection import grid_cells, largest_remainder, share_out

repeatable = settings(deadline=None, derandomize=True, max_examples=40)


def made_up(features: torch.Tensor, side: int) -> ImageTokens:
    """One image on a side x side grid."""
    n = side * side
    at = torch.arange(n)
    grid = torch.stack([torch.zeros_like(at), at // side, at % side], 1)
    return ImageTokens(features, torch.zeros(1, n, 4), torch.zeros(1, 3, side, side), layout=lambda: grid)


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@repeatable
def test_grid_cells_partition_the_grid_into_rectangles(height, width, data):
    k = data.draw(st.integers(1, height * width))
    cells = grid_cells(height, width, k)
    assert cells.shape == (height, width)
    assert set(cells.flatten().tolist()) == set(range(k))
    for cell in range(k):
        rows, columns = (cells == cell).nonzero().unbind(1)
        box = cells[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == cell).all(), "not a rectangle"
    sizes = cells.flatten().bincount()
    assert sizes.max() <= 4 * height * width / k + 1, "a cell is much larger than its share"


@given(st.integers(1, 500), st.lists(st.integers(0, 60), min_size=1, max_size=8))
@repeatable
def test_budgets_are_shared_in_proportion(k, sizes):
    if k > sum(sizes):
        with pytest.raises(ValueError):
            share_out(k, sizes)
        return
    parts = share_out(k, sizes)
    assert sum(parts) == k
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size
        assert abs(part - k * size / sum(sizes)) < 1


@given(st.integers(0, 3000))
def test_the_budget_is_split_without_a_rest(k):
    parts = largest_remainder(k, (0.5, 0.3, 0.2))
    assert sum(parts) == k
    assert all(abs(part - k * share) < 1 for part, share in zip(parts, (0.5, 0.3, 0.2), strict=True))
    assert largest_remainder(1, (0.0, 0.0, 1.0)) == [0, 0, 1]


@given(st.integers(2, 9), st.integers(1, 4), st.integers(0, 10**6))
@repeatable
def test_pool_is_average_pooling(outer, inner, seed):
    side = outer * inner
    x = torch.randn(side * side, 6, generator=torch.Generator().manual_seed(seed))
    got = vlmslim.method("pool", keep=outer * outer).compress(made_up(x, side)).features
    want = F.avg_pool2d(x.double().T.view(1, 6, side, side), inner)[0].flatten(1).T
    close(got.double(), want, 1e-5)


@given(st.integers(2, 9), st.data())
@repeatable
def test_pool_averages_every_token_once(side, data):
    n = side * side
    k = data.draw(st.integers(1, n))
    weights = vlmslim.method("pool", keep=k).compress(made_up(torch.eye(n), side)).features  # (k, n)
    assert weights.shape == (k, n)
    assert ((weights > 0).sum(0) == 1).all(), "a token is in no cell, or in two"
    close(weights.sum(1), torch.ones(k), 1e-5)
    for row in weights:
        close(row[row > 0], torch.full_like(row[row > 0], 1 / int((row > 0).sum())), 1e-5)


@given(st.integers(2, 9), st.integers(1, 4))
@repeatable
def test_uniform_takes_the_same_place_of_every_block(outer, inner):
    side = outer * inner
    image = made_up(torch.zeros(side * side, 2), side)
    index = vlmslim.method("uniform", keep=outer * outer).compress(image).index
    row, column = index // side, index % side
    blocks = (row // inner * outer + column // inner).tolist()
    assert blocks == list(range(outer * outer))
    assert len({(int(r % inner), int(c % inner)) for r, c in zip(row, column, strict=True)}) == 1


@given(st.integers(2, 9), st.data())
@repeatable
def test_uniform_leaves_no_region_out(side, data):
    n = side * side
    k = data.draw(st.integers(1, n))
    index = vlmslim.method("uniform", keep=k).compress(made_up(torch.zeros(n, 2), side)).index
    assert len(index) == k == len(set(index.tolist()))
    assert (index.diff() > 0).all()
    at = torch.stack([torch.arange(n) // side, torch.arange(n) % side], 1)
    reach = (at[:, None] - at[index][None]).abs().amax(-1).amin(1).max()
    assert reach <= 2 * (n / k) ** 0.5


@given(st.sets(st.integers(0, 12), min_size=1), st.sets(st.integers(0, 12), min_size=1), st.booleans(), st.data())
@repeatable
def test_cells_are_filled_where_rows_are_left_out(rows, columns, cls, data):
    """A thumbnail, with or without CLS in front, and a mosaic that was shrunk; newlines end its rows."""
    tokens = [[0, -1, -1]] * cls + [[0, r, c] for r in range(3) for c in range(3)]
    for r in sorted(rows):
        tokens += [[1, r, c] for c in sorted(columns)] + [[-1, -1, -1]]
    k = data.draw(st.integers(1, len(tokens)))
    cell = even_cells(torch.tensor(tokens), k)
    sizes = cell[cell >= 0].bincount(minlength=k)
    assert len(sizes) == k
    assert (sizes > 0).all()
