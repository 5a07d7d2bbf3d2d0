"""Budgets split into whole numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import some

from vlmslim.ops.budgets import largest_remainder, share_out


@some
@given(st.integers(1, 500), st.lists(st.integers(0, 60), min_size=1, max_size=8))
def test_shares_are_in_proportion_to_sizes(k, sizes):
    if k > sum(sizes):
        with pytest.raises(ValueError, match=f"keep {k} of {sum(sizes)}"):
            share_out(k, sizes)
        return
    parts = share_out(k, sizes)
    assert sum(parts) == k
    for part, size in zip(parts, sizes, strict=True):
        assert 0 <= part <= size
        assert abs(part - k * size / sum(sizes)) < 1


def test_ties_go_to_the_earlier_component():
    assert share_out(2, [3, 3, 3]) == [1, 1, 0]


def test_each_component_gets_a_part_on_request():
    assert share_out(4, [90, 5, 80, 5]) == [2, 0, 2, 0]
    assert share_out(4, [90, 5, 80, 5], to_all=True) == [1, 1, 1, 1]
    assert share_out(5, [90, 1, 80, 9], to_all=True) == [2, 1, 1, 1]
    assert share_out(3, [90, 5, 80, 5], to_all=True) == [2, 0, 1, 0]  # not enough for all


@some
@given(st.integers(0, 3000))
def test_fractions_leave_no_remainder(k):
    parts = largest_remainder(k, (0.5, 0.3, 0.2))
    assert sum(parts) == k
    assert all(abs(part - k * share) < 1 for part, share in zip(parts, (0.5, 0.3, 0.2), strict=True))
    assert largest_remainder(1, (0.0, 0.0, 1.0)) == [0, 0, 1]
