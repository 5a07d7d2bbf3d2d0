"""Draw which visual tokens three methods keep of one bundled picture: kept patches clear, dropped patches faded.

    python scripts/draw_kept_tokens.py

Writes assets/kept_tokens.png, the picture of the README. The model is bundled/tiny-llava, which reads 144 patches.
"""

import argparse
import io
from pathlib import Path

import pyarrow.parquet as pq
from PIL import Image

from vlmslim.loading import load
from vlmslim.pictures.ask import ask
from vlmslim.pictures.draw import Panel, kept, panels, sheet
from vlmslim.registry import method

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ROOT / "vlmslim/tasks/scenes/data/scenes_detail.parquet"
METHODS = {"random": "a random subset", "divprune": "diverse tokens", "fastv": "what the last token attends to"}


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default="detail-0008", help="id of a question of the task scenes_detail")
    parser.add_argument("--keep", type=int, default=36, help="visual tokens to keep, of 144")
    parser.add_argument("--out", type=Path, default=ROOT / "assets/kept_tokens.png")
    args = parser.parse_args()

    (row,) = [row for row in pq.read_table(QUESTIONS).to_pylist() if row["id"] == args.question]
    picture = Image.open(io.BytesIO(row["image"]["bytes"]))
    model, processor = load("bundled/tiny-llava", dtype="float32", device="cpu")
    methods = [(name, method(name, keep=args.keep)) for name in METHODS]
    unpatched, *answers = ask(model, processor, row["question"], [picture], methods, new_tokens=1)

    (trace,) = unpatched.traces
    whole = panels(trace, processor)[0]
    line = [Panel(whole.picture, whole.title, row["question"].partition("?")[0] + "?")]
    for answer in answers:
        (trace,) = answer.traces
        title = f"{answer.method}: {trace.at(-1).count}"
        line.append(Panel(kept(trace, processor), title, METHODS[answer.method]))
    sheet([line]).save(args.out, optimize=True)
    print(args.out)


if __name__ == "__main__":
    main()
