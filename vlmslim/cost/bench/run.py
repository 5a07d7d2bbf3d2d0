"""Measures methods on made-up prompts, against the unpatched model and against the ideal, in one run."""

import platform
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

import vlmslim
from vlmslim import registry
from vlmslim.compressor import Keep
from vlmslim.cost.bench.ideal import ideal
from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.cost.flops import DecoderShape, Ledger, equivalent_tokens, kv_bytes
from vlmslim.cost.memory import cache_bytes, peak_memory
from vlmslim.cost.parts import count_flops
from vlmslim.cost.timer import ReadClock
from vlmslim.cost.timing import MedianIqr, Timing, interleave, time_warm
from vlmslim.engine.families import kv_cache
from vlmslim.io import provenance

UNPATCHED = "unpatched"  # the row without a patch; "none" is a patch that drops nothing


@dataclass(frozen=True)
class Workload:
    """The work that every method is measured on.

    batches     : batch sizes; each becomes a scenario of its own
    images      : images in a prompt
    image_size  : height and width in pixels; None for two tiles a side on anyres models
    text_tokens : words in a prompt
    new_tokens  : tokens to generate
    repeats     : recorded rounds, after one round that is not recorded
    cpu_time    : count processor seconds, for a CPU that other programs use too; selection is always wall-clock time
    """

    batches: tuple[int, ...] = (1,)
    images: int = 1
    image_size: tuple[int, int] | None = None
    text_tokens: int = 46
    new_tokens: int = 32
    repeats: int = 10
    cpu_time: bool = False

    @property
    def clock(self) -> ReadClock:
        """A function that returns seconds."""
        return time.process_time if self.cpu_time else time.perf_counter


