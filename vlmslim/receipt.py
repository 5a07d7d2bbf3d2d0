"""What a patched model really did: the answer to "is it even on?"."""

import json
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import NamedTuple

import torch


class Span:
    """Time that a method took, a context manager. Nobody waits: on CUDA the device notes the times itself."""

    def __init__(self, device: torch.device):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._ms: float | None = None

    def __enter__(self) -> "Span":
        self._start = self._tick()
        return self

    def __exit__(self, *_) -> None:
        self._end = self._tick()

    def _tick(self):
        if self._stream is None:
            return time.perf_counter()
        return self._stream.record_event(torch.cuda.Event(enable_timing=True))

    @property
    def finished(self) -> bool:
        """Whether `ms` can be read without waiting for the device."""
        return self._ms is not None or self._stream is None or self._end.query()

    @property
    def ms(self) -> float:
        """Milliseconds between start and end."""
        if self._ms is None:
            if self._stream is None:
                self._ms = 1000 * (self._end - self._start)
            else:
                self._end.synchronize()
                self._ms = self._start.elapsed_time(self._end)
        return self._ms

    def __reduce__(self):  # events belong to their process: a copy holds the number
        return _measured, (self.ms,)


def _measured(ms: float) -> Span:
    span = Span(torch.device("cpu"))
    span._ms = ms
    return span


class Image(NamedTuple):
    """Visual tokens of one image: how many it had, were asked for (None: the method decides), entered the model."""

    tokens: int
    requested: int | None
    kept: int


@dataclass
class Prefill:
    """One forward that brought images, as it really was.

    images   : per row of the batch, its images
    text     : per row, text tokens
    visual   : per decoder layer and row, visual tokens
    sequence : per decoder layer, tokens computed for every row, padding included
    kv       : per decoder layer, tokens in its KV cache afterwards, padding and earlier turns included; empty without
    spans    : visits to the methods
    """

    images: list[list[Image]]
    text: list[int]
    visual: list[list[int]]
    sequence: list[int]
    kv: list[int]
    spans: list[Span] = field(default_factory=list, repr=False)

    @property
    def selection_ms(self) -> float:
        """Milliseconds spent in the methods. Reading it waits until the device has come to their end."""
        return sum(span.ms for span in self.spans)

    def as_dict(self) -> dict:
        """All of it, ready for JSON."""
        images = [[image._asdict() for image in row] for row in self.images]
        counts = {name: getattr(self, name) for name in ("text", "visual", "sequence", "kv")}
        return {"images": images, **counts, "selection_ms": self.selection_ms}


@dataclass
class Tally:
    """Mean and range of a count, without the single values."""

    count: int = 0
    total: int = 0
    least: int | None = None
    most: int | None = None

    def add(self, values: Sequence[int]) -> None:
        """Take in more values."""
        if values:
            self.count, self.total = self.count + len(values), self.total + sum(values)
            self.least = min(values) if self.least is None else min(self.least, *values)
            self.most = max(values) if self.most is None else max(self.most, *values)

    def __add__(self, other: "Tally") -> "Tally":
        if not (self.count and other.count):
            return self if self.count else other
        least, most = min(self.least, other.least), max(self.most, other.most)
        return Tally(self.count + other.count, self.total + other.total, least, most)

    @property
    def mean(self) -> float | None:
        """None without a value."""
        return self.total / self.count if self.count else None

    @property
    def range(self) -> list[int] | None:
        """Smallest and largest; None without a value."""
        return [self.least, self.most] if self.count else None


