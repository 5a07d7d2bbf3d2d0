"""Render the public board from the files that `vlmslim submit` wrote.

    python scripts/render_submissions.py

Reads assets/submissions/*.json and writes docs/public-board.md. `--check` writes nothing and fails if the page is old.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from vlmslim.io.files import markdown_table, write_atomically
from vlmslim.leaderboard.render import escaped
from vlmslim.leaderboard.scores import Estimate
from vlmslim.leaderboard.submission import read_submission
from vlmslim.leaderboard.tables import NOTHING, number, with_interval

ROOT = Path(__file__).resolve().parent.parent
SUBMISSIONS, PAGE = ROOT / "assets/submissions", ROOT / "docs/public-board.md"
HEADERS = ("method", "budget", "average, % of unpatched", "tokens kept", "prefill FLOPs", "submission", "commit")


def render(folder: Path) -> str:
    """Write one table for each checkpoint, protocol and set of questions, because only such numbers compare."""
    groups: dict[tuple[str, str, str], list[tuple[float, list[str]]]] = {}
    for file in sorted(folder.glob("*.json")):
        content = read_submission(file)
        facts = content["board"]["facts"]
        name = f"{facts['model']} ({facts['checkpoint'][:12]})" if facts["checkpoint"] else facts["model"]
        key = (
            name,
            content["protocol"],
            repr(sorted({(cell["task"], cell["questions"]) for cell in content["cells"]})),
        )
        groups.setdefault(key, []).extend(lines(file.stem, content))
    parts = [
        "# The public board",
        "Every line was checked by `vlmslim submit`; [Submissions](submissions.md) says how to add yours. Lines of one "
        "table answered the same questions under the same protocol. `scripts/render_submissions.py` wrote this page.",
    ]
    for (model, protocol, _), found in groups.items():
        table = markdown_table(HEADERS, [line for _, line in sorted(found, key=lambda entry: (-entry[0], entry[1]))])
        parts += [f"## {escaped(model)}", escaped(protocol), table]
    return "\n\n".join(parts if groups else [*parts, "There is no submission yet."]) + "\n"


def lines(name: str, content: dict) -> Iterator[tuple[float, list[str]]]:
    """Yield a line for each row of a submission, with the number by which lines are ordered."""
    commits = ", ".join(commit[:12] for commit in content["board"]["facts"]["git_commits"])
    for row in content["board"]["rows"]:
        average = None
        if row["relative"] is not None:
            average = Estimate(row["relative"], row["relative_low"], row["relative_high"])
        flops = NOTHING if row["work_ratio"] is None else f"{row['work_ratio']:.2f}x"
        texts = [row["label"], "all" if row["budget"] is None else str(row["budget"])]
        numbers = [with_interval(average), number(row["kept"], 1, 1), flops]
        link = f"[{escaped(name)}](../assets/submissions/{name}.json)"
        yield row["relative"] or 0.0, [*map(escaped, texts), *numbers, link, commits]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is not as it would be written")
    page = render(SUBMISSIONS)
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != page:
            raise SystemExit(f"{PAGE} is old; call python scripts/render_submissions.py")
    else:
        write_atomically(PAGE, page)
