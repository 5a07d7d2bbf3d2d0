"""The intervals cover, and the test errs, as often as `docs/leaderboard.md` says."""

import numpy as np
import pytest
from check_statistics import DESIGNS, coverage, rates

from vlmslim.leaderboard.significance import mcnemar


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS, ids=str)
def test_intervals_cover_95_per_cent(design):
    """With 3000 draws the standard error of a coverage is 0.4 %."""
    for covered in coverage(design, 3000):
        assert covered == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("either", [0.1, 0.3])
def test_the_mid_p_test_keeps_the_level_and_finds_more(either):
    (exact, mid), (less, power) = rates(100, either / 2, either / 2), rates(100, either * 0.75, either * 0.25)
    assert exact < mid < 0.055
    assert power > less


def test_the_boards_test_is_the_one_whose_rates_are_computed():
    """Enumerate 12 questions, of which each is won, lost or neither."""
    found = 0.0
    for won in range(13):
        for lost in range(13 - won):
            scores = np.array(
                [[1.0] * won + [0.0] * (12 - won), [0.0] * won + [1.0] * lost + [0.0] * (12 - won - lost)]
            )
            ways = np.prod(np.arange(1, 13)) / np.prod(
                [np.prod(np.arange(1, n + 1)) for n in (won, lost, 12 - won - lost)]
            )
            if mcnemar(scores)[0, 1] < 0.05:
                found += ways * 0.5**won * 0.2**lost * 0.3 ** (12 - won - lost)
    assert found == pytest.approx(rates(12, 0.5, 0.2)[1])
