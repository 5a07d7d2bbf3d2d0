"""Intervals, paired tests, corrections, ranks and fronts, against scipy and against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vlmslim.leaderboard.significance import (
    covariances,
    effective_size,
    half_width,
    holm,
    mcnemar,
    pareto_front,
    ranks,
    resolution,
    sums_by_unit,
    swap_test,
    units_of,
    wilson,
)


def test_units_are_numbered_by_name():
    assert units_of(["b", "a", "b"]).tolist() == [1, 0, 1]


# ---------------------------------------------------------------------- intervals


@pytest.mark.parametrize("right, asked", [(0, 7), (3, 4), (50, 100), (240, 240)])
def test_wilson_is_scipys(right, asked):
    theirs = stats.binomtest(right, asked).proportion_ci(0.95, method="wilson")
    ours = wilson(np.array(right / asked), np.array(asked))
    np.testing.assert_allclose(ours, (theirs.low, theirs.high), atol=1e-12)


def test_few_pictures_widen_an_interval():
    """Student's quantile for 5 pictures is 2.776, the normal one 1.960; with many pictures the two agree."""
    fraction, size = np.array([0.6]), np.array([12.0])
    plain, few, many = (wilson(fraction, size, clusters) for clusters in (None, 5, 100_000))
    np.testing.assert_allclose(few, wilson(fraction, size, confidence=2 * stats.norm.cdf(2.7764451) - 1), atol=1e-7)
    assert few[0] < plain[0] and few[1] > plain[1]
    np.testing.assert_allclose(many, plain, atol=1e-4)


def test_questions_about_one_picture_are_worth_less():
    rng = np.random.default_rng(0)
    alone = (rng.random(60) < 0.6).astype(float)[None]
    copied = np.repeat(alone, 3, axis=1)  # three questions about each picture, right or wrong together
    units = np.repeat(np.arange(60), 3)
    assert effective_size(alone, np.arange(60))[0] == 60
    assert effective_size(copied, units)[0] == pytest.approx(180 * 59 / 179)
    assert effective_size(np.ones((1, 180)), units)[0] == 60  # cannot be estimated: one question per picture
    independent = (rng.random((1, 180)) < 0.6).astype(float)
    assert 120 < effective_size(independent, units)[0] <= 180
    assert effective_size(np.array([[1.0, 0.0, 1.0]]), np.zeros(3, int))[0] == 1


def test_one_stratum_has_students_interval():
    """Of a mean, and of the difference of two."""
    x, y = np.random.default_rng(1).random((2, 9))
    covariance, freedom = covariances(np.stack([x, y]) / 9, np.zeros(9))
    theirs = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    assert half_width(covariance[:, 0, 0], freedom) == pytest.approx((theirs.high - theirs.low) / 2)
    theirs = stats.ttest_rel(x, y).confidence_interval(0.95)
    difference = covariance[:, 0, 0] + covariance[:, 1, 1] - 2 * covariance[:, 0, 1]
    assert half_width(difference, freedom) == pytest.approx((theirs.high - theirs.low) / 2)


def test_two_strata_have_welchs_interval():
    rng = np.random.default_rng(2)
    few, many = rng.random(4), rng.random(60) / 5
    influence = np.concatenate([few / 4, -many / 60])[None]
    covariance, freedom = covariances(influence, np.arange(64) >= 4)
    theirs = stats.ttest_ind(few, many, equal_var=False).confidence_interval(0.95)
    assert half_width(covariance[:, 0, 0], freedom) == pytest.approx((theirs.high - theirs.low) / 2)


def test_one_unit_tells_nothing_about_its_variance_and_equal_units_have_none():
    covariance, freedom = covariances(np.array([[0.3, 0.2, 0.2]]), np.array([0, 1, 1]))
    assert np.isnan(half_width(covariance[:, 0, 0], freedom))
    assert half_width(covariance[1:, 0, 0], freedom[1:]) == 0


