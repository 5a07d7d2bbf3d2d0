"""`vlmslim bench`: what methods cost and save, against the unpatched model and against the ideal, in one run."""

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version

import torch
from torch import nn

import vlmslim
from vlmslim import registry
from vlmslim.compressor import Keep
from vlmslim.cost.bench.ideal import ideal
from vlmslim.cost.bench.prompt import Prompt
from vlmslim.cost.bench.shapes import SHAPES, build, shape_config
from vlmslim.cost.flops import DecoderShape, Ledger, equivalent_tokens, kv_bytes
from vlmslim.cost.memory import cache_bytes, peak_memory
from vlmslim.cost.parts import count_flops
from vlmslim.cost.timing import Clock, Spread, Timing, interleave, time_steady
from vlmslim.engine.families import kv_cache
from vlmslim.io import provenance
from vlmslim.loading import check_device, check_dtype, default_device, load_model

UNPATCHED = "unpatched"
#: What a prefill may cost, over the ideal's: (device, prunes inside the decoder) -> bound.
PREFILL_BOUND = {("cpu", False): 1.05, ("cuda", False): 1.03, ("cpu", True): 1.10, ("cuda", True): 1.10}

#: A field of `Timing` -> its name in a row.
TIMES = {"prefill_ms": "prefill", "ttft_ms": "ttft", "decode_ms": "decode", "latency_ms": "latency"}


@dataclass(frozen=True)
class Workload:
    """What every method is given to do.

    batches     : batch sizes, one scenario each
    images      : images in a prompt
    image_size  : height and width in pixels; None for two tiles a side on anyres models
    text_tokens : words of a prompt
    new_tokens  : tokens generated, always exactly so many
    repeats     : recorded rounds; one more goes before them
    cpu_time    : count processor seconds instead of the wall clock's, for a CPU that is shared with other programs;
                  selection keeps to the wall clock
    """

    batches: tuple[int, ...] = (1,)
    images: int = 1
    image_size: tuple[int, int] | None = None
    text_tokens: int = 46
    new_tokens: int = 32
    repeats: int = 10
    cpu_time: bool = False

    @property
    def clock(self) -> Clock:
        """Reads seconds."""
        return time.process_time if self.cpu_time else time.perf_counter


def with_budgets(stages: Sequence[dict], budgets: Sequence[Keep]) -> dict[str, dict]:
    """Every method at every budget, by label; one that has no `keep`, or was given one, stands once.

    Raises:
        ValueError: a method twice, or an option that a method does not have.
    """
    treatments: dict[str, dict] = {}
    for stage in stages:
        takes_budget = "keep" not in stage and "keep" in registry.options_of(stage["method"])
        for keep in budgets if takes_budget else [stage.get("keep")]:
            whole = stage if keep is None else stage | {"keep": keep}
            name = registry.label(whole)
            if name in treatments:
                raise ValueError(f"{name} is asked for twice")
            registry.build(whole)  # refuses wrong options
            treatments[name] = whole
    return treatments


def parse_numbers(text: str) -> tuple[int | float, ...]:
    """Read `192,128,64` or `0.33,0.11`.

    Raises:
        ValueError: something is no number.
    """
    try:
        return tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r}: write numbers with commas between them, such as 192,128,64") from error


