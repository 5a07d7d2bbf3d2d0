"""The demo in a real browser: it loads from this machine alone, and each visitor sees their own answers."""

import re

import pytest

from vlmslim.demo.page import build, how, table_of
from vlmslim.pictures.ask import Answer


@pytest.fixture(scope="module")
def address(questions):
    page = build(questions.model, questions.processor, "bundled/tiny-llava")
    _, address, _ = page.launch(**how(), prevent_thread_lock=True)
    yield address
    page.close()


def captions(page) -> list[str]:
    return [text for text in page.locator(".caption-label").all_inner_texts() if "visual tokens" in text]


def wait_for(page, text: str) -> None:
    page.get_by_text(text).first.wait_for(timeout=120_000)


def choose(page, label: str, option: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=option, exact=True).click()


@pytest.mark.slow
def test_a_question_is_answered_layer_by_layer(page, address):
    assert address.startswith("http://127.0.0.1:")
    page.goto(address)
    page.get_by_role("button", name="Ask").click()
    wait_for(page, "fastv: 36 of 144 visual tokens")
    assert captions(page) == [
        f"{name} of 144 visual tokens" for name in ("unpatched: 144", "divprune: 36", "fastv: 36")
    ]
    cells = page.locator("table tbody td").all_inner_texts()
    assert {"unpatched", "divprune", "fastv", "144 of 144", "36 of 144", "63.0"} <= {cell.strip() for cell in cells}
    assert sum(bool(re.search(r"\d ms \(\d+\.\d\dx\)", cell)) for cell in cells) >= 3, (
        "times beside the unpatched model"
    )
    layer = page.get_by_label("number input for Decoder layer")
    layer.fill("1")
    layer.press("Enter")
    layer.blur()
    wait_for(page, "fastv: 144 of 144 visual tokens")
    assert captions(page)[1:] == ["divprune: 36 of 144 visual tokens", "fastv: 144 of 144 visual tokens"]


@pytest.mark.slow
def test_a_picture_that_cannot_be_read(page, address, tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    page.goto(address)
    page.get_by_label("Clear").or_(page.get_by_label("Remove Image")).first.click()
    page.locator("input[type=file]").first.set_input_files(tmp_path / "text.png")
    page.get_by_role("button", name="Ask").click()
    wait_for(page, "cannot be read as a picture")
    page.errors.clear()  # a browser says so too of a picture that it cannot show


@pytest.mark.slow
def test_two_visitors_at_once(chromium, address):
    pages = [chromium.new_page() for _ in range(2)]
    for visitor, method in zip(pages, ("random", "uniform"), strict=True):
        visitor.goto(address)
        choose(visitor, "Method", method)
        choose(visitor, "Second method", "–")
    for visitor in pages:
        visitor.get_by_role("button", name="Ask").click()
    for visitor, method in zip(pages, ("random", "uniform"), strict=True):
        wait_for(visitor, f"{method}: 36 of 144 visual tokens")
        assert captions(visitor) == ["unpatched: 144 of 144 visual tokens", f"{method}: 36 of 144 visual tokens"]
        visitor.close()


def test_an_answer_with_markup_stays_text():
    receipt = {"kept": 36.0, "visual_tokens": 144.0, "equivalent_tokens": 36.0}
    table = table_of([Answer("divprune", "<img src=x onerror=alert(1)>", [], receipt, 1e9, 10.0, 20.0, 1)])
    assert "<td>&lt;img src=x onerror=alert(1)&gt;</td>" in table
