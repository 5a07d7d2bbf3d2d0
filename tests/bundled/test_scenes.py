"""The scene generator: deterministic, true answers, training and test sources apart."""

import json
import re

import numpy as np
import pytest
import scenes as S

SEEDS = range(60)


@pytest.fixture(scope="module", params=["train", "test"])
def many(request):
    return [S.make_scene(seed, request.param) for seed in SEEDS]


def questions(scenes, task, repeats=4):
    rng = np.random.default_rng(0)
    out = [(s, q) for s in scenes for _ in range(repeats) if (q := S.ask(s, task, rng))]
    assert len(out) > 50
    return out


def test_same_seed_same_scene():
    a, b, c = S.make_scene(3, "train"), S.make_scene(3, "train"), S.make_scene(4, "train")
    assert a.image.tobytes() == b.image.tobytes() and a.items == b.items and (a.labels == b.labels).all()
    assert a.image.tobytes() != c.image.tobytes()
    assert a.image.size == (S.SIZE, S.SIZE) and a.image.mode == "RGB"


def test_items_lie_inside_and_apart(many):
    for scene in many:
        assert 1 <= len(scene.items) <= 12
        covered = np.zeros((S.SIZE, S.SIZE), int)
        for item in scene.items:
            left, top, right, bottom = item.box
            assert 0 <= left < right <= S.SIZE and 0 <= top < bottom <= S.SIZE
            covered[top:bottom, left:right] += 1
        assert covered.max() == 1


def test_presence_answers(many):
    seen = set()
    for scene, q in questions(many, "presence"):
        name = re.match(r"Is there an? (\w+) in", q.text)[1]
        assert (q.answer == "yes") == any(i.name == name for i in scene.items if i.kind == "thing")
        if q.slice == "adversarial" and any(
            S.GROUPS[t] == S.GROUPS[name] for t in S.THINGS if t not in scene.named("thing")
        ):
            assert S.GROUPS[name] in {S.GROUPS[i.name] for i in scene.items if i.kind == "thing"}
        seen.add(q.slice)
    assert seen == {"yes", "random", "popular", "adversarial"}


def test_colour_count_text_and_detail_answers(many):
    for scene, q in questions(many, "colour"):
        (shape,) = [i for i in scene.items if f"the {i.name}?" in q.text and i.kind == "shape"]
        assert q.answer == shape.colour
    for scene, q in questions(many, "count"):
        name = re.search(r"does the (\w+) appear", q.text)[1]
        assert int(q.answer) == sum(i.name == name for i in scene.items if i.kind != "sign") > 0
    for scene, q in questions(many, "text"):
        assert [i.name for i in scene.items if i.kind == "sign"] == [q.answer]
    for scene, q in questions(many, "detail"):
        (thing,) = [i for i in scene.items if f"of the {i.name}?" in q.text]
        assert q.answer == thing.tag != ""


def test_spatial_and_side_answers(many):
    for scene, q in questions(many, "spatial"):
        tag = re.search(r"the tag (\d) on", q.text)[1]
        assert [i.name for i in scene.items if i.tag == tag] == [q.answer]
    for scene, q in questions(many, "side"):
        a, b = re.match(r"Is the (\w+) left, .* the (\w+)\?", q.text).groups()
        (ax, ay), (bx, by) = (next(i for i in scene.items if i.name == n).centre for n in (a, b))
        side = {"left": bx - ax, "right": ax - bx, "above": by - ay, "below": ay - by}
        assert max(side, key=side.get) == q.answer and side[q.answer] >= 30


def test_choice_has_one_true_option(many):
    for scene, q in questions(many, "choice"):
        there = {i.name for i in scene.items if i.kind == "thing"}
        assert len(set(q.choices)) == 4 and [c for c in q.choices if c in there] == [q.answer]
        assert all(c in q.text for c in q.choices)


def test_dense_labels_agree_with_items(many):
    for scene in many:
        assert scene.labels.shape == (S.GRID**2, len(S.LABELS))
        assert (scene.labels.max(0) < list(S.LABELS.values())).all()
        kinds = {S.KINDS[k] for k in np.unique(scene.labels[:, 0])} - {"none"}
        assert kinds <= {i.name for i in scene.items if i.kind != "sign"} | {"sign", "tag"}
        characters = {S.CHARACTERS[c - 1] for c in np.unique(scene.labels[:, 2]) if c}
        assert characters <= {c for i in scene.items for c in (i.name if i.kind == "sign" else i.tag)}


def test_sources_of_the_splits_are_disjoint():
    records = json.loads((S.BANK / "sources.json").read_text())
    assert all((S.BANK / r["file"]).exists() and r["licence"] and r["credit"] and r["source"] for r in records)
    train, test = S.load_bank("train"), S.load_bank("test")
    for kind in ("art", "background", "glyphs"):
        assert train[kind] and test[kind] and not set(train[kind]) & set(test[kind])
    for split in ("train", "test"):
        rng = np.random.default_rng(0)
        codes = [S.random_code(rng, split) for _ in range(50)]
        assert {S.code_split(c) for c in codes} == {split}
    with pytest.raises(ValueError, match="'train' or 'test'"):
        S.load_bank("val")
