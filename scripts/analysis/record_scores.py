"""Record the score of every answer of many rows, so that a race of `vlmslim advise` can be repeated without a model.

    python scripts/analysis/record_scores.py scenes tests/support/advise_scenes.json
    python scripts/analysis/record_scores.py documents tests/support/advise_documents.json

The rows are those of `vlmslim advise` with the checkpoint, the tasks and the budgets below: every method at every
budget.
"""

import argparse
import json
import tempfile
from pathlib import Path

from vlmslim.evaluation.advise import METHODS, candidates
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.harness import Harness
from vlmslim.evaluation.progress import log_to

#: Name of a board -> checkpoint, tasks, budgets.
BOARDS = {
    "scenes": ("tiny-llava", ["presence", "colour", "detail", "text"], [72, 36, 16]),  # of 144 visual tokens
    "documents": ("tiny-llava-next", ["keyvalue", "table", "smallprint", "presence"], [0.5, 0.3, 0.15]),
}


def main(board: str, file: Path, limit: int) -> None:
    """Ask all rows all questions, and write costs and scores."""
    log_to(None)
    checkpoint, names, budgets = BOARDS[board]
    tasks = [f"{board}_{name}" for name in names]
    with tempfile.TemporaryDirectory() as scratch:
        config = RunConfig(
            model={"pretrained": f"bundled/{checkpoint}", "device": "cpu"},
            tasks=tasks,
            methods=candidates([{"method": name} for name in METHODS], budgets),
            baselines=False,
            batch_size=16,
            limit=limit,
            output=scratch,
        )
        harness, variants = Harness(config), config.variants()
        rows = {}
        for variant in variants:
            flops = harness.flops(variant, tasks[0])
            rows[variant.label] = {"cost": flops["language_model"] + flops["method"], "scores": {}}
        for task in tasks:
            answers = harness.answer(variants, task)
            for variant in variants:
                samples = harness.cell(variant, task, answers[variant.label]).samples
                rows[variant.label]["scores"][task] = "".join(str(int(one["acc"])) for one in samples)
            print(task, flush=True)
    lines = [f" {json.dumps(label)}: {json.dumps(row)}" for label, row in rows.items()]
    file.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("board", choices=BOARDS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--limit", type=int, default=40, help="questions of each task")
    given = parser.parse_args()
    main(given.board, given.file, given.limit)
