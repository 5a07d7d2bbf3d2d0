"""Time to first token, prefill, decoding and latency of a generation; methods are measured interleaved, in pairs."""

import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer

from vlmslim.cost.timer import ReadClock, Timer
from vlmslim.engine.families import encoder, language_model, projector

Key = TypeVar("Key")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Timing:
    """One timed generation, in milliseconds.

    encode_ms  : vision tower and projector, before the language model is entered
    ttft_ms    : time to first token: image encoding, compression, prefill and the choice of the first token
    prefill_ms : the part of `ttft_ms` inside the language model, compression included
    decode_ms  : mean time of each later token
    latency_ms : from the call to the last token
    """

    encode_ms: float
    ttft_ms: float
    prefill_ms: float
    decode_ms: float
    latency_ms: float


@dataclass(frozen=True)
class MedianIqr:
    """Median and interquartile range of repeated measurements."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "MedianIqr":
        """Summarise one value or more."""
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], 0.0)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, high - low)


class TokenTimestamps(BaseStreamer):
    """The time at which `generate()` hands out the prompt and each token.

    `generate()` copies a token to the host before it hands it out, so the device has finished by then.
    """

    def __init__(self, clock: ReadClock):
        self.clock = clock
        self.seconds: list[float] = []

    def put(self, value: Any) -> None:
        """Note the time."""
        self.seconds.append(self.clock())

    def end(self) -> None:
        """Do nothing: the last token has been handed out before."""


@contextmanager
def first_call_timed(module: nn.Module, timer: Timer) -> Iterator[Timer]:
    """Time the first call of a module inside the context, with everything that the hooks of a patch do in it."""

    def start(*_: object) -> None:
        timer.start()
        before.remove()

    def stop(*_: object) -> None:
        timer.stop()
        after.remove()

    before = module.register_forward_pre_hook(start, prepend=True)  # before the first hook of the patch
    after = module.register_forward_hook(stop)  # after its last one
    try:
        yield timer
    finally:
        before.remove()
        after.remove()


@contextmanager
def encoding_timed(core: Any, new_timer: Callable[[], Timer]) -> Iterator[list[Timer]]:
    """Time the calls of the vision tower and the projector inside the context, until the language model is entered.

    A projector inside the tower counts once, as the tower's.

    Args:
        core: the model without its LM head, patched or not.
        new_timer: makes a timer; each call of a module gets one of its own.

    Yields:
        The timers, in the order of the calls.
    """
    timers: list[Timer] = []
    running: list[nn.Module] = []

    def enter(module: nn.Module, *_: object) -> None:
        if not running:
            timers.append(new_timer())
            timers[-1].start()
        running.append(module)

    def leave(*_: object) -> None:
        running.pop()
        if not running:
            timers[-1].stop()

    def close(*_: object) -> None:
        for hook in hooks:
            hook.remove()

    hooks = [language_model(core).register_forward_pre_hook(close, prepend=True)]
    for module in (encoder(core), projector(core)):
        hooks.append(module.register_forward_pre_hook(enter, prepend=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        yield timers
    finally:
        close()


def time_generation(model: Any, inputs: Mapping, new_tokens: int, clock: ReadClock = time.perf_counter) -> Timing:
    """Time one greedy generation of exactly `new_tokens` tokens.

    The length is fixed, because otherwise a worse model that stops earlier would look faster.

    Args:
        model: a LLaVA, patched or not.
        inputs: inputs of `generate()`.
        new_tokens: tokens to generate, at least 2.
        clock: `time.process_time` counts processor seconds, which other programs on a busy CPU do not disturb.

    Raises:
        ValueError: fewer than 2 tokens, which have no decoding time; or processor time on a GPU.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens}: generate at least 2 tokens, to tell prefill from decoding")
    cuda = model.device.type == "cuda"
    if cuda and clock is not time.perf_counter:
        raise ValueError("processor time does not count the work of a GPU; use the wall clock, without --cpu-time")
    if cuda:
        torch.cuda.synchronize(model.device)
    stamps, new_timer, core = TokenTimestamps(clock), partial(Timer, model.device, clock), model.model
    with (
        torch.inference_mode(),
        encoding_timed(core, new_timer) as encoding,
        first_call_timed(language_model(core), new_timer()) as prefill,
    ):
        start = clock()
        model.generate(
            **inputs,
            streamer=stamps,
            do_sample=False,
            num_beams=1,
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
        )
    first, last = stamps.seconds[1], stamps.seconds[new_tokens]  # number 0 is the prompt
    decode_ms = 1000 * (last - first) / (new_tokens - 1)
    encode_ms = sum(timer.ms for timer in encoding)
    return Timing(encode_ms, 1000 * (first - start), prefill.ms, decode_ms, 1000 * (last - start))


