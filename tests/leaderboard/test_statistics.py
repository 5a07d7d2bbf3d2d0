"""Intervals, paired tests, corrections and ranks, against scipy and against what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from vlmslim.evaluation.config import ConfigError
from vlmslim.leaderboard.comparison import TaskAnswers, answer, compare, question_score
from vlmslim.leaderboard.significance import (
    effective_size,
    holm,
    interval,
    mcnemar,
    pareto_front,
    ranks,
    resamples,
    sums_by_unit,
    swap_test,
    units_of,
    wilson,
)
from vlmslim.leaderboard.task_groups import GROUPS, group_of

# ---------------------------------------------------------------------- intervals


@pytest.mark.parametrize("right, asked", [(0, 7), (3, 4), (50, 100), (240, 240)])
def test_wilson_is_scipys(right, asked):
    theirs = stats.binomtest(right, asked).proportion_ci(0.95, method="wilson")
    ours = wilson(np.array(right / asked), np.array(asked))
    np.testing.assert_allclose(ours, (theirs.low, theirs.high), atol=1e-12)


def test_questions_about_one_picture_are_worth_less():
    rng = np.random.default_rng(0)
    alone = (rng.random(60) < 0.6).astype(float)[None]
    copied = np.repeat(alone, 3, axis=1)  # three questions a picture, always right or wrong together
    units = np.repeat(np.arange(60), 3)
    assert effective_size(alone, np.arange(60))[0] == 60
    assert 55 < effective_size(copied, units)[0] < 65
    assert effective_size(np.ones((1, 180)), units)[0] == 60  # cannot be estimated: one question a picture
    independent = (rng.random((1, 180)) < 0.6).astype(float)
    assert effective_size(independent, units)[0] > 120
    assert effective_size(np.array([[1.0, 0.0, 1.0]]), np.zeros(3, int))[0] == 1


def test_the_bootstrap_covers_the_standard_error_of_clustered_questions():
    rng = np.random.default_rng(1)
    units = np.repeat(np.arange(200), 4)
    scores = (rng.random((1, 200)).repeat(4, axis=1) + rng.random((1, 800))) / 2
    sums, sizes = sums_by_unit(scores, units), np.bincount(units)
    draws = np.concatenate([(w @ sums.T) / (w @ sizes)[:, None] for w in resamples(np.zeros(200), 2000)])
    low, high = interval(draws)
    pictures = sums[0] / 4
    expected = 2 * 1.96 * pictures.std(ddof=1) / math.sqrt(200)
    assert high[0] - low[0] == pytest.approx(expected, rel=0.1)
    assert low[0] < scores.mean() < high[0]


def test_resamples_keep_the_size_of_every_stratum_and_repeat():
    strata = np.array([0, 0, 0, 1, 1])
    drawn = np.concatenate(list(resamples(strata, 50)))
    assert drawn.shape == (50, 5)
    assert (drawn[:, :3].sum(1) == 3).all() and (drawn[:, 3:].sum(1) == 2).all()
    np.testing.assert_array_equal(drawn, np.concatenate(list(resamples(strata, 50))))


# ---------------------------------------------------------------------- tests


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_mcnemar_is_the_sign_test_on_the_questions_that_differ(outcomes):
    scores = np.array(outcomes, dtype=float).T
    won, lost = int((scores[0] > scores[1]).sum()), int((scores[0] < scores[1]).sum())
    expected = stats.binomtest(won, won + lost).pvalue if won + lost else 1.0
    p = mcnemar(scores)
    assert p[0, 1] == pytest.approx(expected)
    assert p[1, 0] == p[0, 1] and p[0, 0] == 1


def test_the_swap_test_is_scipys_paired_permutation_test():
    rng = np.random.default_rng(2)
    sums = rng.random((3, 9))
    ours = swap_test(sums, draws=1000)  # 512 patterns: all are tried
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
    np.testing.assert_allclose(random, mcnemar(scores), atol=0.015)
    np.testing.assert_array_equal(random, swap_test(scores, draws=20_000))
    assert random.min() >= 1 / 20_001  # never zero: the observed pattern counts


def test_more_questions_about_the_same_pictures_prove_nothing():
    alone = np.array([[1, 1, 1, 1, 1, 0.0], [0, 0, 0, 0, 1, 0.0]])
    copied, units = alone.repeat(5, axis=1), np.arange(6).repeat(5)
    assert mcnemar(copied)[0, 1] < 0.001  # as if each were a new piece of evidence
    assert mcnemar(alone)[0, 1] == pytest.approx(0.125)
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


def test_ranks_are_shared_where_nothing_separates():
    better = np.zeros((4, 4), bool)
    better[0, 2] = better[0, 3] = better[1, 3] = True
    assert ranks(better).tolist() == [1, 1, 2, 3]


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_beats(points):
    cost, value = np.array(points).T
    front = pareto_front(cost, value)
    assert front.any()
    for i, (c, v) in enumerate(points):
        beaten = any(c2 <= c and v2 >= v and (c2, v2) != (c, v) for c2, v2 in points)
        assert front[i] == (not beaten)


# ---------------------------------------------------------------------- answers


def test_answers_are_the_text_or_the_chosen_option():
    assert answer({"filtered_resps": [" Two\n dogs "]}) == answer({"resps": ["two dogs"]}) == "two dogs"
    assert answer({"filtered_resps": [[2.5, False], [0.3, True], [4.0, False]]}) == "option 1"
    assert answer({"filtered_resps": [["a", "b"]]}) == '["a", "b"]'  # several rounds


def test_scores_of_questions():
    assert question_score({"acc": True}, "acc") == 1
    assert question_score({"f1": {"score": 0.5, "question_id": 3}}, "f1") == 0.5
    assert question_score({"cider": {"pred": "a"}}, "cider") is None
    assert question_score({"acc": float("nan")}, "acc") is None


def samples(scores, answers=None, pictures=None):
    answers = answers or ["yes" if score else "no" for score in scores]
    pictures = pictures or range(len(scores))
    return [
        {"doc_id": i, "doc": {"image_id": p}, "acc": s, "filtered_resps": [a]}
        for i, (s, a, p) in enumerate(zip(scores, answers, pictures, strict=True))
    ]


def test_answers_to_different_questions_cannot_be_paired():
    rows = {"none": samples([1, 0, 1]), "a": samples([1, 0, 1])[1:]}
    with pytest.raises(ConfigError, match="none and a answered different questions of t"):
        TaskAnswers.collect("t", rows, "acc", True)
    rows["a"] = list(reversed(samples([1, 0, 1])))
    with pytest.raises(ConfigError, match="different questions"):
        TaskAnswers.collect("t", rows, "acc", True)


def test_a_comparison():
    rng = np.random.default_rng(5)
    base = (rng.random(80) < 0.9).astype(float)
    bad = base * (rng.random(80) < 0.5)
    rows = {"none": samples(base), "same": samples(base), "bad": samples(bad)}
    result = compare([TaskAnswers.collect("t", rows, "acc", True)], [["same", "bad"]], "none", {"t": "OCR"})
    same, bad_pair = result.pair("same", "none", "t"), result.pair("bad", "none", "t")
    assert (same.difference, same.p, same.significant) == (0, 1, False)
    assert bad_pair.difference == pytest.approx(bad.mean() - base.mean())
    assert bad_pair.significant and not bad_pair.better
    turned = result.pair("none", "bad", "t")
    assert turned.difference == -bad_pair.difference and turned.better
    assert result.pair("same", "bad", None).difference == pytest.approx((base.mean() - bad.mean()) / base.mean())
    assert result.ranks == {"same": 1, "bad": 2}
    assert result.stability["same", "t"].loyalty == 1
    stability = result.stability["bad", "t"]
    assert (stability.lost, stability.won) == (pytest.approx((bad < base).mean()), 0)
    assert result.groups["bad", "OCR"] == result.relative["bad"]
    low, high = result.relative["bad"]
    assert low < bad.mean() / base.mean() < high


def test_where_lower_is_better_the_lower_one_wins():
    rows = {"none": samples([1.0] * 40), "a": samples([0.5] * 40), "b": samples([2.0] * 40)}
    result = compare([TaskAnswers.collect("t", rows, "acc", False)], [["a", "b"]], "none", {"t": "general"})
    assert result.pair("a", "b", "t").better and result.pair("a", "b", None).better
    assert result.ranks == {"a": 1, "b": 2}
    assert (result.stability["b", "t"].lost, result.stability["a", "t"].won) == (1, 1)


def test_pictures_shared_by_tasks_count_once():
    """Two tasks about the same pictures are no more evidence than one; about other pictures they are."""
    ours, theirs = [1.0] * 5 + [0.0], [0.0] * 4 + [1.0, 0.0]

    def average(first, second):
        rows = {"none": samples([1.0] * 6), "a": samples(ours), "b": samples(theirs)}
        named = [TaskAnswers.collect(t, rows, "acc", True, source) for t, source in (("t", first), ("u", second))]
        return compare(named, [["a", "b"]], "none", {"t": "OCR", "u": "OCR"}).pair("a", "b", None).p

    assert average("set", "set") == 0.125
    assert average("one set", "another set") < 0.125


def test_a_question_without_a_score_is_not_tested_but_its_answer_is_compared():
    rows = {"none": samples([1.0, 1.0]), "a": samples([1.0, 0.0])}
    for sample in rows["none"] + rows["a"]:
        sample["acc"] = {"pred": "x"}
    result = compare([TaskAnswers.collect("t", rows, "acc", True)], [["a"]], "none", {"t": "OCR"})
    assert result.untested == ["t"] and not result.pairs and not result.ranks
    stability = result.stability["a", "t"]
    assert (stability.loyalty, stability.lost, stability.won) == (0.5, None, None)


@pytest.mark.parametrize(
    "task, group",
    [
        ("pope", "hallucination"),
        ("pope_adv", "hallucination"),
        ("textvqa_val", "OCR"),
        ("docvqa_val_lite", "OCR"),
        ("ocrbench", "OCR"),
        ("scenes_text", "OCR"),
        ("documents_total", "OCR"),
        ("scenes_presence", "hallucination"),
        ("scenes_count", "fine detail"),
        ("mme", "general"),
        ("mme_realworld_lite", "fine detail"),
        ("gqa", "general"),
        ("seedbench", "general"),
        ("seedbench_2_plus", "OCR"),
        ("popeye", "general"),
    ],
)
def test_groups_of_tasks(task, group):
    assert group_of(task) == group and group in GROUPS


def test_thirteen_methods_at_two_budgets_on_seven_tasks():
    """The size of a real table; all of its comparisons are there."""
    rng = np.random.default_rng(6)
    labels = [f"{m}-{b}" for b in (64, 16) for m in range(13)]
    tasks = [
        TaskAnswers.collect(
            f"t{t}", {label: samples((rng.random(240) < 0.6) * 1.0) for label in ["none", *labels]}, "acc", True
        )
        for t in range(7)
    ]
    result = compare(tasks, [labels[:13], labels[13:]], "none", {f"t{t}": "general" for t in range(7)})
    assert len(result.pairs) == 2 * 8 * 14 * 13 / 2
    assert len(result.ranks) == 26
    assert units_of(["b", "a", "b"]).tolist() == [1, 0, 1]


def test_the_average_covers_where_tasks_share_some_of_their_pictures():
    """Each of six tasks asks about 25 of 40 pictures, so hardly two pictures are in just the same tasks."""
    rng = np.random.default_rng(7)
    members = [rng.choice(40, 25, replace=False) for _ in range(6)]
    widths, estimates = [], []
    for _ in range(60):
        hard = rng.normal(size=40)
        tasks = []
        for t, own in enumerate(members):
            graded = 1 / (1 + np.exp(-(0.8 + hard[own] + 0.3 * rng.normal(size=25))))
            names = [f"set {picture}" for picture in own]
            tasks.append(TaskAnswers(f"t{t}", ["none", "a"], names, np.stack([np.ones(25), graded]), [["x"] * 25] * 2))
        result = compare(tasks, [["a"]], "none", {f"t{t}": "general" for t in range(6)})
        low, high = result.relative["a"]
        widths.append(high - low)
        estimates.append(np.mean([task.row("a").mean() for task in tasks]))
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(estimates, ddof=1), rel=0.2)


def test_luck_of_the_unpatched_model_does_not_count_for_a_method(monkeypatch):
    """Rows that are alike, on many small and hard tasks: none is found better than the unpatched model too often."""
    monkeypatch.setattr("vlmslim.leaderboard.comparison.SWAPS", 999)
    monkeypatch.setattr("vlmslim.leaderboard.comparison.RESAMPLES", 2)
    rng = np.random.default_rng(8)
    found = 0
    for _ in range(100):
        names = [f"t{t}" for t in range(20)]
        answers = [
            TaskAnswers(
                t, ["none", "a"], [f"{t} {q}" for q in range(50)], (rng.random((2, 50)) < 0.1) * 1.0, [[""] * 50] * 2
            )
            for t in names
        ]
        pair = compare(answers, [["a"]], "none", dict.fromkeys(names, "general")).pair("a", "none", None)
        found += pair.p < 0.05
    assert found <= 11  # 20 or so where the weights are the unpatched model's own


def test_differences_stay_significant_among_many_rows():
    rng = np.random.default_rng(9)
    labels = [f"m{i}" for i in range(50)]
    rows = {
        label: samples((rng.random(60) < (0.95 if i % 2 else 0.1)) * 1.0) for i, label in enumerate(["none", *labels])
    }
    result = compare([TaskAnswers.collect("t", rows, "acc", True)], [labels], "none", {"t": "general"})
    assert result.pair("m0", "m1", None).significant and set(result.ranks.values()) == {1, 26}


def test_a_metric_of_some_questions_is_tested_on_them():
    """As lmms-eval logs MME and SEED-Bench."""
    rows = {"none": samples([1.0] * 12, pictures=[i // 2 for i in range(12)]), "a": samples([0.0] * 12)}
    for row in rows.values():
        for i in (0, 5):
            row[i]["other"] = row[i].pop("acc")
    task = TaskAnswers.collect("t", rows, "acc", True)
    assert task.scores.shape == (2, 10) and len(task.pictures) == len(task.answers[1]) == 10
    del rows["a"][1]["acc"]  # known of one row only
    assert TaskAnswers.collect("t", rows, "acc", True).scores is None


def test_where_lower_is_better_nothing_is_inverted():
    rows = {"none": samples([1.0, 3.0]), "a": samples([0.0, 0.0]), "b": samples([1.0, 2.0])}
    result = compare([TaskAnswers.collect("t", rows, "acc", False)], [["a", "b"]], "none", {"t": "general"})
    assert result.pair("a", "none", None).difference == pytest.approx(1)
    low, high = result.relative["b"]
    assert 1 <= low <= high <= 2 - 2 / 3 + 1e-9


def test_ranks_may_differ_where_the_difference_is_not_significant():
    better = np.zeros((3, 3), bool)
    better[0, 2] = True  # 1 lies between and is separated from neither
    assert ranks(better).tolist() == [1, 1, 2]


@pytest.mark.parametrize("name", ["video", "videoID", "video_name", "video_path"])
def test_questions_about_one_video_belong_together(name):
    rows = {label: samples([1.0, 0.0]) for label in ("none", "a")}
    for row in rows.values():
        for i, sample in enumerate(row):
            sample["doc"] = {name: "clip", "question_id": i}
    assert len(set(TaskAnswers.collect("t", rows, "acc", True).pictures)) == 1


def test_intervals_of_differences_cover_and_turn():
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(100):
        picture = rng.normal(size=(1, 80))
        scores = 1 / (1 + np.exp(-(picture + 0.5 * rng.normal(size=(2, 80)) + np.array([[0.0], [0.3]]))))
        answers = TaskAnswers("t", ["none", "a"], [str(i) for i in range(80)], scores, [["x"] * 80] * 2)
        result = compare([answers], [["a"]], "none", {"t": "general"})
        pair, turned = result.pair("a", "none", "t"), result.pair("none", "a", "t")
        assert (turned.low, turned.high) == (-pair.high, -pair.low)
        assert pair.low < pair.difference < pair.high
        covered += pair.low < 0.0597 < pair.high  # the mean of the difference under this model
    assert 85 <= covered <= 100


def test_few_pictures_widen_an_interval():
    score, size = np.array([0.6]), np.array([12.0])
    plain, few, many = (wilson(score, size, clusters) for clusters in (None, 5, 100_000))
    assert few[0] < plain[0] and few[1] > plain[1]
    np.testing.assert_allclose(many, plain, atol=1e-4)
