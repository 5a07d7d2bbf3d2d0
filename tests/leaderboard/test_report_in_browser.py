"""The page of a leaderboard in a real browser: what a reader can do with it, by mouse and by keyboard."""

from dataclasses import replace

import pytest
from evaluation_doubles import FakeHarness, write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.report import write_single

pytestmark = pytest.mark.slow  # a browser takes seconds to start

MARKUP = "<img src=x onerror=alert(1)>"
RIGHT = {
    "none": 54,
    "divprune-64": 48,
    "divprune-16": 40,
    "fastv-64": 50,
    "fastv-16": 18,
    "random-64": 20,
    "random-16": 9,
}


class Hostile(FakeHarness):
    """Asks and answers in markup."""

    def evaluate(self, variant, task):
        cell = super().evaluate(variant, task)
        told = [
            {"arguments": [f"{MARKUP} {s['doc_id']}?"], "resps": [[s["filtered_resps"][0] + MARKUP]]}
            for s in cell.samples
        ]
        answered = [s | t | {"filtered_resps": t["resps"][0]} for s, t in zip(cell.samples, told, strict=True)]
        return replace(cell, samples=answered)


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    tasks = ["count", MARKUP]
    scores = {(label, task): right for label, right in RIGHT.items() for task in tasks}
    config = write_config(folder, tasks=tasks, methods=["divprune", "fastv"], model={"pretrained": "<b>tiny</b>"})
    run(load_config(config), harness=Hostile(scores=scores, questions=60))
    return folder / "out"


@pytest.fixture(params=["folder", "single"])
def file(request, output, tmp_path):
    if request.param == "folder":
        return output / "report/index.html"
    return write_single(Leaderboard.read(output), tmp_path / "board.html")


def column(page, title: str, number: int) -> list[str]:
    """Return the visible texts of one column of a table, from top to bottom."""
    lines = page.locator(f"section:has(> h2:text-is('{title}')) tbody tr:visible")
    return [line.locator("th, td").nth(number).inner_text() for line in lines.all()]


def header(page, title: str, name: str):
    return page.get_by_role("region", name=title, exact=True).get_by_role("columnheader", name=name)


def test_tables_sort_by_mouse_and_keyboard(page, output):
    page.goto((output / "report/index.html").as_uri())
    before = column(page, "Scores", 0)
    assert before == ["none", "random-64", "divprune-64", "fastv-64", "random-16", "divprune-16", "fastv-16"]
    count = header(page, "Scores", "count")
    count.get_by_role("button").click()
    assert count.get_attribute("aria-sort") == "descending"
    assert column(page, "Scores", 0)[1:4] == ["fastv-64", "divprune-64", "random-64"]  # each budget by itself
    page.get_by_label("sort all budgets together").check()
    assert column(page, "Scores", 0) == sorted(RIGHT, key=RIGHT.get, reverse=True)
    count.get_by_role("button").press("Enter")
    assert count.get_attribute("aria-sort") == "ascending"
    assert column(page, "Scores", 0) == sorted(RIGHT, key=RIGHT.get)
    count.get_by_role("button").press("Enter")
    assert count.get_attribute("aria-sort") == "none" and column(page, "Scores", 0) == before
    header(page, "Scores", "rank").get_by_role("button").click()
    header(page, "Scores", "rank").get_by_role("button").click()
    assert column(page, "Scores", -1)[0] == "1" and column(page, "Scores", -1)[-1] == "–"  # a dash is no number


def test_filters_filter_all_tables_and_the_chart(page, output):
    page.goto((output / "report/index.html").as_uri())
    page.get_by_label("Methods", exact=True).fill("fastv, none")
    assert column(page, "Scores", 0) == ["none", "fastv-64", "fastv-16"] == column(page, "Cost", 0)
    assert page.locator("#shown").inner_text() == "3 of 7 rows"
    page.get_by_label("16", exact=True).uncheck()
    assert column(page, "Scores", 0) == ["none", "fastv-64"]
    page.get_by_text("The chart as a table").click()
    assert page.locator("#points tbody th").all_inner_texts() == ["none", "fastv-64"]
    page.wait_for_selector("#plot .point")
    assert page.locator("#plot .points .point").count() == 2
    page.get_by_label("Methods", exact=True).fill("zzz")
    assert page.locator("#shown").inner_text() == "0 of 7 rows: change the filter to see some"
    assert page.locator("#front").inner_text() == "No row on the front passes the filter."


def test_no_label_of_the_chart_covers_another(page, output):
    page.goto((output / "report/index.html").as_uri())
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_selector("#plot .textpoint")
        boxes = [label.bounding_box() for label in page.locator("#plot .textpoint:visible").all()]
        boxes = [(b["x"], b["y"], b["x"] + b["width"], b["y"] + b["height"]) for b in boxes if b and b["width"]]
        assert len(boxes) >= 3
        for i, (left, top, right, below) in enumerate(boxes):
            assert all(right <= b[0] or left >= b[2] or below <= b[1] or top >= b[3] for b in boxes[i + 1 :])


