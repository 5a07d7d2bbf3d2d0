"""Write the bundled benchmark: held-out scenes and questions as one parquet file per task.

Seeded, and balanced over answers. Run without arguments it rewrites the bundled files:

    python scripts/make_benchmark.py
"""

import argparse
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scenes import COLOURS, TAG_DIGITS, TASKS, Question, Scene, ask, make_scene

DATA = Path(__file__).resolve().parent.parent / "vlmslim" / "tasks" / "scenes" / "data"
FIRST_SCENE, PER_SCENE = 20_000_000, 3
# Every task is balanced over these cells: answers, or kinds of "no" for presence.
CELLS = {
    "presence": {"yes": 3, "random": 1, "popular": 1, "adversarial": 1},
    "colour": dict.fromkeys(COLOURS, 1), "count": dict.fromkeys("12345", 1),
    "spatial": {"": 1}, "detail": dict.fromkeys(TAG_DIGITS, 1),
    "text": {"2": 3, "3": 5, "4": 2}, "choice": {"": 1},
}  # fmt: skip


def cell(question: Question) -> str:
    """The balance cell of a question."""
    if question.task in ("presence", "text"):
        return question.slice
    return "" if question.task in ("choice", "spatial") else question.answer


def encode(scene: Scene) -> bytes:
    """The picture as WebP."""
    buffer = io.BytesIO()
    scene.image.save(buffer, "WEBP", quality=86, method=6)
    return buffer.getvalue()


def build(n: int, seed: int) -> dict[str, list[dict]]:
    """`n` questions a task, at most PER_SCENE a picture."""
    quota = {t: {c: -(-n * w // sum(cells.values())) for c, w in cells.items()} for t, cells in CELLS.items()}
    filled = {t: Counter() for t in TASKS}
    rows: dict[str, list[dict]] = {t: [] for t in TASKS}
    number = FIRST_SCENE + seed * 1_000_000
    while any(len(r) < n for r in rows.values()):
        scene, rng = make_scene(number, "test"), np.random.default_rng([number, 4])
        picture, taken = b"", 0
        for task in sorted(rng.permutation(TASKS), key=lambda t: len(rows[t])):  # the emptiest task first
            question = ask(scene, str(task), rng)
            if question is None or len(rows[task]) >= n or taken == PER_SCENE:
                continue
            if filled[task][cell(question)] >= quota[task][cell(question)]:
                continue
            filled[task][cell(question)] += 1
            picture, taken = picture or encode(scene), taken + 1
            row = {"id": f"{task}-{len(rows[task]):04d}", "image": {"bytes": picture, "path": f"{number}.webp"},
                   "question": question.text, "answer": question.answer, "scene": str(number),
                   "slice": question.slice}  # fmt: skip
            rows[task].append(row | ({"choices": question.choices} if question.choices else {}))
        number += 1
    for task in TASKS:  # shuffled, so that the first N questions are balanced as well
        order = np.random.default_rng([seed, 5]).permutation(n)
        rows[task] = [rows[task][i] | {"id": f"{task}-{k:04d}"} for k, i in enumerate(order)]
    return rows


def main() -> None:
    """Build and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=240, help="questions per task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=DATA)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    total = 0
    feature = {"info": {"features": {"image": {"_type": "Image"}}}}  # lets `datasets` decode the column
    for task, rows in build(args.questions, args.seed).items():
        table = pa.Table.from_pylist(rows)
        features = {name: {"dtype": "string", "_type": "Value"} for name in table.column_names}
        features["image"] = {"_type": "Image"}
        if "choices" in features:
            features["choices"] = {"feature": {"dtype": "string", "_type": "Value"}, "_type": "List"}
        feature["info"]["features"] = features
        path = args.out / f"scenes_{task}.parquet"
        pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(feature)}), path, compression="zstd")
        total += path.stat().st_size
        print(f"{path.name}: {len(rows)} questions, {len({r['scene'] for r in rows})} pictures")
    print(f"{total / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
