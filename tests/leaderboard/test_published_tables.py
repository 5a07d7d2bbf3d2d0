"""The papers' tables are well-formed, and say what the papers say."""

import pytest
import render_published
import yaml
from evaluation_doubles import write_config
from papers import LLAVA, PAPER, changed

from vlmslim.evaluation.config import load_config
from vlmslim.evaluation.errors import ConfigError
from vlmslim.leaderboard.published import load_papers, spreads_of
from vlmslim.registry import method, method_names


def test_every_paper_with_a_specification_is_there(papers):
    known = {"2412.03248", "2412.00447", "2503.02175", "2501.05179", "2409.01179", "2505.18757", "2407.14439"}
    known |= {"2504.03154", "2508.18264", "2606.27161", "2606.01711", "2603.01236", "2505.22654"}
    assert {paper.cited for paper in papers} == known | {"DIPrune", "EADP", "IDPruner", "Cen-Prune"}


def test_every_number_has_its_source(papers):
    for paper in papers:
        assert paper.title and paper.read and paper.tables
        for table in paper.tables:
            assert table.table and table.model and table.protocol and table.convention
            numbers = [number for row in table.rows for number in (*row.scores, row.average)]
            assert any(number is not None for number in numbers)


def test_methods_and_budgets_of_the_tables_exist(papers):
    for row in (row for paper in papers for table in paper.tables for row in table.rows):
        if row.method not in (None, "none"):
            assert row.method in method_names()
            method(row.method, **row.options, **({} if row.keep is None else {"keep": row.keep}))
        assert [row.keep, row.fraction, row.equivalent_tokens].count(None) >= 2


def test_spot_checks_against_the_papers(papers):
    """Cells that the papers' own sentences repeat."""
    divprune = next(paper for paper in papers if paper.arxiv == "2503.02175").tables[0]
    rows = {row.name: dict(zip(divprune.columns, row.scores, strict=True)) for row in divprune.rows[:4]}
    assert rows["original"]["GQA"] - rows["DivPrune"]["GQA"] == pytest.approx(5.1, abs=0.05)
    assert rows["original"]["MMBench EN"] - rows["DivPrune"]["MMBench EN"] == pytest.approx(4.9, abs=0.05)
    assert divprune.rows[3].keep == 0.098
    flex = next(paper for paper in papers if paper.arxiv == "2504.03154").tables[0]
    for row in flex.rows:
        assert sum(row.scores[:8]) / 8 == pytest.approx(row.scores[8], abs=0.06)


def test_averages_are_those_of_their_cells(papers):
    """In a table with cells and an average, the mean over the columns, relative to the first row, is the average."""
    checked = 0
    for table in (table for paper in papers for table in paper.tables if table.columns and table.unpatched):
        whole = table.unpatched.scores
        for row in table.rows:
            if row.average is not None and None not in (*row.scores, *whole):
                mean = sum(a / b for a, b in zip(row.scores, whole, strict=True)) / len(whole)
                assert 100 * mean == pytest.approx(row.average, abs=0.6), (table.table, row.name)
                checked += 1
    assert checked >= 20


def test_the_page_of_spreads_is_that_of_the_files(papers):
    assert render_published.PAGE.read_text() == render_published.render(papers)


def test_the_spread_between_papers(papers):
    spread = spreads_of(papers, LLAVA)["divprune", 64]
    assert (spread.low, spread.high) == (87.8, 95.0) and len(spread.reports) >= 6
    assert {"tasks", "OCR hints", "MME"} <= set(spread.differences())
    assert "IDPruner: 11, documents among them" in spread.text()
    assert spreads_of(papers, "another/model") == {}


@pytest.mark.slow
def test_the_tasks_and_metrics_that_are_named_exist(papers, tmp_path):
    from vlmslim.evaluation.schema import TaskConfig
    from vlmslim.evaluation.tasks import Tasks

    benchmarks = [benchmark for paper in papers for benchmark in paper.benchmarks.values() if benchmark.tasks]
    named = [TaskConfig(task=task) for benchmark in benchmarks for task in benchmark.tasks]
    registry = Tasks(load_config(write_config(tmp_path)).model_copy(update={"tasks": named}))
    for benchmark in benchmarks:
        for task in benchmark.tasks:
            assert benchmark.metric in registry.metrics(task), task


@pytest.mark.parametrize(
    "text, message",
    [
        (PAPER | {"arxiv": "DivPrune"}, "arxiv: "),
        (changed(source="memory"), "tables: 0: source: "),
        (changed(row={"scores": [1.0, 2.0]}), "Table 1, D: 2 scores for 1 columns; give one score per column, or null"),
        (changed(columns=["POPE"]), "must be the same, but differ in GQA, POPE"),
        (changed(row={"budget": 64}), "rows: 0: budget: "),
        (PAPER | {"benchmarks": {"GQA": {"tasks": ["gqa"], "unit": "percent"}}}, "'tasks' and 'metric' together"),
        ("a: [1", "not readable as YAML"),
        (b"title: \xff", "is not UTF-8"),
    ],
)
def test_malformed_tables_are_refused_in_one_sentence(tmp_path, text, message):
    text = yaml.safe_dump(text) if isinstance(text, dict) else text
    (tmp_path / "bad.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_papers(tmp_path)
    assert "bad.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_directory_says_what_to_type(tmp_path):
    with pytest.raises(ConfigError, match="--published-tables"):
        load_papers(tmp_path / "nowhere")