def time_warm(model: Any, inputs: Mapping, new_tokens: int, clock: ReadClock = time.perf_counter) -> Timing:
    """Time a generation after a short warm-up that is not recorded.

    Switching methods leaves cold CPU caches, which can slow the next prefill of a tiny model by half. A deployed patch
    pays this only once.
    """
    time_generation(model, inputs, 2, clock)
    return time_generation(model, inputs, new_tokens, clock)


def interleave(actions: Mapping[Key, Callable[[], Result]], repeats: int, warmup: int = 1) -> dict[Key, list[Result]]:
    """Call several actions in rounds, because drift of the machine then affects all of them alike.

    Each round has another random order, which is the same in every run. So the state in which an action leaves the
    caches and the allocator affects all of them alike, too.

    Returns:
        name -> results of the action in each of `repeats` rounds, after `warmup` rounds that are not recorded.
    """
    results: dict[Key, list[Result]] = {name: [] for name in actions}
    names, order = list(actions), random.Random(0)
    for turn in range(warmup + repeats):
        for name in order.sample(names, len(names)):
            result = actions[name]()
            if turn >= warmup:
                results[name].append(result)
    return results


def measure_together(
    model: Any,
    attach: Mapping[str, Callable[[], AbstractContextManager]],
    prompts: Sequence[Mapping],
    new_tokens: int = 16,
    repeats: int = 5,
    warmup: int = 1,
) -> dict[str, list[Timing]]:
    """Time several methods on the same model and the same prompts, interleaved.

    Args:
        model: the model to time.
        attach: name -> a callable without arguments that returns a context manager; the method is on inside it.
        prompts: inputs of `generate()`, one prompt each.
        new_tokens: tokens to generate for each prompt.
        repeats: recorded rounds.
        warmup: rounds before them that are not recorded.

    Returns:
        name -> one `Timing` per (round, prompt), in the same order for every name.
    """

    def one_round(attach_one: Callable[[], AbstractContextManager]) -> list[Timing]:
        with attach_one():
            time_generation(model, prompts[0], 2)  # see `time_warm`
            return [time_generation(model, inputs, new_tokens) for inputs in prompts]

    rounds = interleave({name: partial(one_round, one) for name, one in attach.items()}, repeats, warmup)
    return {name: [timing for timings in own for timing in timings] for name, own in rounds.items()}


def summarise(timings: Sequence[Timing], reference: Sequence[Timing]) -> dict[str, float]:
    """Return medians and interquartile ranges of `timings`, and the median ratios to `reference`, pair by pair."""

    def ratio(field: str) -> float:
        pairs = zip(timings, reference, strict=True)
        return statistics.median(getattr(ours, field) / getattr(theirs, field) for ours, theirs in pairs)

    summary: dict[str, float] = {"samples": len(timings)}
    for name in ("ttft", "decode"):
        spread = MedianIqr.of(getattr(timing, f"{name}_ms") for timing in timings)
        summary |= {f"{name}_ms": spread.median, f"{name}_ms_iqr": spread.iqr, f"{name}_ratio": ratio(f"{name}_ms")}
    return summary
