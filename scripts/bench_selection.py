"""Time the greedy searches against their matrix product, and every method at two sizes, in one process.

    python scripts/bench_selection.py                   # prints tables; writes assets/bench/selection_cpu.{json,md}
    python scripts/bench_selection.py --device cuda     # the same, as selection_cuda, with the targets of the kernel
    python scripts/bench_selection.py --part searches   # the searches alone, which take less than a minute

Sizes are those of LLaVA-1.5-7B (64 of 576 visual tokens, width 4096) and of LLaVA-NeXT-7B without newlines (320 of
2880). Repetitions are interleaved, and ratios are medians of the ratios within a repetition, because other programs and
the clock of a processor change times from one minute to the next.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import vlmslim
from vlmslim import registry
from vlmslim.bundled import resolve
from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.cost.bench.shapes import random_model, shape_config
from vlmslim.cost.timing import interleave
from vlmslim.io import provenance
from vlmslim.io.files import markdown_table, write_atomically
from vlmslim.methods.cdpruner import conditional_diversity
from vlmslim.methods.divprune import farthest_points
from vlmslim.methods.mmr import marginal_relevance
from vlmslim.methods.scope import salient_coverage
from vlmslim.methods.todre import diverse
from vlmslim.ops.greedy import (
    Coverage,
    Determinant,
    Farthest,
    MarginalRelevance,
    Rows,
    Rule,
    cosine_matrix,
    greedy,
    step_by_step,
)

SIZES, WIDTH = ((576, 64), (2880, 320)), 4096
PRODUCT_TARGET = 1.15  # of a whole selection over its own product, on a CPU
KERNEL_TARGETS = {576: 0.3, 2880: 1.0}  # milliseconds of a search for one image, on a GPU
BATCH_TARGET = 2.0  # of the time of 8 images over that of one, on a GPU
SHAPES = {576: ("llava-1.5-7b", None), 2880: ("llava-next-7b", (672, 672))}

Search = Callable[[], Tensor]


def milliseconds(function: Callable[[], Any], device: str) -> float:
    """Time one call: processor time on a CPU, so that other programs do not count; on a GPU until it has finished."""
    if device == "cpu":
        start = time.process_time()
        function()
        return 1000 * (time.process_time() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


# --- searches ---------------------------------------------------------------------------------------------------------


def searches(n: int, k: int, width: int, device: str, images: int = 1) -> dict[str, tuple[Search, Callable[[], Rule]]]:
    """Make every search over one set of tokens: the whole selection, and its rule with the matrix made already."""
    generator = torch.Generator().manual_seed(n)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x = normal(images, n, width) + normal(images, 1, width)  # tokens share a direction, as real ones do
    score, first = normal(images, n).softmax(1), torch.zeros(images, dtype=torch.long, device=device)
    matrix = cosine_matrix(x)
    kernel = score[:, :, None] * matrix * score[:, None]
    made: dict[str, tuple[Search, Callable[[], Rule]]] = {
        "max-min": (lambda: farthest_points(x, k), lambda: Farthest(Rows(matrix), torch.maximum)),
        "max-sum": (lambda: diverse(x, k, first), lambda: Farthest(Rows(matrix), torch.add)),
        "relevance": (lambda: marginal_relevance(x, score, k), lambda: MarginalRelevance(score, matrix, 0.5)),
        "determinant": (lambda: conditional_diversity(x, score, k), lambda: Determinant(kernel, score, k)),
        "product": (lambda: torch.stack([each @ each.T for each in x]), lambda: Coverage(matrix)),
    }
    if n <= SIZES[0][0]:  # methods that search for coverage do so in each view of a picture
        made["coverage"] = (lambda: salient_coverage(x, score, k), lambda: Coverage(matrix, score))
    return made


def time_searches(n: int, k: int, width: int, device: str, repeats: int) -> list[dict]:
    """Time every search at one size. The picks of `greedy` and of the plain loop must be the same.

    Raises:
        RuntimeError: they are not.
    """
    made = searches(n, k, width, device)
    many = {} if device == "cpu" else searches(n, k, width, device, images=8)
    first = torch.zeros(1, dtype=torch.long, device=device)
    actions: dict[tuple[str, str], Callable[[], float]] = {}
    for name, (whole, rule) in made.items():
        actions[name, "whole"] = partial(milliseconds, whole, device)
        if name == "product":
            continue
        picks = [search(rule(), k, first) for search in (greedy, step_by_step)]
        if (apart := float((picks[0] != picks[1]).double().mean())) > (0.01 if name == "determinant" else 0):
            raise RuntimeError(f"{name}: the fast search and the plain loop differ in {apart:.1%} of {k} picks")
        actions[name, "search"] = partial(milliseconds, lambda rule=rule: greedy(rule(), k, first), device)
        actions[name, "loop"] = partial(milliseconds, lambda rule=rule: step_by_step(rule(), k, first), device)
        if many:
            rule8, first8 = many[name][1], first.expand(8)
            actions[name, "batch"] = partial(milliseconds, lambda r=rule8, f=first8: greedy(r(), k, f), device)
    times = interleave(actions, repeats)
    product = times["product", "whole"]
    return [
        {"name": name, "n": n, "k": k, "product_ms": statistics.median(product)}
        | {f"{part}_ms": statistics.median(times[name, part]) for part in ("whole", "search", "loop")}
        | {"over_product": _ratio(times[name, "whole"], product)}
        | ({"batch_over_one": _ratio(times[name, "batch"], times[name, "search"])} if many else {})
        for name in made
        if name != "product"
    ]


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def targets(rows: list[dict], device: str) -> list[str]:
    """Say which targets the searches meet."""
    lines = []
    for row in rows:
        size = f"{row['name']}, {row['n']} to {row['k']}"
        if device == "cpu":
            lines.append(_verdict(f"{size}: selection over its product", row["over_product"], PRODUCT_TARGET))
        elif row["name"] != "coverage":
            lines.append(_verdict(f"{size}: search, ms", row["search_ms"], KERNEL_TARGETS[row["n"]]))
            lines.append(_verdict(f"{size}: 8 images over one", row["batch_over_one"], BATCH_TARGET))
    return lines


def _verdict(what: str, value: float, target: float) -> str:
    return f"{what} {value:.2f}, target {target:g}: {'met' if value <= target else 'MISSED'}"


# --- methods ----------------------------------------------------------------------------------------------------------


def time_methods(n: int, k: int, device: str, repeats: int, layers: int) -> list[dict]:
    """Time every training-free method inside one model with the widths of a 7B checkpoint and few layers.

    Methods that need more files of the checkpoint are named with the reason.
    """
    shape, size = SHAPES[n]
    config: Any = shape_config(shape, layers)
    config.text_config.intermediate_size = config.text_config.hidden_size  # no method looks into the MLP
    config.vision_config.num_hidden_layers = 4
    model: Any = random_model(config, dtype=torch.float32, device=device)
    model.config.name_or_path = resolve("bundled/tiny-llava")  # its tokenizer serves methods that read the question
    prompt = SyntheticPrompt.make(model, image_size=size)
    rows: list[dict] = []
    actions = {}
    for listing in registry.listings():
        if listing.name in ("none", "blind") or listing.kind == "trained":
            continue
        options: dict[str, Any] = {"keep": k} if "keep" in registry.options_of(listing.name) else {}
        if listing.name == "cdpruner":
            options["relevance"] = "llm"  # the default needs the text tower of the checkpoint's CLIP
        try:
            vlmslim.patch(model, listing.name, **options).remove()
        except (ValueError, TypeError, ImportError) as error:
            rows.append({"name": listing.name, "n": n, "k": k, "not_timed": str(error)})
            continue
        actions[listing.name] = partial(_selection_ms, model, prompt, listing.name, options)
    times = interleave(actions, repeats)
    rows += [{"name": name, "n": n, "k": k, "ms": statistics.median(found)} for name, found in times.items()]
    return sorted(rows, key=lambda row: row["name"])


@torch.inference_mode()
def _selection_ms(model: Any, prompt: SyntheticPrompt, name: str, options: dict) -> float:
    with vlmslim.patch(model, name, **options) as slim:
        model(**prompt.inputs(), logits_to_keep=1)
        return slim.receipt.last.selection_ms


# --- the page ---------------------------------------------------------------------------------------------------------


def markdown(record: dict) -> str:
    """Write the record as a page."""
    lines = ["# The time of selections", ""]
    lines += [f"{record['hardware']}; " + ", ".join(f"{name} {at}" for name, at in record["versions"].items()), ""]
    if record["searches"]:
        batch = "batch_over_one" in record["searches"][0]
        header = ("search", "N", "keep", "product ms", "whole selection ms", "over product", "search ms", "loop ms")
        rows = [
            [row["name"], str(row["n"]), str(row["k"]), f"{row['product_ms']:.2f}", f"{row['whole_ms']:.2f}"]
            + [f"{row['over_product']:.2f}x", f"{row['search_ms']:.2f}", f"{row['loop_ms']:.2f}"]
            + ([f"{row['batch_over_one']:.2f}x"] if batch else [])
            for row in record["searches"]
        ]
        lines += [markdown_table((*header, "8 images over one") if batch else header, rows), ""]
        lines += [
            "Product is the n x n product of the tokens by itself, and whole selection is everything that the method "
            "does to n tokens, its product included. Search is the choice of the tokens when the matrix is there: "
            "by NumPy on a CPU, and by the Triton kernel on a GPU except for coverage (`vlmslim/ops/greedy.py`). "
            "Loop is the same search by the plain loop in PyTorch.",
            "",
            *(f"- {line}" for line in targets(record["searches"], record["device"])),
            "",
        ]
    if record["methods"]:
        timed = [row for row in record["methods"] if "ms" in row]
        lines += [
            "Every training-free method, as its receipt says, in a model with the widths of the 7B checkpoint "
            f"and {record['layers']} decoder layers (methods inside the decoder act there as often as they can):",
            "",
            markdown_table(
                ("method", *(f"{n} to {k}: ms" for n, k in SIZES)),
                (
                    [
                        name,
                        *(
                            next((f"{r['ms']:.2f}" for r in timed if (r["name"], r["n"]) == (name, n)), "–")
                            for n, _ in SIZES
                        ),
                    ]
                    for name in sorted({row["name"] for row in timed})
                ),
            ),
            "",
            *sorted({f"- `{row['name']}`: {row['not_timed']}" for row in record["methods"] if "not_timed" in row}),
        ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    """Run, print, write; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--part", choices=("all", "searches", "methods"), default="all")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers of the model for the methods")
    parser.add_argument("--no-targets", action="store_true", help="exit with 0 even if a target is missed")
    parser.add_argument("--output", type=Path, help="path without suffix; by default assets/bench/selection_DEVICE")
    given = parser.parse_args()
    torch.set_num_threads(1)  # a function's processor time is then its time
    record: dict[str, Any] = {
        "hardware": provenance.hardware(given.device),
        "device": given.device,
        "versions": provenance.versions(),
        "git_commit": provenance.git_commit(),
        "repeats": given.repeats,
        "layers": given.layers,
        "searches": [],
        "methods": [],
    }
    with torch.inference_mode():
        for n, k in SIZES:
            if given.part != "methods":
                record["searches"] += time_searches(n, k, WIDTH, given.device, given.repeats)
            if given.part != "searches":
                record["methods"] += time_methods(n, k, given.device, max(1, given.repeats // 3), given.layers)
    Console(width=120).print(markdown(record), markup=False, highlight=False)
    output = given.output or Path(__file__).parents[1] / "assets" / "bench" / f"selection_{given.device}"
    if given.output is not None or given.part == "all":
        write_atomically(output.with_suffix(".json"), json.dumps(record, indent=1) + "\n")
        write_atomically(output.with_suffix(".md"), markdown(record))
    missed = any(line.endswith("MISSED") for line in targets(record["searches"], given.device))
    return missed and not given.no_targets


if __name__ == "__main__":
    sys.exit(main())
