"""Time the prefill of every training-free method over that of its ideal, on the widths of LLaVA-1.5-7B, in one run.

    python scripts/bench_prefill.py                # writes assets/bench/prefill_cpu.{json,md}; about 40 minutes
    python scripts/bench_prefill.py -m divprune    # one method alone

`vlmslim bench` measures a whole generation. Here the pictures are encoded once for all rows, so that a CPU has time for
all methods: a prefill is the language model with everything that the patch does in it, selection included. The ideal is
the unpatched model with as many visual tokens in every decoder layer. Rounds are interleaved, and a ratio is the median
of the ratios within a round.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import vlmslim
from vlmslim import registry
from vlmslim.bundled import resolve
from vlmslim.cost.bench.ideal import ideal
from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.cost.bench.run import with_budgets
from vlmslim.cost.bench.shapes import random_model, shape_config
from vlmslim.cost.timer import Timer
from vlmslim.cost.timing import MedianIqr, first_call_timed, interleave
from vlmslim.engine.families import language_model
from vlmslim.io import provenance
from vlmslim.io.files import markdown_table, write_atomically
from vlmslim.patching import Slim, shared_encoding

SHAPE, BUDGETS = "llava-1.5-7b", (64, 128, 192)
BEFORE, INSIDE = 1.05, 1.10  # the targets: of a method before the language model, and of one inside it
OPTIONS = {  # of methods whose defaults need a deeper decoder or the text tower of the checkpoint's CLIP
    "cdpruner": {"relevance": "llm"},
    "fastv": {"layer": 2},
    "dart": {"layer": 2},
}


def asked(names: Sequence[str]) -> list[dict]:
    """Name the methods to time, with their options: those given, or all that need no training."""
    if names:
        return [registry.parse_method(name) for name in names]
    left_out = ("none", "blind", "schedule", "drop_visual")
    listed = [one for one in registry.listings() if one.kind != "trained" and one.name not in left_out]
    return [{"method": one.name, **OPTIONS.get(one.name, {})} for one in listed]


@contextmanager
def encoded(model: Any, output: Any) -> Iterator[None]:
    """Let the unpatched model return a copy of `output`, the features of its pictures, instead of encoding them."""

    @wraps(model.model.get_image_features)  # generate() reads the names of arguments
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        return type(output)(**output)

    model.model.get_image_features = get_image_features
    try:
        yield
    finally:
        model.model.__dict__.pop("get_image_features", None)  # `ideal` may have put it back already


class Prefill:
    """Times prefills of one model and one prompt, whose pictures are encoded once."""

    def __init__(self, model: Any, variants: dict[str, dict]):
        self.model, self.prompt = model, SyntheticPrompt.make(model)
        self.slims: dict[str, Slim] = {}
        self.refused: dict[str, str] = {}
        for label, variant in variants.items():
            try:
                with vlmslim.patch(model, [variant]) as slim:
                    self.slims[label] = slim
            except (ValueError, TypeError, ImportError, OSError) as error:  # it needs files of a checkpoint
                self.refused[label] = str(error)
        self.shared = shared_encoding(self.slims.values())
        with torch.inference_mode():
            self.output = model.model.get_image_features(**self.prompt.pixels)

    def forward(self, inputs: dict[str, torch.Tensor]) -> float:
        """Run the model once; return the milliseconds of its language model, the work of a patch included."""
        timer = Timer(self.model.device, time.process_time)
        with torch.inference_mode(), first_call_timed(language_model(self.model.model), timer):
            self.model(**inputs, use_cache=True, logits_to_keep=1)
        return timer.ms

    def counted(self, label: str) -> tuple[int, ...]:
        """Return the visual tokens that a method leaves in each decoder layer."""
        with self.slims[label].attach(self.shared) as slim:
            self.forward(self.prompt.inputs())
            return tuple(map(round, slim.receipt.summary()["visual_tokens_per_layer"]))

    def patched(self, label: str) -> tuple[float, float]:
        """Time a method: the prefill, and the part of it inside the method."""
        with self.slims[label].attach(self.shared) as slim:
            return self.forward(self.prompt.inputs()), slim.receipt.last.selection_ms

    def ideal(self, visual: tuple[int, ...]) -> tuple[float, float]:
        """Time the ideal with `visual` tokens in each decoder layer."""
        with encoded(self.model, self.output), ideal(self.model, self.prompt, visual) as inputs:
            return self.forward(inputs), 0.0


def measure(prefill: Prefill, variants: dict[str, dict], repeats: int, say: Callable[[str], None]) -> list[dict]:
    """Time all variants that can be set up, and their ideals, in interleaved rounds."""
    visual = {}
    for label in prefill.slims:
        say(f"tokens of {label}")
        visual[label] = prefill.counted(label)
    actions: dict[Any, Callable[[], tuple[float, float]]] = {name: partial(prefill.patched, name) for name in visual}
    actions |= {counts: partial(prefill.ideal, counts) for counts in sorted(set(visual.values()))}
    say(f"timing {len(actions)} methods and ideals, {repeats} rounds")
    times = interleave(actions, repeats, warmup=0)  # `counted` has run every method once
    rows = []
    for label in visual:
        ours, theirs = [ms for ms, _ in times[label]], [ms for ms, _ in times[visual[label]]]
        inside = visual[label][-1] < visual[label][0]
        rows.append(
            {"label": label, "stage": variants[label], "inside": inside}
            | {"visual_tokens_per_layer": visual[label]}
            | {"prefill_ms": statistics.median(ours), "ideal_ms": statistics.median(theirs)}
            | {"selection_ms": statistics.median(ms for _, ms in times[label])}
            | {"over_ideal": asdict(MedianIqr.of(a / b for a, b in zip(ours, theirs, strict=True)))}
            | {"target": INSIDE if inside else BEFORE}
        )
    return rows


def markdown(record: dict) -> str:
    """Write the record as a page."""
    met = sum(row["over_ideal"]["median"] <= row["target"] for row in record["rows"])
    lines = [
        f"# The prefill of every training-free method over its ideal: {SHAPE}, {record['layers']} decoder layers",
        "",
        f"{record['hardware']}, processor time; "
        + ", ".join(f"{name} {at}" for name, at in record["versions"].items())
        + f"; commit {record['git_commit']}; {record['repeats']} rounds.",
        "",
        f"Random weights, 576 visual tokens and 46 words; pictures are encoded once for all rows. {met} of "
        f"{len(record['rows'])} rows meet their target: {BEFORE} for a method before the language model, {INSIDE} for "
        "one that drops tokens inside it.",
        "",
        markdown_table(
            (
                "method",
                "tokens, first and last layer",
                "ideal ms",
                "prefill ms",
                "selection ms",
                "over ideal",
                "target",
            ),
            (
                [
                    row["label"],
                    f"{row['visual_tokens_per_layer'][0]}, {row['visual_tokens_per_layer'][-1]}",
                    *(f"{row[name]:.0f}" for name in ("ideal_ms", "prefill_ms", "selection_ms")),
                    f"{row['over_ideal']['median']:.2f} ± {row['over_ideal']['iqr'] / 2:.2f}",
                    f"{row['target']:.2f}" + ("" if row["over_ideal"]["median"] <= row["target"] else " missed"),
                ]
                for row in record["rows"]
            ),
        ),
        "",
        *(f"- Not timed: `{label}`: {reason}" for label, reason in record["refused"].items()),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--method", action="append", default=[], help="as for `vlmslim bench`; repeat it")
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS, help="visual tokens of an image that stay")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("assets/bench/prefill_cpu"), help="path without suffix")
    given = parser.parse_args()
    torch.set_num_threads(1)  # processor time is then the time of the work
    console = Console(stderr=True)
    model: Any = random_model(shape_config(SHAPE, given.layers), dtype=torch.float32, device="cpu").eval()
    model.config.name_or_path = resolve("bundled/tiny-llava")  # its tokenizer serves methods that read the question
    variants = with_budgets(asked(given.method), given.budgets)
    prefill = Prefill(model, variants)
    rows = measure(prefill, variants, given.repeats, console.print)
    record = {
        "hardware": provenance.hardware("cpu"),
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "layers": given.layers,
        "repeats": given.repeats,
        "rows": rows,
        "refused": prefill.refused,
    }
    page = markdown(record)
    write_atomically(given.output.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
    write_atomically(given.output.with_suffix(".md"), page)
    sys.stdout.write(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
