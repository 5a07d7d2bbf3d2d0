"""Write a bundled benchmark: held-out pictures and questions as one parquet file per task.

The benchmark follows from its seed and is balanced over answers. These commands rewrite the bundled files:

    python scripts/bundled/make_benchmark.py scenes
    python scripts/bundled/make_benchmark.py documents
"""

import argparse
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pages
import pyarrow as pa
import pyarrow.parquet as pq
import scenes
from PIL import Image
from scenes import COLOURS, TAG_DIGITS, Question, Scene

TASK_FOLDERS = Path(__file__).resolve().parents[2] / "vlmslim" / "tasks"
FIRST, PER_PICTURE = 20_000_000, 3
# Every task is balanced over these cells: answers, their lengths, columns, or kinds of "no" for presence.
SCENE_CELLS = {
    "presence": {"yes": 3, "random": 1, "popular": 1, "adversarial": 1},
    "colour": dict.fromkeys(COLOURS, 1), "count": dict.fromkeys("12345", 1),
    "spatial": {"": 1}, "detail": dict.fromkeys(TAG_DIGITS, 1),
    "text": {"2": 3, "3": 5, "4": 2}, "choice": {"": 1},
}  # fmt: skip
PAGE_CELLS = {
    "keyvalue": {"2": 3, "3": 5, "4": 2}, "table": {"1": 3, "2": 3, "3": 3, "4": 2, "5": 1},
    "smallprint": {"2": 3, "3": 5, "4": 2}, "presence": {"yes": 2, "alike": 1, "other": 1},
}  # fmt: skip


@dataclass(frozen=True)
class Benchmark:
    """A family of tasks: how pictures and questions are made, and the cells that each task is balanced over."""

    name: str
    make: Callable[[int, str], Scene | pages.Page]
    ask: Callable[..., Question | None]
    cells: dict[str, dict[str, int]]
    quality: int  # of the WebP pictures

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(self.cells)

    def file(self, task: str, folder: Path | None = None) -> Path:
        """Return the parquet file of a task."""
        return (folder or TASK_FOLDERS / self.name / "data") / f"{self.name}_{task}.parquet"


BENCHMARKS = {
    "scenes": Benchmark("scenes", scenes.make_scene, scenes.ask, SCENE_CELLS, 86),
    "documents": Benchmark("documents", pages.make_page, pages.ask, PAGE_CELLS, 88),
}


def cell(question: Question, cells: dict[str, int]) -> str:
    """Return the balance cell of a question."""
    return next((name for name in (question.answer, question.slice, "") if name in cells), "")


def encode(image: Image.Image, quality: int) -> bytes:
    """Encode a picture as WebP."""
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=6)
    return buffer.getvalue()


def build(benchmark: Benchmark, n: int, seed: int) -> dict[str, list[dict]]:
    """`n` questions a task, at most PER_PICTURE a picture."""
    tasks = benchmark.tasks
    quota = {t: {c: -(-n * w // sum(cells.values())) for c, w in cells.items()} for t, cells in benchmark.cells.items()}
    filled = {t: Counter() for t in tasks}
    rows: dict[str, list[dict]] = {t: [] for t in tasks}
    number = FIRST + seed * 1_000_000
    while any(len(r) < n for r in rows.values()):
        picture, rng = benchmark.make(number, "test"), np.random.default_rng([number, 4])
        encoded, taken = b"", 0
        for task in sorted(rng.permutation(tasks), key=lambda t: len(rows[t])):  # the emptiest task first
            question = benchmark.ask(picture, str(task), rng)
            if question is None or len(rows[task]) >= n or taken == PER_PICTURE:
                continue
            place = cell(question, benchmark.cells[task])
            if filled[task][place] >= quota[task][place]:
                continue
            filled[task][place] += 1
            encoded, taken = encoded or encode(picture.image, benchmark.quality), taken + 1
            row = {"id": f"{task}-{len(rows[task]):04d}", "image": {"bytes": encoded, "path": f"{number}.webp"},
                   "question": question.text, "answer": question.answer, "scene": str(number),
                   "slice": question.slice}  # fmt: skip
            rows[task].append(row | ({"choices": question.choices} if question.choices else {}))
        number += 1
    for task in tasks:  # shuffled, so that the first N questions are balanced as well
        order = np.random.default_rng([seed, 5]).permutation(n)
        rows[task] = [rows[task][i] | {"id": f"{task}-{k:04d}"} for k, i in enumerate(order)]
    return rows


def write(rows: list[dict], path: Path) -> None:
    """Write a task's parquet file, with the column types that let `datasets` decode the picture."""
    table = pa.Table.from_pylist(rows)
    features = {name: {"dtype": "string", "_type": "Value"} for name in table.column_names}
    features["image"] = {"_type": "Image"}
    if "choices" in features:
        features["choices"] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
    info = {"info": {"features": features}}
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(info)}), path, compression="zstd")


def main() -> None:
    """Build and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=BENCHMARKS)
    parser.add_argument("--questions", type=int, default=240, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="another folder than the bundled one")
    args = parser.parse_args()
    benchmark, total = BENCHMARKS[args.benchmark], 0
    for task, rows in build(benchmark, args.questions, args.seed).items():
        path = benchmark.file(task, args.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(rows, path)
        total += path.stat().st_size
        print(f"{path.name}: {len(rows)} questions, {len({r['scene'] for r in rows})} pictures")
    print(f"{total / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
