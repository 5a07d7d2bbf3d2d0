"""Record the score of every answer of many rows, so that a race of `vlmslim advise` can be repeated without a model.

    python scripts/analysis/record_scores.py tests/support/advise_scenes.json

The rows are those of `vlmslim advise bundled/tiny-llava` with the tasks below: every method at every budget.
"""

import argparse
import json
import tempfile
from pathlib import Path

from vlmslim.evaluation.advise import METHODS, candidates
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.harness import Harness
from vlmslim.evaluation.progress import log_to

TASKS = ["scenes_presence", "scenes_colour", "scenes_detail", "scenes_text"]
BUDGETS = [72, 36, 16]  # of 144 visual tokens


def main(file: Path, limit: int) -> None:
    log_to(None)
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model={"pretrained": "bundled/tiny-llava", "device": "cpu"},
            tasks=TASKS,
            methods=candidates([{"method": name} for name in METHODS], BUDGETS),
            baselines=False,
            batch_size=16,
            limit=limit,
            output=scratch,
        )
        harness, rows = Harness(config), {}
        for variant in config.variants():
            flops = harness.flops(variant, TASKS[0])
            cells = {task: harness.evaluate(variant, task).samples for task in TASKS}
            rows[variant.label] = {
                "cost": flops["language_model"] + flops["method"],
                "scores": {task: "".join(str(int(one["acc"])) for one in own) for task, own in cells.items()},
            }
            print(variant.label, flush=True)
    lines = [f" {json.dumps(label)}: {json.dumps(row)}" for label, row in rows.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--limit", type=int, default=40, help="questions of each task")
    given = parser.parse_args()
    main(given.file, given.limit)
