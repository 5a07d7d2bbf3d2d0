"""The table of docs/methods.md that says what each method follows, what checks it, and how long it is and takes.

`python tests/support/method_facts.py` writes it, from docstrings, tests and the record of `scripts/bench_selection.py`.
"""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

from vlmslim.registry import method_class, method_names

ROOT = Path(__file__).parents[2]
PAGE, RECORD = ROOT / "docs" / "methods.md", ROOT / "assets" / "bench" / "selection_cpu.json"
BEGIN, END = "<!-- facts -->\n", "<!-- end of facts -->\n"
OURS = ("none", "blind", "downsample", "pool", "random", "schedule", "uniform")  # no paper's methods
PART_OF = {"bipartite_merge": "aim", "pagerank_prune": "aim", "drop_visual": "todre"}
TESTS = {"pool": "uniform_and_pool", "uniform": "uniform_and_pool", "bipartite_merge": "aim", "pagerank_prune": "aim"}
VECTORS = {"recoverable": "rc"} | PART_OF
SIZES = ((576, 64), (2880, 320))


def follows(name: str) -> str:
    """Return the release or the text that a method follows, by its docstring or that of the method it is a part of."""
    if name in OURS:
        return "–"
    said = " ".join((method_class(PART_OF.get(name, name)).__doc__ or "").split())
    commits = re.findall(r"commit (\w{7})", said)
    if commits and "This is a reading" not in said:
        return f"release {', '.join(commits)}"
    return "paper, a reading" if re.search(r"\b(is a|our) reading\b|no (official )?release", said) else "paper"


def code_lines(source: str) -> int:
    """Count the lines of a file that are neither empty, nor comment, nor docstring."""
    documented: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            documented |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    used = {line for t in tokens if t.type not in empty for line in range(t.start[0], t.end[0] + 1)}
    return len(used - documented)


def length(name: str) -> str:
    """Return the lines of code of a method, file by file where it has a folder."""
    folder = ROOT / "vlmslim" / "methods" / name
    files = [folder / "__init__.py", *sorted(set(folder.glob("*.py")) - {folder / "__init__.py"})]
    files = files if folder.is_dir() else [folder.with_suffix(".py")]
    return " + ".join(str(code_lines(file.read_text())) for file in files)


def checked_by(name: str) -> str:
    """Return the test of a method with a slow reference, and how many files of reference vectors it has."""
    test = TESTS.get(name, name)
    found = f"[test](../tests/methods/test_{test}.py)" if (ROOT / f"tests/methods/test_{test}.py").exists() else "–"
    vectors = len(list((ROOT / "tests" / "vectors").glob(f"{VECTORS.get(name, name)}_*.npz")))
    return f"{found}, {vectors} vectors" if vectors else found


def table() -> str:
    """Return the table in Markdown."""
    record = json.loads(RECORD.read_text())
    times = {(row["name"], row["n"], row["k"]): row.get("ms") for row in record["methods"]}
    head = ["method", "follows", "checked by", "lines of code", *(f"{n} to {k}, ms" for n, k in SIZES)]
    lines = [head, ["---"] * 3 + ["---:"] * 3]
    for name in method_names():
        taken = (times.get((name, *size)) for size in SIZES)
        shown = ["–" if ms is None else f"{ms:.0f}" if ms >= 10 else f"{ms:.1f}" for ms in taken]
        lines.append([f"`{name}`", follows(name), checked_by(name), length(name), *shown])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page() -> str:
    """Return docs/methods.md with its table as it is now."""
    before, rest = PAGE.read_text().split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())
