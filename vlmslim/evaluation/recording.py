"""Records of the visual tokens of single questions, under every row of a run, which the report draws.

A question is asked again, alone, under each row. The record holds the picture as the model saw it, the rectangle of
each token, the tokens that are left after each stage, and the counts and FLOPs of this prefill.
"""

import base64
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image

from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.inputs import Inputs
from vlmslim.evaluation.progress import Display
from vlmslim.evaluation.store import Store, reading
from vlmslim.evaluation.variants import Variant
from vlmslim.leaderboard.board import UNPATCHED, Leaderboard, open_run
from vlmslim.leaderboard.flips import flipped
from vlmslim.pictures.canvas import Canvas
from vlmslim.pictures.trace import Cut, Trace
from vlmslim.receipt import Prefill


def record_flips(
    board: Leaderboard, store: Store, variants: Sequence[Variant], most: int, harness: Any, display: Display
) -> None:
    """Record the tokens of questions that were flipped, under every row that answered them.

    Args:
        board: of the run.
        store: of its directory; what it holds already is not recorded again.
        variants: the rows, with all options known.
        most: questions to record, of all tasks together.
        harness: loads the checkpoint and asks, if anything is missing.
        display: shows progress.
    """
    todo = []
    for task, questions in flipped(board, most).items():
        answered = [variant for variant in variants if store.cell(variant.label, task) is not None]
        hashes = {variant.label: store.samples_hash(variant.label, task) for variant in answered}
        missing = [one for one in questions if (store.tokens(task, one) or {}).get("samples_sha256") != hashes]
        if missing:
            todo.append((task, answered, hashes, missing))
    if not todo:
        return
    total = sum(len(missing) for *_, missing in todo)
    display.message(f"recording the tokens of {total} questions for the report")
    harness.load()
    with display.bar(total=total, desc="report") as bar:
        for task, answered, hashes, missing in todo:
            for question, record in harness.record(answered, task, missing):
                store.save_tokens(task, question, record | {"samples_sha256": hashes})
                bar.update(1)


def add_pictures(
    directory: Path,
    most: int,
    *,
    device: str | None = None,
    harness: Callable[..., Any] | None = None,
    display: Display | None = None,
) -> Leaderboard:
    """Record the tokens of flipped questions of a run that is over, with its checkpoint at hand.

    Args:
        directory: of the run.
        most: questions to record, of all tasks together.
        device: instead of the run's own.
        harness: as in `vlmslim.evaluation.run.run`.
        display: shows progress.

    Raises:
        ConfigError: the directory holds no run, or its checkpoint, methods or tasks are not what they were.
    """
    board = Leaderboard.read(directory)
    display = display or Display()
    try:
        with FileLock(Path(directory) / ".lock", timeout=0), reading(directory):
            store, run = open_run(directory)
            config = _config_of(board, run, Path(directory), device)
            made = (harness or _default_harness())(config, display.bar)
            _check_same(store, run, made, config.variants(), board)
            record_flips(board, store, config.variants(), most, made, display)
    except Timeout as error:
        raise ConfigError(f"a run is writing to {directory}; wait for its end") from error
    return board


def _default_harness() -> Callable[..., Any]:
    from vlmslim.evaluation.harness import Harness  # it loads lmms-eval, which takes seconds

    return Harness


def _config_of(board: Leaderboard, run: dict, directory: Path, device: str | None) -> RunConfig:
    """Make the configuration of a run from what its directory says; costs are solved in its rows."""
    model = run["shared"]["model"] | ({} if device is None else {"device": device, "device_map": None})
    return RunConfig.model_validate(
        {
            "model": model,
            "tasks": [task for task in run["config"]["tasks"] if task["task"] in board.tasks],
            "methods": [
                {"label": row.label, "stages": row.stages}
                for row in board.rows
                if row.scores and row.label != UNPATCHED
            ]
            or [UNPATCHED],
            "baselines": False,
            "batch_size": run["shared"]["batch_size"],
            "seed": run["config"]["seed"],
            "limit": run["config"]["limit"],
            "include_path": run["config"].get("include_path", []),
            "output": directory,
        }
    )


