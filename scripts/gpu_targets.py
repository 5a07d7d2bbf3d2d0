"""Compare the records of `vlmslim bench` in a folder with the targets for a GPU.

    python scripts/gpu_targets.py benchmarks/nvidia-h200_2026-11-30

Every method's peak memory is at most that of the unpatched model. On the two shapes below, prefill takes at most 1.03
of the ideal's time. `scripts/bench_selection.py` says itself whether its searches meet theirs. Exit status 1: a target
is missed, unless `--no-targets` is given, or no record is there.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

OVER_IDEAL = 1.03
SHAPES = ("llava-1.5-7b, random weights", "llava-next-7b, random weights")


def verdicts(record: dict) -> Iterator[tuple[str, bool]]:
    """Yield each target of one record in words, and whether it is met."""
    name = record["model"]["name"]
    for scenario in record["scenarios"]:
        for row in scenario["rows"][1:]:  # the first is the unpatched model
            where = f"{name}, batch {scenario['batch']}, {row['label']}"
            peak, over = row["peak_over_unpatched"], row["prefill_over_ideal"]["median"]
            yield f"{where}: peak memory over unpatched {peak:.2f}, target 1", peak <= 1
            if name in SHAPES:
                yield f"{where}: prefill over ideal {over:.3f}, target {OVER_IDEAL}", over <= OVER_IDEAL


def main() -> int:
    """Print all targets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--no-targets", action="store_true", help="exit with 0 even if a target is missed")
    given = parser.parse_args()
    found = [json.loads(path.read_text()) for path in sorted(given.folder.glob("*.json"))]
    said = [verdict for record in found if "scenarios" in record for verdict in verdicts(record)]
    for words, met in said:
        print(f"{words}: {'met' if met else 'MISSED'}")
    if not said:
        print("no record of `vlmslim bench` is there")
    return not said or not (given.no_targets or all(met for _, met in said))


if __name__ == "__main__":
    sys.exit(main())