@dataclass
class Receipt:
    """Counts since the patch, or since the last reset. Nothing in it is derived from what was asked for.

    Its size does not grow with the run: single values are kept of the last prefill only.

    method    : the method with all its options
    positions : "renumbered" or "original"
    backend   : attention implementation of the language model, in its last prefill
    dtype     : that it computed in, likewise
    kv_numbers : numbers that one token takes in the KV cache of one layer
    layers    : number of decoder layers
    tokens, requested, kept : visual tokens of an image: before, asked for, at the entrance of the language model
    prompts, text_tokens    : prompts with images, and the text tokens in them
    text_prompts            : prompts without images
    visual, sequence, kv    : per decoder layer, summed over prompts: see `Prefill`
    last      : the last forward that brought images; None before the first
    """

    method: str
    positions: str
    backend: str
    dtype: str
    kv_numbers: int
    layers: int

    def __post_init__(self):
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.tokens, self.requested, self.kept = Tally(), Tally(), Tally()
        self.prompts = self.text_prompts = self.text_tokens = 0
        self.visual, self.sequence, self.kv = ([0] * self.layers for _ in range(3))
        self.last: Prefill | None = None
        self._ms, self._running = 0.0, deque()

    def saw_prefill(self, prefill: Prefill) -> None:
        """A batch of prompts with images was prefilled."""
        rows = len(prefill.text)
        tokens, requested, kept = zip(*chain.from_iterable(prefill.images), strict=True)
        self.tokens.add(tokens)
        self.kept.add(kept)
        self.requested.add([count for count in requested if count is not None])
        self.prompts += rows
        self.text_tokens += sum(prefill.text)
        self.visual = _plus(self.visual, map(sum, prefill.visual))
        self.sequence = _plus(self.sequence, (rows * n for n in prefill.sequence))
        self.kv = _plus(self.kv, (rows * n for n in prefill.kv or [0] * self.layers))
        self.last = prefill
        self._running += prefill.spans
        while self._running and self._running[0].finished:
            self._ms += self._running.popleft().ms

    def saw_text(self, rows: int) -> None:
        """A batch without images passed through."""
        self.text_prompts += rows

    @classmethod
    def pooled(cls, receipts: Iterable["Receipt"]) -> "Receipt":
        """One receipt for several processes of one run, the counts added up; `last` is that of the last one."""
        return reduce(cls._merge, receipts)

    def _merge(self, other: "Receipt") -> "Receipt":
        both = Receipt(self.method, self.positions, self.backend, self.dtype, self.kv_numbers, self.layers)
        for name in ("tokens", "requested", "kept", "prompts", "text_prompts", "text_tokens"):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        for name in ("visual", "sequence", "kv"):
            setattr(both, name, _plus(getattr(self, name), getattr(other, name)))
        both.last, both._ms = other.last or self.last, self.selection_ms + other.selection_ms
        return both

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one token takes in the KV cache of one layer."""
        return self.kv_numbers * getattr(torch, self.dtype).itemsize

    @property
    def images(self) -> int:
        """Images seen."""
        return self.tokens.count

    @property
    def selection_ms(self) -> float:
        """Milliseconds spent in the methods, of all prompts. Reading it waits for the device; counting does not."""
        while self._running:
            self._ms += self._running.popleft().ms
        return self._ms

    @property
    def had_effect(self) -> bool:
        """Whether a visual token was dropped anywhere."""
        return any(total < self.tokens.total for total in self.visual)

    def summary(self) -> dict:
        """Means, ready for JSON.

        Of an image: `visual_tokens`, `requested` (None if the method decides), `kept`, each with its range. Of a
        prompt, padding not counted: `visual_tokens_per_layer`, `equivalent_tokens` (their mean), `text_tokens`,
        `kv_bytes`. Of a prompt, padding included: `sequence_per_layer` and `kv_per_layer`, the tokens that each layer
        computed and held. `selection_ms` is the time a prompt spent in the methods.
        """
        prompts = max(self.prompts, 1)
        visual, sequence, kv = ([total / prompts for total in x] for x in (self.visual, self.sequence, self.kv))
        text = self.text_tokens / prompts
        return {
            "method": self.method,
            "images": self.images,
            "prompts": self.prompts,
            "text_prompts": self.text_prompts,
            "visual_tokens": self.tokens.mean or 0.0,
            "visual_tokens_range": self.tokens.range,
            "requested": self.requested.mean,
            "requested_range": self.requested.range,
            "kept": self.kept.mean or 0.0,
            "kept_range": self.kept.range,
            "visual_tokens_per_layer": visual,
            "equivalent_tokens": sum(visual) / self.layers,
            "text_tokens": text,
            "kv_bytes": sum(v + text for v in visual) * self.kv_bytes_per_token,
            "sequence_per_layer": sequence,
            "kv_per_layer": kv,
            "selection_ms": self.selection_ms / prompts,
            "had_effect": self.had_effect,
            "positions": self.positions,
            "backend": self.backend,
            "dtype": self.dtype,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """The summary and the last prefill as JSON."""
        last = self.last.as_dict() if self.last else None
        return json.dumps(self.summary() | {"last": last}, indent=indent)

    def __str__(self) -> str:
        return headline(self.summary())


def headline(summary: dict) -> str:
    """A `Receipt.summary()` in one line, also of a receipt that was read back from an old file."""
    s = summary
    if not s["images"]:
        return f"{s['method']}: no image seen yet"
    asked = "the method's choice" if s["requested"] is None else f"{s['requested']:.1f} asked for"
    if s.get("kept_range"):
        low, high = s["kept_range"]
        asked += f", {low} to {high} sent"
    selection = f", {s['selection_ms']:.1f} ms of selection" if "selection_ms" in s else ""
    return (
        f"{s['method']}: {s['images']} images, {s['visual_tokens']:.1f} -> {s['kept']:.1f} visual tokens each "
        f"({asked}); a prompt had {s['equivalent_tokens']:.1f} on average over the layers, "
        f"{s['visual_tokens_per_layer'][-1]:.1f} in the last, {s['kv_bytes'] / 2**20:.2f} MiB of KV cache"
        f"{selection}; {s['positions']} positions, {s['backend']}, {s['dtype']}"
    )


def _plus(a: Iterable[int], b: Iterable[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