def _check_same(store: Store, run: dict, harness: Any, variants: Sequence[Variant], board: Leaderboard) -> None:
    """Refuse to draw the tokens of other weights, code or questions than those that gave the answers."""
    if harness.describe_checkpoint()["identity"] != run["shared"]["checkpoint"]:
        raise ConfigError(
            f"{run['config']['model']} is not the checkpoint that it was in the run; pictures would show other tokens "
            "than those that gave the answers"
        )
    inputs = Inputs(variants, harness.tasks)
    for variant in variants:
        for task in board.tasks:
            if (cell := store.cell(variant.label, task)) is not None:
                inputs.check_stored(cell, variant, store.directory)


# ---------------------------------------------------------------------- records


def images_of(traces: Sequence[Trace], processor: Any, size: int = 336) -> list[dict]:
    """Return the images of a prompt as the model saw them, with the rectangles of their tokens.

    Returns:
        For each image: `src`, the picture as a data URI; `width` and `height` in pixels; `tokens`, how many it has;
        `rects`: token, x, y, width, height, where token -1 is a place without a token.
    """
    found = []
    for trace in traces:
        canvas = Canvas.of(trace, processor, size)
        height, width = canvas.token.shape
        found.append(
            {
                "src": _data_uri(Image.fromarray(canvas.pixels)),
                "width": width,
                "height": height,
                "tokens": len(trace.grid),
                "rects": rectangles(canvas.token),
            }
        )
    return found


def rectangles(token: np.ndarray) -> list[list[int]]:
    """Cut a map of tokens (H, W) into rectangles of equal numbers: number, x, y, width, height. -2 is left out."""
    found = []
    starts = [0, *((token[1:] != token[:-1]).any(1).nonzero()[0] + 1).tolist(), len(token)]
    for top, bottom in zip(starts, starts[1:], strict=False):
        line = token[top]
        edges = [0, *((line[1:] != line[:-1]).nonzero()[0] + 1).tolist(), len(line)]
        for left, right in zip(edges, edges[1:], strict=False):
            if line[left] > -2:
                found.append([int(line[left]), left, top, right - left, bottom - top])
    return found


def row_of(prefill: Prefill, flops: dict[str, int]) -> dict:
    """Return what one row did to a prompt: its images, cut by cut, and the counts and FLOPs of the prefill."""
    assert prefill.traces is not None
    told = prefill.as_dict()
    told.pop("selection_ms")  # under a counter of FLOPs it is no time of the method
    return {
        "images": [{"depth": trace.depth, "cuts": list(map(cut_of, trace.cuts))} for trace in prefill.traces[0]],
        "prefill": json.loads(json.dumps(told)),
        "flops": flops,
    }


def cut_of(cut: Cut) -> dict:
    """Write the tokens after a stage: a bit for each token of the image, or where merged ones went; and the scores."""
    kept = into = None
    if cut.merged or cut.made_of is not None:
        assert cut.into is not None
        into = _base64(cut.into.astype("<i2"))
    elif cut.into is not None:
        kept = _base64(np.packbits(cut.shown, bitorder="little"))
    return {
        "first": cut.first,
        "stage": cut.stage,
        "count": cut.count,
        "kept": kept,
        "into": into,
        "score": None if (rank := cut.rank) is None else _base64(_levels(rank)),
        "parts": None if cut.made_of is None else _parts(cut.made_of),
    }


def _parts(made_of: np.ndarray) -> dict[str, str]:
    """List what tokens that share patches are made of (k, n): token, patch, and 1 to 255 for how much of it."""
    token, patch = made_of.nonzero()
    share = made_of / made_of.max(1, keepdims=True).clip(min=np.finfo(np.float32).tiny)
    level = (1 + 254 * share[token, patch]).round().astype(np.uint8)
    return {"token": _base64(token.astype("<i2")), "patch": _base64(patch.astype("<i2")), "level": _base64(level)}


def _levels(rank: np.ndarray) -> np.ndarray:
    """Map the order of scores (n,) to 1 (lowest) to 255 (highest); 0 where there is none."""
    return np.nan_to_num(1 + 254 * rank).round().astype(np.uint8)


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(array.tobytes()).decode()


def _data_uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    picture.save(data, "WEBP", quality=85, method=4)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
