"""Kill workers of `vlmslim run --workers` at random moments, and check that no cell is lost or changed.

    python scripts/soak_workers.py --units 200 --kills 5

Two tasks are split into units of one question each. The cells must equal those of one process that runs undisturbed.
"""

import argparse
import json
import os
import random
import re
import signal
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.progress import log_to
from vlmslim.evaluation.run import run
from vlmslim.evaluation.store import Store


def make_config(output: Path, units: int) -> RunConfig:
    """Make a comparison of two methods on two tasks of the bundled benchmark."""
    return RunConfig.model_validate(
        {
            "model": {"pretrained": "bundled/tiny-llava", "device": "cpu", "dtype": "float32"},
            "tasks": ["scenes_presence", "scenes_choice"],
            "methods": [{"method": "divprune", "keep": 36}],
            "baselines": False,
            "limit": units // 2,
            "timing": None,
            "resources": {"shard": 1},
            "output": output,
        }
    )


def cells(output: Path) -> dict:
    """Read all cells, without their times, their folder, and addresses of functions."""
    store, found = Store(output), {}
    for path in sorted(output.glob("cells/*/*.json")):
        record = store.cell(path.parent.name, path.stem)
        assert record is not None, f"{path} is damaged"
        del record["seconds"], record["receipt"]["selection_ms"], record["lmms_eval"]["config"]["resolved_cli_args"]
        text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(record))
        found[path.parent.name, path.stem] = text, path.with_suffix(".jsonl").read_bytes()
    return found


def kill(logs: Path, count: int, dice: random.Random, done: threading.Event) -> None:
    """Kill `count` workers, one after the other, each after it has begun to answer."""
    killed: set[int] = set()
    while len(killed) < count and not done.wait(dice.uniform(1, 4)):
        working = []
        for log in logs.glob("worker-*.log"):
            latest = log.read_text().rpartition(" is process ")[2]
            if "Building contexts" in latest:
                working.append(int(latest.split()[0]))
        if fresh := [pid for pid in working if pid not in killed]:
            victim = dice.choice(fresh)
            killed.add(victim)
            os.kill(victim, signal.SIGKILL)
            print(f"{time.strftime('%X')} killed worker process {victim}, {len(killed)} of {count}", flush=True)


def main() -> None:
    """Run with and without kills, and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=200)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    log_to(None)
    with TemporaryDirectory() as folder:
        calm, rough = Path(folder) / "calm", Path(folder) / "rough"
        run(make_config(calm, args.units).model_copy(update={"resources": RunConfig.model_fields["resources"].default}))
        done = threading.Event()
        killer = threading.Thread(
            target=kill, args=(rough / "workers", args.kills, random.Random(args.seed), done), daemon=True
        )
        killer.start()
        run(make_config(rough, args.units), workers=args.workers)
        unfinished = killer.is_alive()
        done.set()
        same = cells(rough) == cells(calm)
    print(f"{args.units} units, {args.workers} workers: cells {'are equal' if same else 'DIFFER'}")
    if unfinished:
        print(f"the run ended before {args.kills} kills; take more --units")
    raise SystemExit(0 if same and not unfinished else 1)


if __name__ == "__main__":
    main()
