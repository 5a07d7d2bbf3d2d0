"""The documentation holds: links, anchors, named files and tests exist, examples run, figures are the board's."""

import json
import pkgutil
import re
from functools import cache
from pathlib import Path

import method_facts
import method_table
import pytest
from PIL import Image

from vlmslim.engine.families import FAMILIES

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("assets/**/*.md")]
EXAMPLES = ("norm.py", "mymethod.py", "test_mymethod.py")  # files that the pages tell a reader to write
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def prose(page: Path) -> str:
    """Return a page without its blocks of code."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def blocks(page: Path, language: str = r"\w*") -> list[str]:
    """Return the blocks of code, of one language or of all."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return the anchors that a page's headings get."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def known_tests() -> set[str]:
    """Return the names of all test functions."""
    return {name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{target}: there is no such file"
        assert not anchor or anchor in anchors(file), f"{target}: there is no such heading"


@each_page
def test_what_is_named_exists(page):
    for name in re.findall(r"`([^`\n]+)`", prose(page)):
        if re.fullmatch(r"(vlmslim|scripts|tests|docs|assets|eval_configs)/[\w./-]*", name):
            assert (ROOT / name).exists() or name.endswith(EXAMPLES), f"{name}: there is no such file"
        elif re.fullmatch(r"test_\w+", name):
            assert name in known_tests(), f"{name}: there is no such test"
        elif re.fullmatch(r"vlmslim(\.\w+)+", name) and name not in ("vlmslim.json", "vlmslim.methods"):
            pkgutil.resolve_name(name)
    for name in re.findall(r"\b(?:scripts|eval_configs)/[\w./-]+\.(?:py|yaml)", "".join(blocks(page))):
        assert (ROOT / name).exists(), f"{name}: there is no such file"


@each_page
def test_python_blocks_compile(page):
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


def test_the_readme_is_short_and_has_two_commands():
    assert len(README.read_text().splitlines()) <= 120
    run, test = blocks(README, "bash")
    assert run.count("\n") == test.count("\n") == 1
    assert run.startswith("python3 -m venv") and "vlmslim run" in run
    assert test.startswith("python3 -m venv") and test.endswith("&& pytest -n auto\n")


def test_the_readme_example_runs(capsys):
    (code,) = blocks(README, "python")
    hub = "llava-hf/llava-1.5-7b-hf"
    assert code.count(hub) == 2
    code = code.replace(hub, str(ROOT / "vlmslim/bundled/tiny-llava")).replace("max_new_tokens=64", "max_new_tokens=2")
    prompt = "USER: <image>\nIs there a cat in the picture? ASSISTANT:"
    exec(code, {"images": [Image.new("RGB", (192, 192), "red")], "prompts": [prompt]})
    assert "144.0 -> 64.0 visual tokens" in capsys.readouterr().out


def test_the_readme_table_is_the_boards():
    board = {row["label"]: row for row in json.loads((ROOT / "assets/leaderboard_scenes.json").read_text())["rows"]}
    lines = re.findall(r"^\| ([\w-]+) \| [\d →]+ \|.*KiB \|$", README.read_text(), flags=re.MULTILINE)
    assert 4 <= len(lines) <= 6
    for label in lines:
        assert table_line(label, board[label]) in README.read_text().splitlines()


def table_line(label: str, row: dict) -> str:
    """Return the line of the README's table that a row of the board makes."""
    kept, last = round(row["kept"]), round(row["last"])
    average = f"{100 * row['relative']:.1f}"
    if label != "none":
        average += f" ± {50 * (row['relative_high'] - row['relative_low']):.1f}"
    cells = [
        label,
        f"{kept}" if kept == last else f"{kept} → {last}",
        average,
        *(f"{100 * row['groups'][group]:.0f}" for group in ("OCR", "hallucination")),
        f"{row['flops_ratio']:.2f}x",
        f"{row['kv_bytes'] / 1024:.0f} KiB",
    ]
    return f"| {' | '.join(cells)} |"


def test_the_tables_of_models_are_those_of_the_code():
    assert method_table.PAGE.read_text() == method_table.pages(), "run python tests/support/method_table.py"


def test_the_page_of_methods_has_the_facts_of_each():
    """All except lines of code, which change with every commit."""
    listed = method_facts.PAGE.read_text().split(method_facts.BEGIN)[1].split(method_facts.END)[0]
    on_page, own = (
        [row.split(" | ")[:3] + row.split(" | ")[4:] for row in text.strip().splitlines()]
        for text in (listed, method_facts.table())
    )
    assert on_page == own, "run python tests/support/method_facts.py"


def test_the_readme_lists_the_families():
    listed = README.read_text().split("Families, by")[1].split("\n\n")[0]
    assert re.findall(r"`(\w+)`", listed)[1:] == list(FAMILIES)