def bench(
    model: Any,
    methods: Sequence[dict],
    budgets: Sequence[Keep] | None = None,
    workload: Workload | None = None,
    *,
    peers: Sequence[dict] = (),
    name: str = "",
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure methods on made-up prompts.

    Args:
        model: an unpatched LLaVA on one device.
        methods: methods with their options, as `registry.parse_method` returns them.
        budgets: visual tokens to keep per image, counts or shares; by default `default_budgets`.
        workload: prompts, generation length and rounds.
        peers: methods of other authors to measure beside them, at the same budgets.
        name: name of the model in the record.
        progress: called with a line of text before each step.

    Returns:
        A record, ready for JSON: `model`, `device`, `versions`, `workload` and `scenarios`, one per batch size, each
        with a row per method and budget; `peer` marks the rows of `peers`. Times are medians with interquartile
        ranges; ratios are medians over rounds of the ratio within a round. `encode` is the vision tower and the
        projector, `prefill` the language model with the work of the patch in it; `ttft` is both and the choice of the
        first token.

    Raises:
        ValueError: an unknown method or option, or a budget larger than an image.
        RuntimeError: the model is patched already.
    """
    work = workload or Workload()
    scenarios = []
    for batch in work.batches:
        prompt = SyntheticPrompt.make(
            model, batch=batch, images=work.images, image_size=work.image_size, text_tokens=work.text_tokens
        )
        keeps = budgets or default_budgets(prompt.tokens)
        theirs = {f"{label} (peer)": variant for label, variant in with_budgets(peers, keeps).items()}
        variants = {UNPATCHED: None, **with_budgets(methods, keeps), **theirs}
        scenarios.append(_Scenario(model, prompt, work).run(variants, theirs, progress))
    return {
        "model": {"name": name or model.name_or_path or type(model).__name__} | _describe(model),
        "device": provenance.hardware(str(model.device)),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("torch", "transformers")}
        | {"vlmslim": vlmslim.__version__, "commit": provenance.git_commit()},
        "workload": asdict(work),
        "scenarios": scenarios,
    }


def default_budgets(visual_tokens: int) -> list[int]:
    """Return a third, two ninths and one ninth of an image: 192, 128 and 64 of 576."""
    return [max(1, round(visual_tokens * ninths / 9)) for ninths in (3, 2, 1)]


def with_budgets(methods: Sequence[dict], budgets: Sequence[Keep]) -> dict[str, dict]:
    """Combine methods and budgets, by label. A method that has no `keep`, or was given one, appears once.

    Raises:
        ValueError: the same combination twice, or an option that a method does not have.
    """
    variants: dict[str, dict] = {}
    for method in methods:
        takes_budget = "keep" not in method and "keep" in registry.options_of(method["method"])
        for variant in [method | {"keep": keep} for keep in budgets] if takes_budget else [method]:
            label = registry.label(variant)
            if label in variants:
                raise ValueError(f"{label} is asked for twice")
            registry.build(variant)  # refuses wrong options
            variants[label] = variant
    return variants


def _describe(model: Any) -> dict[str, Any]:
    tensors = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(tensor.numel() for tensor in tensors),
        "weight_bytes": sum(tensor.nbytes for tensor in tensors),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
        "decoder": asdict(DecoderShape.from_config(model.config)),
    }


@dataclass(frozen=True)
class _Scenario:
    """All measurements at one batch size. A variant of None is the unpatched model."""

    model: Any
    prompt: SyntheticPrompt
    work: Workload

    def run(
        self, variants: Mapping[str, dict | None], peers: Collection[str], progress: Callable[[str], None]
    ) -> dict[str, Any]:
        """Count and time all variants and their ideals; `peers` are the labels of other authors' methods."""
        prompt, work = self.prompt, self.work
        counts = {}
        for label, variant in variants.items():
            progress(f"batch {prompt.batch}: FLOPs and memory of {label}")
            counts[label] = self.count(variant)
        ideal_of = {label: tuple(map(round, count["visual_tokens_per_layer"])) for label, count in counts.items()}
        actions: dict[Any, Callable[[], tuple[Timing, float]]] = {
            label: partial(self.time, variant) for label, variant in variants.items()
        }
        actions |= {visual: partial(self.time_ideal, visual) for visual in sorted(set(ideal_of.values()))}
        progress(f"batch {prompt.batch}: timing {len(actions)} methods and ideals, {work.repeats} rounds")
        measured = interleave(actions, work.repeats)
        times = {key: [timing for timing, _ in results] for key, results in measured.items()}
        rows = []
        for label, count in counts.items():
            row: dict[str, Any] = {"label": label, "peer": label in peers, "stage": variants[label]} | count
            row["encode_ms"] = asdict(MedianIqr.of(timing.encode_ms for timing in times[label]))
            row["selection_ms"] = asdict(MedianIqr.of(ms for _, ms in measured[label]))
            for name in ("prefill", "ttft", "decode", "latency"):
                row[f"{name}_ms"] = asdict(MedianIqr.of(getattr(timing, f"{name}_ms") for timing in times[label]))
                row[f"{name}_over_ideal"] = _ratio(times[label], times[ideal_of[label]], f"{name}_ms")
                row[f"{name}_over_unpatched"] = _ratio(times[label], times[UNPATCHED], f"{name}_ms")
            row["tokens_per_second"] = 1000 * prompt.batch / row["decode_ms"]["median"]
            row["peak_over_unpatched"] = count["peak_bytes"] / counts[UNPATCHED]["peak_bytes"]
            rows.append(row)
        return {
            "batch": prompt.batch,
            "text_tokens": prompt.text_tokens,
            "visual_tokens": prompt.visual_tokens,
            "crops": prompt.images * prompt.crops,
            "rows": rows,
        }

    def patched(self, variant: dict | None) -> AbstractContextManager:
        """Patch the model inside the context, and yield the patch; yield None for the unpatched model."""
        return nullcontext() if variant is None else vlmslim.patch(self.model, [variant])

    def count(self, variant: dict | None) -> dict[str, Any]:
        """Count tokens, FLOPs and bytes, which need no clock."""
        model, prompt, shape = self.model, self.prompt, DecoderShape.from_config(self.model.config)
        inputs, visual = prompt.inputs(), [float(prompt.visual_tokens)] * shape.layers
        with self.patched(variant) as slim:
            with torch.inference_mode():
                held = cache_bytes(kv_cache(model(**inputs, use_cache=True, logits_to_keep=1)))
            if slim is not None:
                visual = slim.receipt.summary()["visual_tokens_per_layer"]
            counted = count_flops(model, inputs)
            peak = peak_memory(model, inputs, self.work.new_tokens)
        tokens = [count + prompt.text_tokens for count in visual]
        crops = prompt.images * prompt.crops
        ledger = Ledger.of(model.config, tokens, crops=crops, grid=prompt.grid, method=counted["method"] / prompt.batch)
        return {
            "visual_tokens_per_layer": visual,
            "equivalent_tokens": equivalent_tokens(visual),
            "flops": ledger.as_dict(),
            "flops_counted": {part: total / prompt.batch for part, total in counted.items()},
            "kv_bytes": held,
            "kv_theory_bytes": prompt.batch * kv_bytes(shape, tokens, model.dtype.itemsize),
            "peak_bytes": peak,
        }

    def time(self, variant: dict | None) -> tuple[Timing, float]:
        """Time one generation; also return the milliseconds inside the method."""
        with self.patched(variant) as slim:
            timing = time_warm(self.model, self.prompt.inputs(), self.work.new_tokens, self.work.clock)
            return timing, 0.0 if slim is None else slim.receipt.last.selection_ms

    def time_ideal(self, visual: tuple[int, ...]) -> tuple[Timing, float]:
        """Time one generation of the ideal with `visual` tokens per layer, where no method runs."""
        with ideal(self.model, self.prompt, visual) as inputs:
            return time_warm(self.model, inputs, self.work.new_tokens, self.work.clock), 0.0


def _ratio(timings: list[Timing], reference: list[Timing], field: str) -> dict[str, float]:
    pairs = zip(timings, reference, strict=True)
    return asdict(MedianIqr.of(getattr(ours, field) / getattr(theirs, field) for ours, theirs in pairs))
