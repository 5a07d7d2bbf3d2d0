"""Samples of lmms-eval as they are read, and comparisons of rows by their single questions."""

import numpy as np
import pytest
from scipy import stats

from vlmslim.evaluation.errors import ConfigError
from vlmslim.leaderboard.comparison import compare
from vlmslim.leaderboard.samples import ScoredTask, UnscoredTask, answer_text, question_score, read_task, source_of
from vlmslim.leaderboard.significance import wilson
from vlmslim.leaderboard.task_groups import GROUPS, group_of


def samples(scores, pictures=None):
    """Make samples of one row: the answer is yes for a score above 0, and every question has its own picture."""
    pictures = pictures or range(len(scores))
    return [
        {"doc_id": i, "doc": {"image_id": picture}, "acc": score, "filtered_resps": ["yes" if score else "no"]}
        for i, (score, picture) in enumerate(zip(scores, pictures, strict=True))
    ]


def read(rows, task="t", higher_is_better=True, source=""):
    """Read one task of rows that are given as scores or as samples."""
    rows = {label: row if isinstance(row[0], dict) else samples(row) for label, row in rows.items()}
    return read_task(task, rows, "acc", higher_is_better, source)


def made(task, labels, scores, pictures):
    """Make a task whose answers are all the same."""
    return ScoredTask(task, {label: ["x"] * len(pictures) for label in labels}, np.stack(scores), pictures)


def compared(tasks, budgets=None, groups="general"):
    """Compare the rows of tasks, by default as one budget; all tasks are in one group unless groups say otherwise."""
    budgets = budgets or [[label for label in tasks[0].labels if label != "none"]]
    groups = dict.fromkeys((task.task for task in tasks), groups) if isinstance(groups, str) else groups
    return compare(tasks, budgets, "none", groups)


@pytest.fixture
def few_swaps(monkeypatch):
    """Permutation tests are quick, for tests that do not look at their p values, or need no precision."""
    monkeypatch.setattr("vlmslim.leaderboard.comparison.SWAPS", 999)


# ---------------------------------------------------------------------- samples


def test_answers_are_the_text_or_the_chosen_option():
    assert answer_text({"filtered_resps": [" Two\n dogs "]}) == answer_text({"resps": ["two dogs"]}) == "two dogs"
    assert answer_text({"filtered_resps": [[2.5, False], [0.3, True], [4.0, False]]}) == "option 1"
    assert answer_text({"filtered_resps": [[2.5, False]]}) == "option false"
    assert answer_text({"filtered_resps": [["a", "b"]]}) == '["a", "b"]'  # several rounds


def test_scores_of_questions():
    assert question_score({"acc": True}, "acc") == 1
    assert question_score({"f1": {"score": 0.5, "question_id": 3}}, "f1") == 0.5
    assert question_score({"cider": {"pred": "a"}}, "cider") is None
    assert question_score({"acc": float("nan")}, "acc") is None


@pytest.mark.parametrize("change", [lambda rows: rows[1:], lambda rows: rows[::-1]])
def test_answers_to_different_questions_cannot_be_paired(change):
    rows = {"none": samples([1, 0, 1]), "a": change(samples([1, 0, 1]))}
    with pytest.raises(ConfigError, match="none and a answered different questions of t"):
        read(rows)


