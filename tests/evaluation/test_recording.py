"""Recorded tokens that the report draws: those that each row kept of flipped questions, on the bundled model."""

import base64

import numpy as np
import pytest

pytest.importorskip("lmms_eval", reason="the extra vlmslim[eval] is not installed")

from evaluation_doubles import FakeHarness, write_config  # noqa: E402

from vlmslim.evaluation import harness as harness_module  # noqa: E402
from vlmslim.evaluation.config import load_config  # noqa: E402
from vlmslim.evaluation.errors import ConfigError  # noqa: E402
from vlmslim.evaluation.recording import add_pictures, cut_of, rectangles  # noqa: E402
from vlmslim.evaluation.run import run  # noqa: E402
from vlmslim.evaluation.store import Store  # noqa: E402
from vlmslim.leaderboard.board import Leaderboard  # noqa: E402
from vlmslim.leaderboard.flips import flipped  # noqa: E402
from vlmslim.leaderboard.report import write_folder  # noqa: E402
from vlmslim.pictures.trace import Cut  # noqa: E402

TASKS = ["scenes_presence", "scenes_choice"]  # one generates its answers, one chooses among four


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """A run of a selector, of a method between layers, and of a merger."""
    changes = {
        "model": {"pretrained": "bundled/tiny-llava", "device": "cpu"},
        "tasks": TASKS,
        "budgets": [16],
        "methods": ["divprune", "fastv", "aim"],
        "baselines": False,
        "limit": 6,
        "batch_size": 6,
        "timing": None,
        "report": {"samples": 4},
    }
    config = load_config(write_config(tmp_path_factory.mktemp("run"), **changes))
    run(config)
    return config.output


@pytest.fixture(scope="module")
def records(output):
    store = Store(output)
    return {(task, one): store.tokens(task, one) for task in TASKS for one in store.questions_with_tokens(task)}


def places(cut: dict, tokens: int) -> np.ndarray:
    """The token into which each token of an image went, or -1."""
    if cut["into"] is not None:
        return np.frombuffer(base64.b64decode(cut["into"]), "<i2")
    bits = np.unpackbits(np.frombuffer(base64.b64decode(cut["kept"]), np.uint8), bitorder="little")[:tokens]
    return np.where(bits, np.arange(tokens), -1)


def test_the_questions_are_some_that_a_row_flipped(output, records):
    assert 0 < len(records) <= 4
    for asked in Leaderboard.read(output).questions():
        for (task, question), record in records.items():
            if task == asked.task:
                at = asked.ids.index(question)
                assert len({own[at] for own in asked.scores.values()}) > 1
                assert set(record["rows"]) == {"none", "divprune-16", "fastv-16", "aim-16"}


def test_what_is_drawn_is_what_the_receipt_counts(records):
    for record in records.values():
        for row in record["rows"].values():
            (image,), visual = row["images"], [rows[0] for rows in row["prefill"]["visual"]]
            (counted,) = row["prefill"]["images"][0]
            assert image["cuts"][0]["count"] == counted["kept"] and image["depth"] == len(visual)
            for cut in image["cuts"]:
                into = places(cut, counted["tokens"])
                assert len(np.unique(into[into >= 0])) == cut["count"] == visual[cut["first"]]
            assert image["cuts"][-1]["count"] == visual[-1]
    merged = [
        row["images"][0]["cuts"][0] for r in records.values() for name, row in r["rows"].items() if name == "aim-16"
    ]
    assert merged and all(cut["into"] for cut in merged)


def test_the_ledger_counts_what_each_method_computes(records):
    for record in records.values():
        flops = {label: row["flops"] for label, row in record["rows"].items()}
        assert flops["none"]["method"] == 0 < flops["divprune-16"]["method"]
        assert (
            flops["divprune-16"]["language_model"]
            < flops["fastv-16"]["language_model"]
            < flops["none"]["language_model"]
        )
        assert len({own["tower"] for own in flops.values()}) == 1


def test_the_rectangles_are_the_tokens(records):
    for record in records.values():
        (image,) = record["images"]
        rects = np.array(image["rects"])
        assert sorted(rects[:, 0]) == list(range(144)) and image["src"].startswith("data:image/webp;base64,")
        assert (rects[:, 3] * rects[:, 4]).sum() == image["width"] * image["height"]


def test_shared_tokens_list_their_parts():
    made_of = np.array([[0.5, 0, 0.5, 0], [1e-38, 2, 0, 0], [0, 0, 0, 1]], np.float32)
    cut = cut_of(Cut(0, "pool", 3, np.array([0, 1, 0, 2]), made_of=made_of))
    assert places(cut, 4).tolist() == [0, 1, 0, 2]
    token, patch, level = (
        np.frombuffer(base64.b64decode(cut["parts"][name]), kind).tolist()
        for name, kind in [("token", "<i2"), ("patch", "<i2"), ("level", "u1")]
    )
    assert [token, patch, level] == [[0, 0, 1, 1, 2], [0, 2, 0, 1, 3], [255, 255, 1, 255, 255]]


