"""What a generation takes: time to first token, decoding, latency and CUDA memory, measured in turn and in pairs."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

T = TypeVar("T")
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Timing:
    """One timed generation.

    ttft_ms        : time to first token: image encoding, compression, prefill and the first choice
    decode_ms         : time of each later token, on average
    peak_bytes        : peak CUDA memory of this generation alone, weights included; None on a CPU
    prefill_ms : the part of `ttft_ms` inside the language model, compression included
    latency_ms          : from the call to the last token
    """

    ttft_ms: float
    decode_ms: float
    peak_bytes: int | None
    prefill_ms: float | None = None
    latency_ms: float | None = None


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of repeated measurements."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Summarise one value or more."""
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], 0.0)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, high - low)


class _Clock(BaseStreamer):
    """Notes when `generate()` hands out tokens. It copies them to the host first, so the device has finished."""

    def __init__(self, clock: Clock):
        self.clock, self.ticks = clock, []

    def put(self, value) -> None:
        self.ticks.append(self.clock())

    def end(self) -> None:
        pass


class _Span:
    """Times the first call of a module, everything that hooks of a patch do around it included.

    On a GPU two events are recorded, which costs no synchronisation and so disturbs nothing.
    """

    def __init__(self, module: nn.Module, cuda: bool, clock: Clock):
        self.module, self.cuda, self.clock, self.marks = module, cuda, clock, []

    def __enter__(self) -> "_Span":
        self.handles = [  # before the patch's hooks on the way in, behind them on the way out
            self.module.register_forward_pre_hook(self._mark, prepend=True),
            self.module.register_forward_hook(self._mark),
        ]
        return self

    def __exit__(self, *_) -> None:
        for handle in self.handles:
            handle.remove()

    def _mark(self, *_) -> None:
        if len(self.marks) == 2:
            return
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(self.clock())

    @property
    def milliseconds(self) -> float:
        """Of the first call; read it after a synchronisation."""
        first, last = self.marks
        return first.elapsed_time(last) if self.cuda else 1000 * (last - first)


def time_generation(model: nn.Module, inputs: dict, new_tokens: int, clock: Clock = time.perf_counter) -> Timing:
    """Time one greedy generation of exactly `new_tokens` tokens.

    The length is fixed, so a worse model that would stop earlier does not look faster.

    Args:
        model: a LLaVA, patched or not.
        inputs: of `generate()`.
        new_tokens: tokens to generate, at least 2.
        clock: `time.process_time` counts processor seconds, which other programs on a busy CPU do not disturb.

    Raises:
        ValueError: fewer than 2 tokens, of which no decoding time can be had; or processor time of a GPU.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens}: at least 2 are needed to tell prefill from decoding")
    cuda = model.device.type == "cuda"
    if cuda and clock is not time.perf_counter:
        raise ValueError("the work of a GPU takes no processor time; use the wall clock")
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
        torch.cuda.synchronize(model.device)
    out = _Clock(clock)
    with torch.inference_mode(), _Span(model.model.language_model, cuda, clock) as span:
        start = clock()
        model.generate(
            **inputs, streamer=out, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
    first, last = out.ticks[1], out.ticks[new_tokens]  # tick 0 is the prompt
    peak = torch.cuda.max_memory_allocated(model.device) if cuda else None
    decode_ms = 1000 * (last - first) / (new_tokens - 1)
    return Timing(1000 * (first - start), decode_ms, peak, span.milliseconds, 1000 * (last - start))


def time_steady(model: nn.Module, inputs: dict, new_tokens: int, clock: Clock = time.perf_counter) -> Timing:
    """`time_generation` of a model in use: behind a shorter generation, of which nothing is kept.

    What ran before is another treatment. The first prompt behind a switch pays for code that is in none of the
    processor's caches, up to half a tiny model's prefill, and a patch that stays on pays that once.
    """
    time_generation(model, inputs, 2, clock)
    return time_generation(model, inputs, new_tokens, clock)


def measure(model: nn.Module, inputs: dict, new_tokens: int = 16, repeats: int = 5, warmup: int = 1) -> list[Timing]:
    """Time a generation `repeats` times after `warmup` unrecorded ones.

    To compare methods, interleave them with `measure_together` instead: machines drift.
    """
    for _ in range(warmup):
        time_generation(model, inputs, new_tokens)
    return [time_generation(model, inputs, new_tokens) for _ in range(repeats)]


def interleave(actions: dict[str, Callable[[], T]], repeats: int, warmup: int = 1) -> dict[str, list[T]]:
    """Call several actions in turn, so that drift of the machine hits all alike.

    Every round has an order of its own, the same in any run: what an action leaves behind in the caches and in the
    allocator hits all alike too.

    Returns:
        name -> what the action returned in each of `repeats` rounds; `warmup` rounds before them are thrown away.
    """
    names, results, order = list(actions), {name: [] for name in actions}, random.Random(0)
    for turn in range(warmup + repeats):
        for name in order.sample(names, len(names)):
            result = actions[name]()
            if turn >= warmup:
                results[name].append(result)
    return results


def measure_together(
    model: nn.Module, attach: dict, prompts: Sequence[dict], new_tokens: int = 16, repeats: int = 5, warmup: int = 1
) -> dict:
    """Time several treatments of one model on the same prompts, in turn.

    Args:
        model: the model that is timed.
        attach: name -> a callable without arguments that returns a context manager; the treatment is on inside it.
        prompts: `generate()` inputs of one prompt each.
        new_tokens: tokens generated for each prompt.
        repeats: recorded rounds.
        warmup: unrecorded rounds before them.

    Returns:
        name -> list of `Timing`, one per (round, prompt), in the same order for every name.
    """

    def turn(treatment) -> list[Timing]:
        with ExitStack() as stack:
            stack.enter_context(treatment())
            time_generation(model, prompts[0], 2)  # see `time_steady`
            return [time_generation(model, inputs, new_tokens) for inputs in prompts]

    rounds = interleave({name: partial(turn, treatment) for name, treatment in attach.items()}, repeats, warmup)
    return {name: [timing for turns in own for timing in turns] for name, own in rounds.items()}


def summarise(timings: Sequence[Timing], reference: Sequence[Timing]) -> dict:
    """Medians and spreads of `timings`, and their ratios to `reference`, pair by pair: JSON-able."""

    def ratio(field: str) -> float:
        pairs = zip(timings, reference, strict=True)
        return statistics.median(getattr(ours, field) / getattr(theirs, field) for ours, theirs in pairs)

    prefill, decode = Spread.of(t.ttft_ms for t in timings), Spread.of(t.decode_ms for t in timings)
    peaks = [t.peak_bytes for t in timings if t.peak_bytes is not None]
    return {
        "ttft_ms": prefill.median,
        "prefill_ms_iqr": prefill.iqr,
        "ttft_ratio": ratio("ttft_ms"),
        "decode_ms": decode.median,
        "decode_ms_iqr": decode.iqr,
        "decode_ratio": ratio("decode_ms"),
        "peak_bytes": max(peaks) if peaks else None,
        "samples": len(timings),
    }