def parse_batches(text: str) -> tuple[int, ...]:
    """Read batch sizes, `1,8`.

    Raises:
        ValueError: something is no whole number from 1 up.
    """
    batches = parse_numbers(text)
    if not all(isinstance(batch, int) and batch >= 1 for batch in batches):
        raise ValueError(f"batch {text!r}: write whole numbers from 1 up, such as 1,8")
    return batches


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Read `672x1008` as height and width.

    Raises:
        ValueError: it is not of that form.
    """
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"image size {text!r}: write HEIGHTxWIDTH in pixels, such as 672x672")
    return int(height), int(width)


def load(
    checkpoint: str | None = None,
    shape: str | None = None,
    *,
    layers: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attention: str = "sdpa",
) -> tuple[str, nn.Module]:
    """A checkpoint, or a named shape with random weights, on one device.

    Returns:
        What to call it, and the model.

    Raises:
        ValueError: neither or both are given, or the shape, the dtype or the device do not exist or do not fit.
        OSError: there is no such checkpoint.
    """
    if (checkpoint is None) == (shape is None):
        raise ValueError(f"give a checkpoint or --shape, one of the two; shapes: {', '.join(SHAPES)}")
    if layers is not None and shape is None:
        raise ValueError("--layers goes with --shape; a checkpoint has the layers it has")
    device = device or default_device()
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if shape is not None:
        check_device(device)
        check_dtype(dtype)
        name = shape if layers is None else f"{shape}, {layers} decoder layers"
        return f"{name}, random weights", build(
            shape_config(shape, layers), dtype=getattr(torch, dtype), device=device, attention=attention
        )
    return checkpoint, load_model(checkpoint, dtype=dtype, device=device, attention=attention)


def default_budgets(visual_tokens: int) -> list[int]:
    """A third, two ninths and one ninth of an image: 192, 128 and 64 of 576."""
    return [max(1, round(visual_tokens * ninths / 9)) for ninths in (3, 2, 1)]


def bench(
    model: nn.Module,
    stages: Sequence[dict],
    budgets: Sequence[Keep] | None = None,
    workload: Workload | None = None,
    *,
    name: str = "",
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Measure methods on made-up prompts.

    Args:
        model: an unpatched LLaVA on one device.
        stages: methods with their options, as `registry.parse_method` gives them.
        budgets: visual tokens to keep per image, counts or shares; by default `default_budgets`.
        workload: prompts, generation length and rounds.
        name: what to call the model in the record.
        say: is told what is going on.

    Returns:
        A JSON-able record: `model`, `device`, `versions`, `workload` and a list of `scenarios`, one per batch size,
        each with a row per treatment. Times are medians with interquartile ranges. Ratios are medians over rounds of
        the ratio within a round. `prefill` is the language model with everything that the patch does in it;
        `ttft` adds vision tower, projector and the first choice of a token.

    Raises:
        ValueError: an unknown method or option, or a budget larger than an image.
        RuntimeError: the model is patched already.
    """
    work = workload or Workload()
    scenarios = []
    for batch in work.batches:
        size = dict(images=work.images, image_size=work.image_size, text_tokens=work.text_tokens)
        prompt = Prompt.make(model, batch=batch, **size)
        treatments = {UNPATCHED: None} | with_budgets(stages, budgets or default_budgets(prompt.tokens))
        scenarios.append(_scenario(model, prompt, treatments, work, say))
    return {
        "model": {"name": name or model.name_or_path or type(model).__name__} | _describe(model),
        "device": provenance.hardware(str(model.device)),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("torch", "transformers")}
        | {"vlmslim": vlmslim.__version__, "commit": provenance.git_commit()},
        "workload": asdict(work),
        "scenarios": scenarios,
    }


def _describe(model: nn.Module) -> dict:
    tensors = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(t.numel() for t in tensors),
        "weight_bytes": sum(t.numel() * t.element_size() for t in tensors),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config.get_text_config()._attn_implementation,
        "decoder": asdict(DecoderShape.from_config(model.config)),
    }


def _treated(model: nn.Module, stage: dict | None) -> AbstractContextManager:
    return nullcontext() if stage is None else vlmslim.patch(model, [stage])