def test_rectangles_of_any_map():
    token = np.array([[0, 0, -2, 5], [0, 0, -2, 5], [1, -1, -1, 5]])
    drawn = np.full(token.shape, -2)
    for number, x, y, width, height in rectangles(token):
        assert (drawn[y : y + height, x : x + width] == -2).all()  # they do not overlap
        drawn[y : y + height, x : x + width] = number
    assert (drawn == token).all()


@pytest.mark.slow
def test_a_flipped_answer_opens_its_tokens(page, output, records):
    task, question = next(iter(records))
    page.goto(f"{(output / 'report/index.html').as_uri()}#task={task}&row=fastv-16&against=aim-16&outcome=all")
    page.locator("#list tbody tr", has=page.locator(f"th:text-is('{question}')")).get_by_role("button").click()
    page.wait_for_selector("#question[open] svg")
    sides = page.locator("#sides article")
    assert sides.locator("h3").all_inner_texts() == ["fastv-16", "aim-16"]
    fastv, aim = sides.all()
    assert fastv.locator(".dropped").count() == 144 - 16
    assert fastv.get_by_role("img").get_attribute("aria-label") == (
        "fastv-16, layer 7: 16 of 144 visual tokens, after fastv"
    )
    layer = fastv.get_by_label("decoder layer, fastv-16")
    layer.fill("1")
    assert fastv.locator(".dropped").count() == 0
    layer.press("ArrowRight")  # layer 2 is the first that sees fewer
    assert fastv.locator(".dropped").count() == 144 - 16
    fastv.get_by_label("scores").check()
    assert fastv.locator(".score").count() == 144
    (cut, *_) = records[task, question]["rows"]["aim-16"]["images"][0]["cuts"]
    sizes = np.bincount(places(cut, 144))
    aim.get_by_label("decoder layer, aim-16").fill("0")
    assert aim.locator(".merged").count() == sizes[sizes > 1].sum()
    aim.get_by_label("only token").fill(str(sizes.argmax() + 1))
    assert aim.locator(".part").count() == sizes.max()
    assert f"token {sizes.argmax() + 1} is made of {sizes.max()}" in aim.locator("output").inner_text()
    counted = records[task, question]["rows"]["aim-16"]["prefill"]["images"][0][0]["kept"]
    assert aim.locator("dt:text-is('sent to the language model') + dd").inner_text() == str(counted)
    assert "total" in aim.get_by_role("table").inner_text()


def test_the_page_has_the_recorded_questions(output, records):
    names = {path.stem for path in (output / "report/data").glob("tokens-*")}
    assert len(names) == len(records)


def test_what_is_there_is_not_recorded_again(output, records, monkeypatch):
    monkeypatch.setattr(harness_module.Harness, "load", lambda self: pytest.fail("the checkpoint was loaded"))
    assert add_pictures(output, len(records)).directory == output


def test_another_checkpoint_is_refused(tmp_path):
    config = load_config(write_config(tmp_path))
    run(config, harness=FakeHarness())
    with pytest.raises(ConfigError, match="tiny is not the checkpoint that it was in the run"):
        add_pictures(config.output, 5, harness=FakeHarness(identity="weights-2"))


def test_a_row_that_was_evaluated_again_shows_no_old_tokens(tmp_path):
    config = load_config(write_config(tmp_path))
    board, store = run(config, harness=FakeHarness()), Store(config.output)
    prefill = {"images": [[{"tokens": 144, "requested": 64, "kept": 64}]], "visual": [[64]], "text": [20], "kv": [84]}
    row = {"images": [], "prefill": prefill, "flops": {"language_model": 1}}
    hashes = {"none": store.samples_hash("none", "count"), "random-64": "of old samples"}
    store.save_tokens("count", 2, {"images": [], "rows": dict.fromkeys(hashes, row), "samples_sha256": hashes})
    folder = write_folder(board, tmp_path / "page").parent
    text = (folder / "data/tokens-0-2.js").read_text()
    assert text.count('"receipt"') == 1 and '"rows": [{"images"' in text


def test_flips_are_chosen_of_every_row_in_turn(tmp_path):
    right = {"none": (4, 2), "random-64": (2, 2), "divprune-64": (3, 2), "random-16": (4, 3), "divprune-16": (4, 0)}
    scores = {(label, task): n for label, own in right.items() for task, n in zip(("count", "text"), own, strict=True)}
    board = run(load_config(write_config(tmp_path)), harness=FakeHarness(scores=scores))
    # in turn: random-64 lost count 2, divprune-64 count 3, random-16 won text 2, divprune-16 lost text 0; then the rest
    assert flipped(board, 3) == {"count": [2, 3], "text": [2]}
    assert flipped(board, 4) == {"count": [2, 3], "text": [0, 2]}
    assert flipped(board, 100) == {"count": [2, 3], "text": [0, 1, 2]}
    assert flipped(board, 0) == {}
