"""Every notebook runs from its first cell to its last, in an empty folder."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "docs/notebooks").glob("*.ipynb"))


def test_every_notebook_is_a_page_of_the_site():
    navigation = (Path(__file__).parents[1] / "mkdocs.yml").read_text()
    assert NOTEBOOKS and all(f"notebooks/{path.stem}.md" in navigation for path in NOTEBOOKS)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"]
    assert cells
    names = {"__name__": "__main__"}
    for number, cell in enumerate(cells):
        assert not cell["outputs"], "a notebook is stored without outputs"
        exec(compile("".join(cell["source"]), f"{notebook.name}, cell {number}", "exec"), names)