# ---------------------------------------------------------------------- tests


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_mid_p_sign_test_on_the_questions_that_differ(outcomes):
    scores = np.array(outcomes, dtype=float).T
    won, lost = int((scores[0] > scores[1]).sum()), int((scores[0] < scores[1]).sum())
    ways = [math.comb(won + lost, k) for k in range(won + lost + 1)]
    further = [n for k, n in enumerate(ways) if abs(2 * k - won - lost) > abs(won - lost)]
    equal = [n for k, n in enumerate(ways) if abs(2 * k - won - lost) == abs(won - lost)]
    expected = (sum(further) + sum(equal) / 2) / sum(ways) if won != lost else 1.0
    p = mcnemar(scores)
    assert p[0, 1] == pytest.approx(expected)
    assert p[1, 0] == p[0, 1] and p[0, 0] == 1


def test_the_swap_test_is_scipys_paired_permutation_test():
    rng = np.random.default_rng(2)
    sums = rng.random((3, 9))
    ours = swap_test(sums, draws=1000)  # all 512 patterns are tried
    for i, j in ((0, 1), (0, 2), (1, 2)):
        theirs = stats.permutation_test(
            (sums[i], sums[j]),
            lambda a, b, axis: (a - b).sum(axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=np.inf,
        )
        assert ours[i, j] == pytest.approx(theirs.pvalue)


def test_random_swaps_come_near_the_exact_test_and_repeat():
    rng = np.random.default_rng(3)
    scores = (rng.random((4, 40)) < [[0.5], [0.6], [0.8], [0.8]]).astype(float)
    random = swap_test(scores, draws=20_000)
    for i, j in ((0, 1), (0, 3), (2, 3)):
        won, lost = (scores[i] > scores[j]).sum(), (scores[i] < scores[j]).sum()
        assert random[i, j] == pytest.approx(stats.binomtest(int(won), int(won + lost)).pvalue, abs=0.015)
    np.testing.assert_array_equal(random, swap_test(scores, draws=20_000))
    far_apart = swap_test(np.array([[1.0] * 40, [0.0] * 40]), draws=999)
    assert far_apart[0, 1] == resolution(40, 999) == 1 / 1000  # never zero, because the observed pattern counts
    assert resolution(9, 1000) == 0  # all patterns are tried


def test_sums_that_are_equal_up_to_rounding_are_equal():
    sums = np.array([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]]) / 3
    assert swap_test(sums, draws=1000)[0, 1] == 1
    assert swap_test(np.array([[0.1 + 0.2, 0.0], [0.3, 0.0]]), draws=1000)[0, 1] == 1


def test_more_questions_about_the_same_pictures_prove_nothing():
    alone = np.array([[1, 1, 1, 1, 1, 0.0], [0, 0, 0, 0, 1, 0.0]])
    copied, units = alone.repeat(5, axis=1), np.arange(6).repeat(5)
    assert mcnemar(copied)[0, 1] < 0.001  # as if each question were new evidence
    assert mcnemar(alone)[0, 1] == pytest.approx(0.0625)  # half of it, because the outcome counts half
    assert swap_test(sums_by_unit(copied, units), 1000)[0, 1] == 0.125


def test_under_the_null_few_differences_are_found():
    rng = np.random.default_rng(4)
    found = [mcnemar((rng.random((2, 60)) < 0.7).astype(float))[0, 1] < 0.05 for _ in range(300)]
    assert sum(found) / 300 < 0.08


def test_holm():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1, 1]
    assert holm([]).size == 0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_never_lowers_keeps_the_order_and_is_at_most_bonferroni(p):
    p = np.array(p)
    adjusted = holm(p)
    assert (adjusted >= p).all() and (adjusted <= np.minimum(p * len(p), 1) + 1e-12).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


# ---------------------------------------------------------------------- order


@pytest.mark.parametrize(
    "beaten, expected",
    [
        ([(0, 2), (0, 3), (1, 3)], [1, 1, 2, 3]),
        ([(0, 2)], [1, 1, 2, 1]),  # different ranks, although row 1 and row 2 do not differ significantly
        ([], [1, 1, 1, 1]),
    ],
)
def test_ranks_count_the_rows_that_are_better(beaten, expected):
    better = np.zeros((4, 4), bool)
    for i, j in beaten:
        better[i, j] = True
    assert ranks(better).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    cost, value = np.array(points).T
    front = pareto_front(cost, value)
    assert front.any()
    for i, (c, v) in enumerate(points):
        beaten = any(c2 <= c and v2 >= v and (c2, v2) != (c, v) for c2, v2 in points)
        assert front[i] == (not beaten)
