"""The page of a leaderboard, as files."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from boards import staged
from evaluation_doubles import FakeHarness, write_config

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.run import run
from vlmslim.leaderboard.axes import cost_axes, front, quality_axes
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.notes import notes
from vlmslim.leaderboard.report import write_folder, write_single
from vlmslim.leaderboard.rows import Row
from vlmslim.leaderboard.scores import Estimate, Score
from vlmslim.leaderboard.tables import tables


class Page(HTMLParser):
    """Collects the texts of all tables, line by line, and what the page loads and links to."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.loads, self.links, self._in_cell = [], [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._in_cell = True
        elif tag == "a":
            self.links.append(given["href"])
        elif source := given.get("src") or (tag == "link" and given["href"]):
            self.loads.append(source)

    def handle_endtag(self, tag):
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, text):
        if self._in_cell:
            self.tables[-1][-1][-1] += text.strip()


def data_of(folder, name: str) -> dict:
    text = (folder / "data" / f"{name}.js").read_text()
    start = f"(window.parts ??= {{}})[{json.dumps(name)}] = "
    assert text.startswith(start) and text.endswith(";\n")
    return json.loads(text.removeprefix(start).removesuffix(";\n"))


@pytest.fixture(scope="module")
def folder(board, tmp_path_factory):
    return write_folder(board, tmp_path_factory.mktemp("report") / "page").parent


def test_the_page_shows_all_tables_and_notes(board, folder):
    text = (folder / "index.html").read_text()
    page = Page(text)
    for found, table in zip(filter(None, page.tables), tables(board), strict=True):  # two are filled later
        assert found[0] == [column.name for column in table.columns]
        assert sorted(found[1:]) == sorted(map(list, zip(*(column.texts for column in table.columns), strict=True)))
    assert all(note.split(". ")[0].replace("<", "&lt;") in text for note in notes(board))


def test_the_folder_loads_only_its_own_files(folder):
    page = Page((folder / "index.html").read_text())
    assert page.loads and all((folder / name).is_file() for name in page.loads)
    assert all(link.startswith("#") for link in page.links)
    assert "#task=count&row=divprune-64&against=none&outcome=lost" in page.links


def test_the_single_file_loads_nothing(board, tmp_path):
    text = write_single(board, tmp_path / "board.html").read_text()
    assert Page(re.sub(r"<script>.*?</script>", "", text, flags=re.DOTALL)).loads == []
    assert list(tmp_path.iterdir()) == [tmp_path / "board.html"]


def test_questions_of_a_task(folder):
    data, board = data_of(folder, "questions-0"), data_of(folder, "board")
    at = [row["label"] for row in board["rows"]].index("divprune-64")
    assert data["ids"] == [0, 1, 2, 3] and data["prompts"][2] == "count 2?" and data["half"] == 0.5
    assert data["scores"][at] == [1, 1, 1, 0]
    assert [data["options"][i][given] for i, given in enumerate(data["given"][at])] == ["yes", "yes", "yes", "no"]
    assert data["options"][0] == ["yes"]  # all rows are right


def test_axes_come_from_the_board(board):
    names = [axis.name for axis in cost_axes(board)]
    assert "equivalent tokens" in names and "time to first token, ms" in names
    assert "time per later token, ms" not in names  # all rows take the same
    assert [axis.name for axis in quality_axes(board)] == ["average, % of unpatched", "count (acc, %)", "text (acc, %)"]
    errors = Leaderboard(
        [Row("a", 1, scores={"cer": Score(0.1)}), Row("b", 2, scores={"cer": Score(0.3)})],
        *(["cer"], {"cer": ("cer", False)}, {}),
    )
    assert [axis.sign for axis in quality_axes(errors)] == [-1]


def test_the_front_of_any_two_axes(board):
    """A row is on the front if no other row is at least as good in both and better in one: by plain loops."""
    for cost in cost_axes(board):
        for quality in quality_axes(board):
            points = [(x.value, quality.sign * y.value) for x, y in zip(cost.values, quality.values, strict=True)]
            beaten = [any(o[0] <= p[0] and o[1] >= p[1] and o != p for o in points) for p in points]
            assert front(cost, quality) == [not one for one in beaten]
    gaps = [replace(axis, values=[None, *axis.values[1:]]) for axis in (cost_axes(board)[0], quality_axes(board)[0])]
    assert front(gaps[0], quality_axes(board)[0])[0] is False
    assert isinstance(gaps[1].values[1], Estimate)


def test_no_name_becomes_markup(board, tmp_path):
    row = Row("<b>l</b>", 1, scores={"<i>t</i>": Score(0.5)})
    hostile = Leaderboard([row], ["<i>t</i>"], {"<i>t</i>": ("acc", True)}, board.facts | {"model": "</script><u>m"})
    text = write_single(hostile, tmp_path / "board.html").read_text()
    assert not re.search(r"<[biu]>|</script><u", text)
    assert "&lt;b&gt;l&lt;/b&gt;" in text


def test_a_stage_that_never_acted_is_marked(tmp_path):
    board = staged(tmp_path, count=0, text=0)
    text = write_single(board, tmp_path / "board.html").read_text()
    assert "both: stage 2 (drop_visual, before layer 6) acted on 0 of 700 prompts." in text and "both ‡" in text


def test_a_folder_with_other_files_is_refused(board, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="holds other files; give a new folder"):
        write_folder(board, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_page_that_is_written_again_holds_no_old_data(board, tmp_path):
    folder = tmp_path / "page"
    write_folder(board, folder)
    (folder / "data/questions-7.js").write_text("old")
    write_folder(board, folder)
    assert sorted(path.stem for path in folder.glob("data/*")) == ["board", "plotly", "questions-0", "questions-1"]


def test_a_thousand_questions_take_less_than_5_mb(tmp_path):
    class Talkative(FakeHarness):
        def evaluate(self, variant, task):
            cell = super().evaluate(variant, task)
            told = [
                s
                | {
                    "arguments": [f"{task} {s['doc_id']}? " * 10],
                    "filtered_resps": [f"{variant.label} {s['doc_id']} " * 5],
                }
                for s in cell.samples
            ]
            return replace(cell, samples=told)

    config = load_config(write_config(tmp_path, tasks=["count"], methods=["divprune", "fastv"]))
    run(config, harness=Talkative(questions=1000))
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out/report").rglob("*") if path.is_file()}
    assert sum(sizes.values()) < 5e6 and sizes["questions-0.js"] < 1e6
