"""Measure what the methods of a run cost together, in unpatched runs, with and without what they share.

    python scripts/bench_sweep.py bundled/tiny-llava bundled/tiny-llava-next

An unpatched run shares nothing: it encodes its pictures, and prefills a multiple-choice question once for each choice.
All numbers are processor time of one process, so a busy machine changes them little. The tables after it are models of
larger checkpoints from the FLOPs of their parts, without decoding and the methods themselves. The last one says what a
shared KV cache for the constant beginning of all prompts would save. `--prefix` measures it on two decoder layers:

    OMP_NUM_THREADS=1 python scripts/bench_sweep.py --prefix llava-1.5-7b
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModel

from vlmslim.cost.bench.shapes import shape_config
from vlmslim.cost.flops import Ledger, crop_tokens
from vlmslim.engine.families import KV_CACHE
from vlmslim.engine.prefix import PrefixCache
from vlmslim.evaluation.config import RunConfig
from vlmslim.evaluation.harness import Harness
from vlmslim.evaluation.progress import log_to
from vlmslim.evaluation.variants import Variant

KEEP = 0.25
METHODS = [
    *("random", "uniform", "pool", "fastv", "divprune", "todre", "mmr", "scope", "holov", "vispruner", "visionzip"),
    *("hiprune", "prunesid", "mmtok", "agilepruner", "tops", "globalcom2"),
    *({"method": name, "keep": 0.5, "label": f"{name}-half"} for name in ("divprune", "fastv")),
]
MODELLED = [("llava-1.5-7b", 1), ("llava-next-7b", 5)]
TEXT, CHOICES = 60, 4  # tokens of a prompt, and choices of a question
PREFIX = 35  # of the text tokens: the start token, the system prompt of vicuna_v1 and "USER:"


def cost(work: Callable[[], Any], repeats: int) -> float:
    """Return the processor seconds of some work, the median of several times."""
    times = []
    for _ in range(repeats):
        begun = time.process_time()
        work()
        times.append(time.process_time() - begun)
    return statistics.median(times)


def measure(pretrained: str, tasks: Sequence[str], limit: int, batch_size: int, repeats: int, output: Path) -> None:
    """Print the ratios of one checkpoint, task by task."""
    config = RunConfig.model_validate(
        {"model": {"pretrained": pretrained, "device": "cpu"}, "tasks": tasks, "methods": METHODS, "budgets": [KEEP]}
        | {"baselines": False, "batch_size": batch_size, "limit": limit, "output": output}
    )
    harness, variants = Harness(config), config.variants()
    harness.load()
    print(f"\n{pretrained}: {len(variants)} methods, {limit} questions a task, in unpatched runs (and per method)")
    print(f"{'task':<26}{'nothing shared':>18}{'prefill':>18}{'encoding':>18}{'both':>18}")

    def together(some: Sequence[Variant], task: str) -> None:
        answers = harness.answer(some, task)
        for variant in some:
            harness.cell(variant, task, answers[variant.label])

    def alone(some: Sequence[Variant], task: str) -> None:
        for variant in some:
            together([variant], task)

    for task in (task.task for task in harness.tasks.leaves):
        together(variants[:1], task)  # the first run is slower
        asked = harness.asked(task)
        assert asked is not None
        shared, seconds = list(asked.queries), {}
        for prefill in (False, True):
            asked.queries[:] = shared
            if not prefill:
                asked.queries[:] = [
                    query if query.prompt is None else replace(query, prompt=i) for i, query in enumerate(shared)
                ]
            seconds["run", prefill] = cost(lambda: alone(variants[:1], task), repeats)  # noqa: B023
            seconds["alone", prefill] = cost(lambda: alone(variants, task), repeats)  # noqa: B023
            seconds["together", prefill] = cost(lambda: together(variants, task), repeats)  # noqa: B023
        ratios = [
            seconds[how, prefill] / seconds["run", False] for how in ("alone", "together") for prefill in (False, True)
        ]
        print(f"{task:<26}" + "".join(f"{r:>10.1f} ({r / len(variants):.2f})" for r in ratios), flush=True)


def model(methods: int) -> None:
    """Print the same ratios of larger checkpoints, from the FLOPs of tower, projector and prefill."""
    print(f"\nmodel: {methods} methods that keep {KEEP:.0%} before the language model, {TEXT} text tokens")
    print(f"{'shape':<26}{'nothing shared':>18}{'prefill':>18}{'encoding':>18}{'both':>18}")
    for name, crops in MODELLED:
        config = shape_config(name)
        visual = crops * crop_tokens(config)
        full, kept = (Ledger.of(config, TEXT + tokens, crops=crops) for tokens in (visual, round(KEEP * visual)))
        encode = full.tower + full.projector
        for kind, choices in (("", 1), (f", {CHOICES} choices", CHOICES)):
            run = choices * full.total  # each choice encodes and prefills
            prefills = full.total - encode + (methods - 1) * (kept.total - encode)
            ratios = [
                choices * (methods * encode + prefills) / run,
                (methods * encode + prefills) / run,
                choices * (encode + prefills) / run,
                (encode + prefills) / run,
            ]
            print(f"{name + kind:<26}" + "".join(f"{r:>10.1f} ({r / methods:.2f})" for r in ratios))


def prefix(methods: int) -> None:
    """Print what a KV cache of the constant beginning of all prompts would save of the FLOPs of larger checkpoints.

    Of n tokens the first `PREFIX` take the part PREFIX / n of the language model's FLOPs.
    """
    print(f"\nmodel: the first {PREFIX} of {TEXT} text tokens from a shared KV cache, saved share of all FLOPs")
    print(f"{'shape':<26}{'visual tokens':>18}{'one run':>18}{f'{methods} methods':>18}")
    for name, crops in MODELLED:
        config = shape_config(name)
        visual = crops * crop_tokens(config)
        full = Ledger.of(config, TEXT + visual, crops=crops)
        saved = PREFIX / (TEXT + visual) * full.language_model
        for share in (1.0, KEEP, 0.111):
            tokens = TEXT + round(share * visual)
            kept = Ledger.of(config, tokens, crops=crops)
            own = PREFIX / tokens * kept.language_model
            sweep = full.total + (methods - 1) * (kept.total - kept.tower - kept.projector)  # encoded once
            print(
                f"{name:<26}{round(share * visual):>18}{own / kept.total:>18.1%}"
                f"{(saved + (methods - 1) * own) / sweep:>18.1%}"
            )


def measure_prefix(name: str, kept: Sequence[int], batches: Sequence[int], repeats: int) -> None:
    """Print what a KV cache of the first `PREFIX` tokens saves of a prefill, measured on two decoder layers.

    The copy of the cache for each row of the batch counts. One row has padding, as batches of real questions have.
    """
    config = shape_config(name).get_text_config()
    config.num_hidden_layers = 2
    with torch.inference_mode():
        decoder = AutoModel.from_config(config, dtype=torch.float32).eval()
        print(f"\n{name}, two decoder layers: milliseconds of a prefill, medians of {repeats}, and the part saved")
        print(f"{'batch':<8}{'visual tokens':>14}{'whole':>12}{'after prefix':>14}{'copies':>10}{'saved':>18}")
        for batch in batches:
            for visual in kept:
                states = 0.02 * torch.randn(batch, TEXT + visual, config.hidden_size)
                mask = torch.ones(batch, TEXT + visual, dtype=torch.long)
                mask[0, PREFIX] = 0  # the same place in both, so that both have as many tokens
                first = PrefixCache(config=config)
                decoder(inputs_embeds=states[:1, :PREFIX], **{KV_CACHE: first})

                def whole() -> None:
                    decoder(inputs_embeds=states, attention_mask=mask, use_cache=True)  # noqa: B023

                def copies() -> PrefixCache:
                    return first.rows(batch)  # noqa: B023

                def rest() -> None:
                    own = states[:, PREFIX:]  # noqa: B023
                    decoder(inputs_embeds=own, attention_mask=mask, **{KV_CACHE: copies()})  # noqa: B023

                rounds = [[cost(work, 1) for work in (whole, rest, copies)] for _ in range(repeats + 1)][1:]
                saved = sorted(1 - after / before for before, after, _ in rounds)
                times = [1000 * statistics.median(own) for own in zip(*rounds, strict=True)]
                print(
                    f"{batch:<8}{visual:>14}{times[0]:>12.0f}{times[1]:>14.0f}{times[2]:>10.1f}"
                    f"{statistics.median(saved):>8.1%} ({saved[0]:.0%}..{saved[-1]:.0%})",
                    flush=True,
                )


def main() -> None:
    """Parse the arguments and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", default=["bundled/tiny-llava", "bundled/tiny-llava-next"])
    parser.add_argument("--tasks", default="scenes_presence,scenes_choice", help="comma-separated")
    parser.add_argument("--limit", type=int, default=64, help="questions per task")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--prefix", metavar="SHAPE", help="measure a shared beginning of all prompts, and no sweep")
    parser.add_argument("--kept", default="64,192,576", help="visual tokens of --prefix")
    parser.add_argument("--batches", default="1,8", help="prompts of a batch of --prefix")
    args = parser.parse_args()
    if args.prefix:
        kept, batches = ([int(number) for number in given.split(",")] for given in (args.kept, args.batches))
        return measure_prefix(args.prefix, kept, batches, args.repeats)
    log_to(None)
    with TemporaryDirectory() as folder:
        for checkpoint in args.checkpoints:
            tasks = args.tasks.split(",")
            measure(checkpoint, tasks, args.limit, args.batch_size, args.repeats, Path(folder))
    model(len(METHODS) + 1)
    prefix(len(METHODS) + 1)


if __name__ == "__main__":
    main()
