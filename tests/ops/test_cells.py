"""Grids cut into cells of near-equal size."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import some

from vlmslim.ops.cells import cell_members, dense, even_cells, grid_cells


@some
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_cells_partition_the_grid_into_rectangles(height, width, data):
    k = data.draw(st.integers(1, height * width))
    cells = torch.from_numpy(grid_cells(height, width, k))
    assert cells.shape == (height, width)
    assert set(cells.flatten().tolist()) == set(range(k))
    for cell in range(k):
        rows, columns = (cells == cell).nonzero().unbind(1)
        box = cells[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box == cell).all(), "not a rectangle"
    assert (cells[:, 1:] >= cells[:, :-1]).all() and (cells[1:] >= cells[:-1]).all(), "not in reading order"
    assert cells.flatten().bincount().max() <= 4 * height * width / k + 1, "a cell is much larger than its share"


@some
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_part_i_of_a_line_begins_at_i_times_length_over_parts(height, width, data):
    k = data.draw(st.integers(1, height * width))
    cells = torch.from_numpy(grid_cells(height, width, k))
    first = cells[:, 0].unique().tolist()  # of each band of rows
    for band, (begin, end) in enumerate(zip(first, [*first[1:], k], strict=True)):
        assert begin == band * k // len(first)
        assert int((cells[:, 0] == begin).nonzero()[0]) == band * height // len(first)
        line = cells[cells[:, 0] == begin][0]
        for i in range(end - begin):
            assert int((line == begin + i).nonzero()[0]) == i * width // (end - begin)


@pytest.mark.parametrize("k", [0, 13])
def test_a_number_of_cells_that_does_not_fit_is_refused(k):
    with pytest.raises(ValueError, match="use 1 to 12"):
        grid_cells(3, 4, k)


@some
@given(st.sets(st.integers(0, 12), min_size=1), st.sets(st.integers(0, 12), min_size=1), st.booleans(), st.data())
def test_components_with_gaps_and_newlines_are_cut_into_k_cells(rows, columns, cls, data):
    """A thumbnail, with or without CLS in front, and a mosaic that was shrunk; newlines end its rows."""
    tokens = [[0, -1, -1]] * cls + [[0, r, c] for r in range(3) for c in range(3)]
    for r in sorted(rows):
        tokens += [[1, r, c] for c in sorted(columns)] + [[-1, -1, -1]]
    k = data.draw(st.integers(1, len(tokens)))
    cell = torch.from_numpy(even_cells(np.array(tokens), k))
    sizes = [int((cell == i).sum()) for i in range(k)]
    assert min(sizes) > 0 and int(cell.max()) == k - 1
    placeless = [i for i, (_, row, _) in enumerate(tokens) if row < 0]
    extra = max(0, k - (len(tokens) - len(placeless)))
    assert (cell[placeless] >= 0).tolist() == [True] * extra + [False] * (len(placeless) - extra)
    counted = dense(np.array(tokens)).tolist()
    want = [[0, r, c] for r in range(3) for c in range(3)] + [
        [1, r, c] for r in range(len(rows)) for c in range(len(columns))
    ]
    assert [place for place in counted if place[1] >= 0] == want
    assert [place for place in counted if place[1] < 0] == [place for place in tokens if place[1] < 0]
    member, size = map(torch.from_numpy, cell_members(cell.numpy()))
    assert size.tolist() == sizes
    assert member.tolist() == [i for c in range(k) for i in range(len(tokens)) if cell[i] == c]
