"""Newline tokens: their rows, and their cost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import mosaic, shapes, some

from vlmslim.ops.newlines import NEWLINES, fill_budget, row_end_newline


@some
@given(shapes())
def test_a_row_of_tiles_ends_in_its_newline(shape):
    side, tiles, top, left, _ = shape
    grid = mosaic(side, tiles, top, left)
    ends = row_end_newline(grid.numpy(), tiles).tolist()
    for i, (crop, _, _) in enumerate(grid.tolist()):
        want = next(j for j in range(i, len(grid)) if grid[j, 0] < 0) if crop > 0 else -1
        assert ends[i] == want


def test_a_single_view_or_a_clip_has_one_newline_for_all():
    def ends(crops: list[int]) -> list[int]:
        return row_end_newline(torch.tensor(crops)[:, None].expand(-1, 3).numpy(), (0, 0)).tolist()

    assert ends([0, 0, 0, -1]) == [3, 3, 3, -1]
    assert ends([0, 0, 1, 1, -1]) == [4, 4, 4, 4, -1]
    assert ends([0, 0, 1, 1]) == [-1] * 4


@some
@given(shapes(), st.sampled_from(NEWLINES), st.data())
def test_spending_a_budget(shape, newline, data):
    side, tiles, top, left, seed = shape
    grid = mosaic(side, tiles, top, left)
    n = len(grid)
    patches = [i for i in range(n) if grid[i, 0] >= 0]
    newlines = [i for i in range(n) if grid[i, 0] < 0]
    order = torch.tensor(patches)[torch.randperm(len(patches), generator=torch.Generator().manual_seed(seed))]
    k = data.draw(st.integers(1, n))
    if newline == "all" and k <= len(newlines):
        with pytest.raises(ValueError, match="newline='rows'"):
            fill_budget(order, grid, tiles, k, newline)
        return
    kept = list(newlines) if newline == "all" else []
    for i in order.tolist():
        if len(kept) < k:
            kept.append(i)
            end = next((x for x in newlines if x > i), None) if grid[i, 0] > 0 else None
            if newline == "rows" and end is not None and end not in kept and len(kept) < k:
                kept.append(end)
    kept += [x for x in newlines if newline == "drop"][: k - len(kept)]
    got = fill_budget(order, grid, tiles, k, newline).tolist()
    assert sorted(got) == sorted(kept)
    assert len(got) == k
    chosen = [i for i in got if grid[i, 0] >= 0]
    assert chosen == order[: len(chosen)].tolist(), "patches stay in the order of their ranking"
    short = fill_budget(order[:k], grid, tiles, k, newline).tolist()
    assert short == got, "the k best are enough to know"


def test_what_is_neither_patch_nor_newline_comes_last():
    """A CLS token among the features has a crop but no place, so no method ranks it."""
    grid = torch.tensor([[0, -1, -1], [0, 0, 0], [0, 0, 1], [-1, -1, -1]])
    assert fill_budget(torch.tensor([2, 1]), grid, (0, 0), 3, "rows").tolist() == [2, 1, 3]
    assert fill_budget(torch.tensor([2, 1]), grid, (0, 0), 4, "rows").tolist() == [2, 1, 3, 0]
    assert fill_budget(torch.tensor([2, 1]), grid, (0, 0), 3, "drop").tolist() == [2, 1, 0]