def test_a_metric_of_some_questions_is_tested_on_them():
    """Some metrics cover a part of the questions, as lmms-eval logs MME and SEED-Bench."""
    rows = {"none": samples([1.0] * 12, [i // 2 for i in range(12)]), "a": samples([0.0] * 12)}
    for row in rows.values():
        for i in (0, 5):
            row[i]["other"] = row[i].pop("acc")
    task = read(rows)
    assert task.scores.shape == (2, 10) and len(task.pictures) == len(task.answers["a"]) == 10
    del rows["a"][1]["acc"]  # one row has no score where the other has one
    assert isinstance(read(rows), UnscoredTask)


@pytest.mark.parametrize("name", ["video", "videoID", "video_name", "video_path"])
def test_questions_about_one_video_belong_together(name):
    rows = {label: samples([1.0, 0.0]) for label in ("none", "a")}
    for row in rows.values():
        for i, sample in enumerate(row):
            sample["doc"] = {name: "clip", "question_id": i}
    assert len(set(read(rows).pictures)) == 1


def test_tasks_of_one_data_set_share_its_pictures():
    def source(**config):
        return source_of({"lmms_eval": {"configs": {"t": config}}}, "t")

    first = source(dataset_path="parquet", dataset_kwargs={"data_files": {"test": "/a/scenes/text.parquet"}})
    assert first == source(dataset_path="parquet", dataset_kwargs={"data_files": ["/a/scenes/count.parquet"]})
    assert first != source(dataset_path="parquet", dataset_kwargs={"data_files": {"test": "/a/pages/text.parquet"}})
    assert source(dataset_path="lmms-lab/POPE") == "lmms-lab/POPE"
    assert source() == "t"


# ---------------------------------------------------------------------- comparisons


def test_a_comparison():
    rng = np.random.default_rng(5)
    base = (rng.random(80) < 0.9).astype(float)
    bad = base * (rng.random(80) < 0.5)
    result = compared([read({"none": base, "same": base, "bad": bad})], groups="OCR")
    same, bad_pair = result.pair("same", "none", "t"), result.pair("bad", "none", "t")
    assert (same.difference, same.p, same.significant) == (0, 1, False)
    assert bad_pair.difference == pytest.approx(bad.mean() - base.mean())
    assert bad_pair.significant and not bad_pair.better
    reverse = result.pair("none", "bad", "t")
    assert reverse.difference == -bad_pair.difference and reverse.better
    assert (reverse.low, reverse.high) == (-bad_pair.high, -bad_pair.low)
    assert (reverse.first, reverse.second) == ("none", "bad")
    assert not result.pair("none", "same", "t").better
    assert str(result.pair("none", "same", "t").difference) == "0.0"  # not -0.0
    assert result.pair("same", "bad", None).difference == pytest.approx((base.mean() - bad.mean()) / base.mean())
    assert result.pair("same", "nowhere", None) is None
    assert result.ranks == {"same": 1, "bad": 2}
    assert result.stability["same", "t"].loyalty == 1
    stability = result.stability["bad", "t"]
    assert (stability.lost, stability.won) == (pytest.approx((bad < base).mean()), 0)
    assert result.groups["bad", "OCR"] == result.relative["bad"]
    low, high = result.relative["bad"]
    assert low < bad.mean() / base.mean() < high
    assert "none" not in result.relative  # always 1, which has no interval


def test_p_values_are_corrected_for_all_pairs_of_a_budget():
    """Two budgets of two and one rows: with the unpatched model these are families of three and one pairs."""
    scores = {"none": [1.0] * 6, "a": [1.0] * 5 + [0.0], "b": [0.0] * 6, "c": [0.0] * 6}
    result = compared([read(scores)], [["a", "b"], ["c"]])
    assert result.pair("b", "none", "t").p == result.pair("c", "none", "t").p == pytest.approx(1 / 64)
    assert result.pair("b", "none", "t").p_adjusted == pytest.approx(3 / 64)
    assert result.pair("c", "none", "t").p_adjusted == pytest.approx(1 / 64)
    assert result.pair("a", "c", "t") is None


def test_where_lower_is_better_the_lower_one_wins():
    rows = {"none": [1.0] * 40, "a": [0.5] * 40, "b": [2.0] * 40}
    result = compared([read(rows, higher_is_better=False)])
    assert result.pair("a", "b", "t").better and result.pair("a", "b", None).better
    assert result.ranks == {"a": 1, "b": 2}
    assert (result.stability["b", "t"].lost, result.stability["a", "t"].won) == (1, 1)


def test_where_lower_is_better_nothing_is_inverted():
    rows = {"none": [1.0, 3.0], "a": [0.0, 0.0], "b": [1.0, 2.0]}
    result = compared([read(rows, higher_is_better=False)])
    assert result.pair("a", "none", None).difference == pytest.approx(1)
    low, high = result.relative["b"]
    assert (low + high) / 2 == pytest.approx(2 - 1.5 / 2)


def test_pictures_shared_by_tasks_count_once():
    """Two tasks about the same pictures are no more evidence than one; two tasks about different pictures are."""
    rows = {"none": [1.0] * 6, "a": [1.0] * 5 + [0.0], "b": [0.0] * 4 + [1.0, 0.0]}

    def average(first, second):
        tasks = [read(rows, task, source=source) for task, source in (("t", first), ("u", second))]
        return compared(tasks).pair("a", "b", None).p

    assert average("set", "set") == 0.125
    assert average("one set", "another set") < 0.125


def test_questions_about_one_picture_are_swapped_together():
    rows = {"none": samples([1.0] * 10, [i // 5 for i in range(10)]), "a": samples([0.0] * 10)}
    assert compared([read(rows)]).pair("a", "none", "t").p == 0.5  # two pictures: 2 of 4 patterns
    rows["none"] = samples([1.0] * 10)
    assert compared([read(rows)]).pair("a", "none", "t").p == pytest.approx(1 / 1024)  # McNemar, ten pictures


def test_graded_scores_have_students_interval_and_right_or_wrong_ones_wilsons():
    rng = np.random.default_rng(12)
    graded, right = rng.random(100), (rng.random(100) < 0.95).astype(float)
    result = compared([read({"none": graded, "a": graded}), read({"none": right, "a": right}, "u")])
    np.testing.assert_allclose(
        result.intervals["a", "t"], stats.ttest_1samp(graded, 0).confidence_interval(0.95), atol=1e-9
    )
    low, high = result.intervals["a", "u"]
    assert right.mean() - low > 1.3 * (high - right.mean())  # Wilson's interval leans to 50 %


def test_differences_and_averages_have_students_interval_over_pictures():
    """Three questions about each of 7 pictures: the difference is that of the pictures' means."""
    rng = np.random.default_rng(13)
    pictures = [i // 3 for i in range(21)]
    base, ours = (rng.random((2, 21)) < [[0.9], [0.5]]).astype(float)
    rows = {"none": samples(base, pictures), "a": samples(ours, pictures)}
    result = compared([read(rows)])
    pair, moved = result.pair("a", "none", "t"), (ours - base).reshape(7, 3).mean(1)
    np.testing.assert_allclose((pair.low, pair.high), stats.ttest_1samp(moved, 0).confidence_interval(0.95), atol=1e-9)
    jackknife = np.array([(ours[k].sum() / base[k].sum()) for k in (np.array(pictures) != i for i in range(7))])
    error = np.sqrt(6 / 7 * ((jackknife - jackknife.mean()) ** 2).sum())
    low, high = result.relative["a"]
    assert (low + high) / 2 == pytest.approx(ours.mean() / base.mean())
    assert (high - low) / 2 == pytest.approx(stats.t.ppf(0.975, 6) * error, rel=0.1)


def test_a_single_picture_has_no_interval():
    rows = {"none": samples([0.5, 0.9], [1, 1]), "a": samples([0.2, 0.4], [1, 1])}
    result = compared([read(rows)])
    assert not result.intervals and not result.relative and result.pair("a", "none", "t").low is None


def test_a_p_value_at_the_limit_of_the_swaps_is_flagged(few_swaps):
    """Twenty pictures of two questions are swapped at random; nine in all ways."""

    def pair(pictures):
        own = [i // 2 for i in range(2 * pictures)]
        rows = {"none": samples([1.0] * 2 * pictures, own), "a": samples([0.0] * 2 * pictures, own)}
        return compared([read(rows)]).pair("a", "none", "t")

    assert pair(20).at_limit and pair(20).p == 1 / 1000
    assert not pair(9).at_limit and pair(9).p == 2 / 512


def test_questions_about_one_picture_widen_wilsons_interval():
    """Twelve pictures with five questions each, right or wrong together, are worth about twelve questions."""
    right = np.repeat([1.0] * 9 + [0.0] * 3, 5)
    rows = {label: samples(right, [i // 5 for i in range(60)]) for label in ("none", "a")}
    expected = wilson(np.array(0.75), np.array(60 * 11 / 59), clusters=12)
    np.testing.assert_allclose(compared([read(rows)]).intervals["a", "t"], expected, atol=1e-9)


def test_a_task_of_few_pictures_is_not_narrowed_by_a_task_of_many():
    small, large = np.array([0.1, 0.4, 0.6, 0.9]), np.linspace(0, 1, 100)
    tasks = [read({"none": small, "a": small}, source="few"), read({"none": large, "a": large}, "u", source="many")]
    expected = stats.ttest_1samp(small, 0).confidence_interval(0.95)
    np.testing.assert_allclose(compared(tasks).intervals["a", "t"], expected, atol=1e-9)


def test_each_group_has_an_interval_of_its_own_tasks():
    sure, unsure = [1.0] * 40, [1.0, 0.0] * 20
    tasks = [read({"none": sure, "a": row}, name) for name, row in (("t", [1.0] * 39 + [0.0]), ("u", unsure))]
    groups = compared(tasks, groups={"t": "OCR", "u": "general"}).groups
    assert groups["a", "OCR"][0] > 0.9 and groups["a", "general"][1] < 0.7


def test_a_question_without_a_score_is_not_tested_but_its_answer_is_compared():
    rows = {"none": samples([1.0, 1.0]), "a": samples([1.0, 0.0])}
    for sample in rows["none"] + rows["a"]:
        sample["acc"] = {"pred": "x"}
    result = compared([read(rows)])
    assert result.untested == ["t"] and not result.pairs and not result.ranks
    stability = result.stability["a", "t"]
    assert (stability.loyalty, stability.lost, stability.won) == (0.5, None, None)


def test_a_task_the_unpatched_model_fails_is_compared_but_not_averaged():
    result = compared([read({"none": [0.0] * 9, "a": [1.0] * 9}), read({"none": [1.0] * 9, "a": [1.0] * 9}, "u")])
    assert result.pair("a", "none", "t").significant
    assert result.averaged == ["u"] and result.pair("a", "none", None).difference == 0


def test_a_row_without_every_task_is_not_ranked():
    tasks = [read({"none": [1.0] * 9, "a": [0.0] * 9, "b": [1.0] * 9}), read({"none": [1.0] * 9, "a": [0.0] * 9}, "u")]
    result = compared(tasks)
    assert result.ranks == {"a": 1} and result.pair("a", "b", "t") and not result.pair("a", "b", None)


# ---------------------------------------------------------------------- promises


def test_a_table_has_all_of_its_comparisons():
    """Two budgets of thirteen methods, two tasks and the average, each pair of the fourteen rows once."""
    rng = np.random.default_rng(6)
    labels = [f"{m}-{b}" for b in (64, 16) for m in range(13)]
    tasks = [read({label: (rng.random(40) < 0.6) * 1.0 for label in ["none", *labels]}, name) for name in "tu"]
    result = compared(tasks, [labels[:13], labels[13:]])
    assert len(result.pairs) == 2 * 3 * 14 * 13 / 2
    assert len(result.ranks) == 26


def test_differences_stay_significant_among_many_rows():
    rng = np.random.default_rng(9)
    labels = [f"m{i}" for i in range(50)]
    rows = {label: (rng.random(60) < (0.95 if i % 2 else 0.1)) * 1.0 for i, label in enumerate(["none", *labels])}
    result = compared([read(rows)])
    assert result.pair("m0", "m1", None).significant and set(result.ranks.values()) == {1, 26}


def test_the_average_covers_where_tasks_share_some_of_their_pictures(few_swaps):
    """Each of six tasks asks about 25 of 40 pictures, so hardly two pictures are in exactly the same tasks."""
    rng = np.random.default_rng(7)
    members = [rng.choice(40, 25, replace=False) for _ in range(6)]
    widths, estimates = [], []
    for _ in range(60):
        hard = rng.normal(size=40)
        tasks = []
        for t, own in enumerate(members):
            graded = 1 / (1 + np.exp(-(0.8 + hard[own] + 0.3 * rng.normal(size=25))))
            tasks.append(made(f"t{t}", ["none", "a"], [np.ones(25), graded], [f"set {picture}" for picture in own]))
        low, high = compared(tasks).relative["a"]
        widths.append(high - low)
        estimates.append(np.mean([task.row("a").mean() for task in tasks]))
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.std(estimates, ddof=1), rel=0.2)


def test_luck_of_the_unpatched_model_does_not_count_for_a_method(few_swaps):
    """On many small and hard tasks, an equally good row seldom differs from the unpatched model."""
    rng = np.random.default_rng(8)
    found = 0
    for _ in range(100):
        tasks = [
            made(f"t{t}", ["none", "a"], (rng.random((2, 50)) < 0.1) * 1.0, [f"t{t} {q}" for q in range(50)])
            for t in range(20)
        ]
        found += compared(tasks).pair("a", "none", None).p < 0.05
    assert found <= 11  # about 20 if the weights came from the unpatched model alone


def test_intervals_of_differences_cover(few_swaps):
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(100):
        picture = rng.normal(size=(1, 80))
        scores = 1 / (1 + np.exp(-(picture + 0.5 * rng.normal(size=(2, 80)) + np.array([[0.0], [0.3]]))))
        pair = compared([made("t", ["none", "a"], scores, [str(i) for i in range(80)])]).pair("a", "none", "t")
        assert pair.low < pair.difference < pair.high
        covered += pair.low < 0.0597 < pair.high  # the mean of the difference under this model
    assert 85 <= covered <= 100


# ---------------------------------------------------------------------- groups of tasks


@pytest.mark.parametrize(
    "group, tasks",
    [
        ("hallucination", "pope pope_adv scenes_presence"),
        ("OCR", "textvqa_val docvqa_val_lite ocrbench scenes_text documents_total seedbench_2_plus"),
        ("fine detail", "scenes_count mme_realworld_lite"),
        ("general", "mme gqa seedbench popeye"),
    ],
)
def test_groups_of_tasks(group, tasks):
    assert group in GROUPS and {group_of(task) for task in tasks.split()} == {group}
