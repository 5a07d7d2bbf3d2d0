"""The finished cells of a run: find them, check that they belong together, and say what their numbers depend on."""

from pathlib import Path

from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.store import Store, digest

Cells = dict[tuple[str, str], dict]  # (label, task) -> the record of a finished cell


def open_run(directory: Path | str) -> tuple[Store, dict]:
    """Find the run in a directory, or say what is there instead."""
    if not Path(directory).is_dir():
        what = "is a file" if Path(directory).exists() else "does not exist"
        raise ConfigError(f"{directory} {what}; give the output directory of a vlmslim run")
    store = Store(directory)
    run = store.run
    if run is None:
        raise ConfigError(f"{directory} holds no readable run.json; give the output directory of a vlmslim run")
    return store, run


def check_cells(run: dict, cells: Cells) -> None:
    """Refuse cells of another configuration, of two trainings, or that answered different questions."""
    shared = digest(run["shared"])
    stages = {row["label"]: row["stages"] for row in run["config"]["rows"]}
    costs = {row["label"] for row in run["config"]["rows"] if isinstance(row["budget"], dict)}  # stages not solved yet
    for (label, task), cell in cells.items():
        if cell["config_hash"] != shared or (label not in costs and cell["stages"] != stages[label]):
            raise ConfigError(f"{label} on {task} was made under another configuration; start over with --fresh")

    weights: dict[str, dict | None] = {}
    code: dict[str, dict] = {}
    first_of_task: dict[str, dict] = {}
    for (label, task), cell in cells.items():
        if cell.get("weights") != weights.setdefault(label, cell.get("weights")):
            raise ConfigError(f"the cells of {label} were made with different weights; start over with --fresh")
        if "code" in cell and cell["code"] != code.setdefault(label, cell["code"]):  # old cells do not record it
            raise ConfigError(f"the cells of {label} were made with different code; start over with --fresh")
        first = first_of_task.setdefault(task, cell)
        if cell["questions"] != first["questions"]:
            raise ConfigError(
                f"{first['label']} and {label} answered different questions of {task}, or under different settings; "
                "start over with --fresh"
            )
        if cell.get("definition") != first.get("definition"):
            raise ConfigError(
                f"the settings, functions or data of {task} changed between {first['label']} and {label}; undo the "
                "change and call vlmslim run again, or start over with --fresh"
            )


def verified(record: dict | None, run: dict, cells: Cells) -> str | None:
    """Return what `vlmslim verify` found about these cells; None if it never saw them."""
    if record is None or record["config_hash"] != digest(run["shared"]):
        return None
    now = {f"{label}/{task}": cell["samples_sha256"] for (label, task), cell in cells.items()}
    seen = sum(record["cells"].get(name) == seal for name, seal in now.items())
    if not seen:
        return None
    since = "" if seen == len(now) else f"; {len(now) - seen} of {len(now)} cells were made since"
    return f"{'reproduced' if record['passed'] else 'not reproduced'}: {record['summary']}{since}"


def visual_tokens(cells: list[dict]) -> float:
    """Average the visual tokens of an image before compression."""
    receipts = [cell["receipt"] for cell in cells]
    return sum(r["visual_tokens"] * r["images"] for r in receipts) / max(sum(r["images"] for r in receipts), 1)


def _asked(cell: dict, task: str) -> dict:
    """Return the split of a task's questions, and whether its prompts hold OCR hints; None where it is not known."""
    settings = cell["lmms_eval"].get("configs", {}).get(task, {})
    special = settings.get("lmms_eval_specific_kwargs") or {}
    special = special.get("default") or special
    split = settings.get("test_split") or settings.get("validation_split")
    return {"split": split, "ocr": special.get("ocr")}


def _batch_size(run: dict, cells: Cells) -> int | str | None:
    """Return the batch size of a run; where it is "auto", with the sizes that were found."""
    asked = run["shared"].get("batch_size")
    found = sorted({cell["batch_size"] for cell in cells.values()}) if asked == "auto" else []
    return f"auto ({' to '.join(str(size) for size in dict.fromkeys([found[0], found[-1]]))})" if found else asked


def facts_of(run: dict, cells: Cells, timing: dict, damaged: list[str]) -> dict:
    """Collect what the numbers depend on, as the last note and the JSON show it."""
    config = run["config"]

    def distinct(name: str) -> list[str]:
        return sorted({str(cell[name]) for cell in cells.values()})

    receipts = [cell["receipt"] for cell in cells.values()]
    redone = f" (damaged, will be evaluated again: {', '.join(damaged)})" if damaged else ""
    return {
        "model": config["model"],
        "checkpoint": config["checkpoint"]["identity"],
        "visual_tokens": visual_tokens(list(cells.values())),
        "tower_flops": config["checkpoint"]["tower_flops"],
        "seed": config["seed"],
        "limit": config["limit"],
        "protocol": next((cell["protocol"] for cell in cells.values() if cell.get("protocol")), None),
        "batch_size": _batch_size(run, cells),
        "asked": {task: _asked(cell, task) for (_, task), cell in cells.items()},
        "versions": run["shared"]["versions"],
        "git_commits": distinct("git_commit"),
        "method_versions": dict(item for cell in cells.values() for item in cell.get("method_versions", {}).items()),
        "config_hashes": distinct("config_hash"),
        "hardware": distinct("hardware"),
        "backends": sorted({f"{r['backend']} in {r['dtype']}" for r in receipts}),
        "timing": timing.get("settings", {}).get("timing"),
        "timed_on": timing.get("hardware"),
        "cells": f"{len(cells)} of {len(config['rows']) * len(config['tasks'])}{redone}",
    }
