"""The page generator: deterministic, answers true to the print, splits apart, geometry that of LLaVA-NeXT's anyres."""

import re

import numpy as np
import pages as P
import pytest
import scenes as S


@pytest.fixture(scope="module", params=["train", "test"])
def many(request):
    return [P.make_page(seed, request.param) for seed in range(80)]


def questions(pages, task, repeats=3):
    rng = np.random.default_rng(0)
    out = [(p, q) for p in pages for _ in range(repeats) if (q := P.ask(p, task, rng))]
    assert len(out) > 50
    return out


def text_of(marks):
    return "".join(m.char for m in sorted(marks, key=lambda m: (round(m.y), m.x)))


def lines(page):
    """Read what is printed, line by line: the marks of every height, from left to right."""
    out = {}
    for mark in sorted(page.marks, key=lambda m: (m.y, m.x)):
        out.setdefault(round(mark.y, 3), []).append(mark)
    return list(out.values())


def test_same_seed_same_page():
    a, b, c = P.make_page(3, "train"), P.make_page(3, "train"), P.make_page(4, "train")
    assert a.image.tobytes() == b.image.tobytes() and a.marks == b.marks and a.entries == b.entries
    assert a.image.tobytes() != c.image.tobytes() and a.image.mode == "RGB"


def test_keyvalue_answers_stand_after_their_key(many):
    for page, q in questions(many, "keyvalue"):
        key = re.fullmatch(r"What is the ([A-Z]+)\? Answer with the code\.", q.text)[1]
        initials = [e.key[0] for e in page.kind("pair")]
        assert len(set(initials)) == len(initials)
        below = page.image.width <= P.CROP
        printed = [text_of(line) for line in lines(page)]
        if below:
            at = printed.index(key)
            assert printed[at + 1] == q.answer
        else:
            assert any(key + q.answer in line for line in printed)


def test_table_answers_stand_in_their_row_and_under_their_head(many):
    for page, q in questions(many, "table"):
        row, column = re.match(r"What is in row ([A-Z]), column (\d)\?", q.text).groups()
        head = next(m for m in page.marks if m.char == column and m.column == int(column) and not m.owner)
        own = next(line for line in lines(page) if line[0].char == row and line[0].owner == row)
        cells = [m for m in own[1:] if abs(m.x - head.x) < page.image.width]
        start = min(range(len(cells)), key=lambda i: abs(cells[i].x - head.x))
        assert text_of(cells[start : start + len(q.answer)]) == q.answer
        assert abs(cells[start].x - head.x) < 8


def test_small_print_is_small_and_alone(many):
    for page, q in questions(many, "smallprint"):
        (line,) = [line for line in lines(page) if line[0].owner == "small"]
        (entry,) = page.kind("small")
        assert text_of(line) == entry.key + q.answer and entry.key in P.SMALL
        small = np.diff([m.x for m in line]).min()
        large = [np.diff([m.x for m in other]) for other in lines(page) if other[0].owner not in ("small", "")]
        assert small < 0.9 * min(steps.min() for steps in large if len(steps))


def test_presence_answers(many):
    seen = set()
    for page, q in questions(many, "presence"):
        key = re.match(r"Is ([A-Z]+) on the page", q.text)[1]
        keys = {e.key for e in page.kind("pair")}
        assert (q.answer == "yes") == (key in keys)
        assert q.slice == ("yes" if key in keys else "alike" if key[0] in {k[0] for k in keys} else "other")
        seen.add(q.slice)
    assert seen == {"yes", "alike", "other"}


def test_print_is_where_the_marks_say(many):
    for page in many[:30]:
        grey = np.asarray(page.image.convert("L"), float)
        for mark in page.marks:
            x, y = round(mark.x), round(mark.y)
            own = grey[y - 7 : y + 8, max(x - 7, 0) : x + 8]
            assert own.max() - own.min() > 40, mark  # ink on paper


def test_nothing_crosses_a_crops_edge(many):
    for page in many:
        left = (P.CROP * page.crops[0] - page.image.width) // 2
        top = (P.CROP * page.crops[1] - page.image.height) // 2
        for mark in page.marks:
            assert 4 < mark.x < page.image.width - 4 and 8 < mark.y < page.image.height - 8
            assert abs((mark.x + left + P.CROP / 2) % P.CROP - P.CROP / 2) > 4 or page.crops[0] == 1
            assert abs((mark.y + top + P.CROP / 2) % P.CROP - P.CROP / 2) > 4 or page.crops[1] == 1


def test_labels_lie_on_the_mosaic_that_transformers_builds(many):
    from transformers.image_processing_utils import select_best_resolution

    assert len({p.crops for p in many}) == 4
    for page in many:
        size = page.image.size[::-1]
        assert list(select_best_resolution(size, P.PINPOINTS)) == [P.CROP * n for n in page.crops[::-1]]
        labels = P.labels(page)
        assert (labels.max((0, 1)) < list(P.LABELS.values())).all()
        assert (labels[..., :2] > 0).sum() == len(page.marks)  # none lost in the margins that unpadding cuts
        got = sorted(S.CHARACTERS[c - 1] for c in labels[..., :2].ravel() if c)
        assert got == sorted(m.char for m in page.marks)


def test_unpadding_agrees_with_transformers(many):
    import torch
    from transformers.models.llava_next.modeling_llava_next import unpad_image

    for page in many:
        rows, columns = page.crops[1] * P.SIDE, page.crops[0] * P.SIDE
        grid = torch.arange(rows * columns).view(1, rows, columns)
        kept_columns, kept_rows = P.unpadded(page.image.size, page.crops)
        assert torch.equal(unpad_image(grid, page.image.size[::-1])[0], grid[0, kept_rows, kept_columns])


def test_sources_of_the_splits_are_disjoint():
    fonts = {split: {P.make_page(i, split).font for i in range(60)} for split in ("train", "test")}
    assert fonts["train"] and fonts["test"] == set(S.load_bank("test")["glyphs"])
    assert not fonts["train"] & fonts["test"]
    for split in fonts:
        values = [e.value for i in range(30) for e in P.make_page(i, split).entries]
        assert {S.code_split(v) for v in values} == {split}
