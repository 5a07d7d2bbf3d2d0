"""Render the page "Why the numbers differ" from the papers' tables.

    python scripts/render_published.py

Reads vlmslim/leaderboard/papers/*.yaml and writes docs/why-numbers-differ.md. `--check` writes nothing and fails if the
page is old.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

from vlmslim.io.files import markdown_table, write_atomically
from vlmslim.leaderboard.published import Paper, Spread, load_papers, spreads_of
from vlmslim.leaderboard.render import escaped
from vlmslim.leaderboard.tables import NOTHING

PAGE = Path(__file__).resolve().parent.parent / "docs/why-numbers-differ.md"
MODEL = "llava-hf/llava-1.5-7b-hf"
INTRODUCTION = """\
# Why the numbers differ

The same method, on the same checkpoint, with the same number of visual tokens, has another number in every paper. This
page lists what the papers print for LLaVA-1.5-7B, as the mean over their own tasks in per cent of the unpatched model,
and what is known of how it was measured. `vlmslim leaderboard DIR --published` sets your own run beside them.

What moves them, as far as it is known:

- **The tasks.** An average with documents in it (ChartQA, DocVQA, OCRBench) falls by several points, because these need
  the fine detail that goes first.
- **TextVQA with or without OCR hints.** The unpatched model reaches 58.2 with the hints in the prompt, and about 46
  without. With hints, 41.7 is left with no visual token at all.
- **POPE by F1 or by accuracy**, 85.9 or 87.0 for the unpatched model, and **MME perception alone (P) or with cognition
  (P+C)**, about 1,510 or 1,862 points.
- **The layer.** "64 tokens" after decoder layer 10 are 224 equivalent tokens. One paper moves VisionZip and HoloV from
  the projector to layer 10, and both gain about two points. "64 after layer 2" and "64 on average over the layers" are
  different budgets of FastV: on average 64, only about 30 tokens survive.
- **The order and the positions** of the tokens that are kept, and faults of releases
  ([Methods](methods.md)).
- **The average itself.** Of the tables whose cells are known, some print averages that differ by up to 0.6 points from
  the mean of their own cells.
- **Copied rows.** Some tables take rows from other papers, with another unpatched model in the denominator.
- **Wrong answers that count as right.** VizWiz can rise when tokens go, because more answers are "unanswerable".

No number of this page was measured here. The files in `vlmslim/leaderboard/papers` say for each how it was read."""


def render(papers: list[Paper]) -> str:
    """Write one table for each method and budget that several tables report, the widest spread first."""
    spreads = [spread for spread in spreads_of(papers, MODEL).values() if len(spread.reports) > 1]
    spreads.sort(key=lambda spread: (spread.low - spread.high, spread.name, spread.keep))
    rows = [
        (escaped(s.name), f"{s.keep}", f"{s.low:.1f}", f"{s.high:.1f}", f"{s.high - s.low:.1f}", str(len(s.reports)))
        for s in spreads
    ]
    overview = markdown_table(("method", "tokens", "lowest", "highest", "spread", "tables"), rows)
    parts = [INTRODUCTION, "## LLaVA-1.5-7B, % of the unpatched model", overview, *details(spreads)]
    parts.append("`scripts/render_published.py` wrote this page.")
    return "\n\n".join(parts) + "\n"


def details(spreads: list[Spread]) -> Iterator[str]:
    """Yield the tables of each method, with the choices that are not known to be the same."""
    for spread in spreads:
        names = spread.differences()
        lines = [
            [
                escaped(report.paper),
                escaped(report.table),
                f"{report.average:.1f}",
                *(escaped(str(report.known.get(name, NOTHING))) for name in names),
            ]
            for report in spread.reports
        ]
        yield f"### {escaped(spread.name)} at {spread.keep} tokens"
        yield markdown_table(("paper", "table", "average", *names), lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the page is not as it would be written")
    page = render(load_papers())
    if parser.parse_args().check:
        if PAGE.read_text(encoding="utf-8") != page:
            raise SystemExit(f"{PAGE} is old; call python scripts/render_published.py")
    else:
        write_atomically(PAGE, page)