def test_the_chart_switches_its_axes(page, output):
    page.goto((output / "report/index.html").as_uri())
    assert "none" in page.locator("#front").inner_text()
    page.get_by_role("combobox", name="Cost").select_option("equivalent tokens")
    page.get_by_role("combobox", name="Quality").select_option("count (acc, %)")
    assert page.locator("#plot .xtitle").text_content() == "equivalent tokens"
    assert page.locator("#plot .ytitle").text_content() == "count (acc, %)"
    page.get_by_text("The chart as a table").click()
    lines = [line.split("\t") for line in page.locator("#points").inner_text().splitlines()]
    assert lines[0] == ["method", "budget", "equivalent tokens", "count (acc, %)", "on the front"]
    assert [line[0] for line in lines if line[-1] == "yes"] == ["none", "fastv-64", "divprune-16"]
    page.locator("#plot .points .point").first.hover(force=True)
    assert "equivalent tokens: 144" in page.locator("#plot .hoverlayer").text_content()


def test_from_a_cell_to_its_questions_and_back(page, file):
    page.goto(file.as_uri())
    page.locator("tr[data-label=fastv-16] a").first.click()
    page.wait_for_selector("#list tbody tr")
    assert page.locator("#outcomes button").all_inner_texts() == [
        "lost 36", "won 0", "both right 18", "both wrong 6", "all 60",
    ]  # fmt: skip
    assert page.locator("#list tbody tr").count() == 36
    page.get_by_label("against", exact=True).select_option("random-16")
    page.get_by_role("button", name="won 9").click()
    assert page.locator("#list tbody th").all_inner_texts() == [str(i) for i in range(9, 18)]
    page.get_by_label("Text", exact=True).fill("> 12?")
    (button,) = page.locator("#list tbody button").all()
    button.press("Enter")
    assert page.locator("#question").is_visible()
    assert page.locator("#question-title").inner_text() == "count, question 12: won"
    assert page.locator("#sides h3").all_inner_texts() == ["fastv-16", "random-16"]
    address = page.url
    page.keyboard.press("Escape")
    assert not page.locator("#question").is_visible() and "question=" not in page.url
    page.goto("about:blank")
    page.goto(address)
    page.wait_for_selector("#question[open]")
    assert page.locator("#question-title").inner_text() == "count, question 12: won"
    page.get_by_role("button", name="Next").click()
    page.wait_for_function("document.querySelector('#question-title').textContent.includes('question 13')")


def test_markup_stays_text(page, file):
    page.goto(file.as_uri())
    page.on("dialog", lambda dialog: pytest.fail("a text ran as a script"))
    assert page.locator("h1").inner_text() == "<b>tiny</b>"
    assert header(page, "Scores", MARKUP).count() == 1
    page.get_by_role("combobox", name="Quality").select_option(f"{MARKUP} (acc, %)")
    assert page.locator("#plot .ytitle").text_content() == f"{MARKUP} (acc, %)"
    page.get_by_label("Task", exact=True).select_option(MARKUP)
    page.get_by_role("button", name="all 60").click()
    page.get_by_role("button", name=f"{MARKUP} 59?").click()
    assert page.locator("#question-title").inner_text().startswith(MARKUP)
    assert f"no{MARKUP}" in page.locator("#sides").inner_text()
    assert page.locator("img, b").count() == 0


def test_dark_print_and_small_screens(page, output):
    page.set_viewport_size({"width": 400, "height": 800})
    page.emulate_media(color_scheme="dark")
    page.goto((output / "report/index.html").as_uri())
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 27)"
    assert page.evaluate("document.documentElement.scrollWidth") <= 400  # wide tables scroll by themselves
    page.emulate_media(media="print", color_scheme="light")
    assert not page.locator("#bar").is_visible() and page.locator("#table-0").is_visible()


def test_what_a_screen_reader_needs(page, output):
    page.goto((output / "report/index.html").as_uri())
    nameless = "(e) => !e.textContent && !e.labels?.length && !e.ariaLabel"
    controls = "[...document.querySelectorAll('button, input, select')]"
    assert page.evaluate(f"{controls}.filter({nameless}).map((e) => e.outerHTML)") == []
    assert page.locator("th:not([scope])").count() == 0
    assert page.locator("[aria-live]").count() >= 2
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    chart = page.get_by_role("img", name="Quality against cost")
    assert "On the front" in page.locator(f"#{chart.get_attribute('aria-describedby')}").inner_text()