def _scenario(model: nn.Module, prompt: Prompt, treatments: dict, work: Workload, say: Callable) -> dict:
    """Everything at one batch size."""
    facts = {}
    for label, stage in treatments.items():
        say(f"batch {prompt.batch}: FLOPs and memory of {label}")
        facts[label] = _survey(model, prompt, stage, work.new_tokens)
    bounds = {tuple(map(round, fact["visual_tokens_per_layer"])) for fact in facts.values()}
    actions = {label: partial(_run, model, prompt, stage, work) for label, stage in treatments.items()}
    actions |= {bound: partial(_run_ideal, model, prompt, bound, work) for bound in sorted(bounds)}
    say(f"batch {prompt.batch}: timing {len(actions)} treatments in turn, {work.repeats} rounds")
    times = interleave(actions, work.repeats)
    rows = []
    for label, fact in facts.items():
        own = [timing for timing, _ in times[label]]
        best = [timing for timing, _ in times[tuple(map(round, fact["visual_tokens_per_layer"]))]]
        reference = [timing for timing, _ in times[UNPATCHED]]
        row = {"label": label, "stage": treatments[label]} | fact
        row["selection_ms"] = asdict(Spread.of(ms for _, ms in times[label]))
        for field, name in TIMES.items():
            row[f"{name}_ms"] = asdict(Spread.of(getattr(t, field) for t in own))
            row[f"{name}_over_ideal"] = _ratio(own, best, field)
            row[f"{name}_over_unpatched"] = _ratio(own, reference, field)
        row["tokens_per_second"] = 1000 * prompt.batch / row["decode_ms"]["median"]
        row["peak_over_unpatched"] = fact["peak_bytes"] / facts[UNPATCHED]["peak_bytes"]
        row["targets"] = _targets(row, model.device.type)
        rows.append(row)
    return {
        "batch": prompt.batch,
        "text_tokens": prompt.text_tokens,
        "visual_tokens": prompt.visual_tokens,
        "crops": prompt.images * prompt.crops,
        "rows": rows,
    }


def _survey(model: nn.Module, prompt: Prompt, stage: dict | None, new_tokens: int) -> dict:
    """What can be counted instead of timed."""
    inputs, shape = prompt.inputs(), DecoderShape.from_config(model.config)
    visual, in_decoder = [float(prompt.visual_tokens)] * shape.layers, False
    with _treated(model, stage) as slim:
        with torch.inference_mode():
            held = cache_bytes(kv_cache(model(**inputs, use_cache=True, logits_to_keep=1)))
        if slim is not None:
            visual = slim.receipt.summary()["visual_tokens_per_layer"]
            in_decoder = any(stage.layers for stage in slim.stages)
        counted = count_flops(model, inputs)
        peak = peak_memory(model, inputs, new_tokens)
    tokens = [v + prompt.text_tokens for v in visual]
    crops = prompt.images * prompt.crops
    ledger = Ledger.of(model.config, tokens, crops=crops, method=counted["method"] / prompt.batch)
    return {
        "visual_tokens_per_layer": visual,
        "equivalent_tokens": equivalent_tokens(visual),
        "in_decoder": in_decoder,
        "flops": ledger.as_dict(),
        "flops_counted": {part: total / prompt.batch for part, total in counted.items()},
        "kv_bytes": held,
        "kv_theory_bytes": prompt.batch * kv_bytes(shape, tokens, model.dtype.itemsize),
        "peak_bytes": peak,
    }


def _run(model: nn.Module, prompt: Prompt, stage: dict | None, work: Workload) -> tuple[Timing, float]:
    with _treated(model, stage) as slim:
        timing = time_steady(model, prompt.inputs(), work.new_tokens, work.clock)
        return timing, 0.0 if slim is None else slim.receipt.last.selection_ms


def _run_ideal(model: nn.Module, prompt: Prompt, visual: tuple[int, ...], work: Workload) -> tuple[Timing, float]:
    with ideal(model, prompt, visual) as inputs:
        return time_steady(model, inputs, work.new_tokens, work.clock), 0.0


def _ratio(own: list[Timing], reference: list[Timing], field: str) -> dict:
    pairs = zip(own, reference, strict=True)
    return asdict(Spread.of(getattr(ours, field) / getattr(theirs, field) for ours, theirs in pairs))


def _targets(row: dict, device: str) -> dict:
    """The promises, and whether this row keeps them."""
    bound = PREFILL_BOUND[device, row["in_decoder"]]
    over_ideal, peak = row["prefill_over_ideal"]["median"], row["peak_over_unpatched"]
    kv = row["kv_bytes"] / row["kv_theory_bytes"]
    return {
        "prefill_over_ideal": {"value": over_ideal, "wanted": f"at most {bound:.2f}", "met": over_ideal <= bound},
        "peak_over_unpatched": {"value": peak, "wanted": "at most 1", "met": peak <= 1},
        "kv_over_theory": {"value": kv, "wanted": "exactly 1", "met": kv == 1},
    }
