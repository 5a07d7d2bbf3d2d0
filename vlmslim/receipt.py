"""The receipt of a patched model: what it really did. It answers the question "is it even on?"."""

import json
import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import reduce
from itertools import chain
from typing import NamedTuple

import torch

from vlmslim.cost.timer import Timer
from vlmslim.pictures.trace import Trace

_LOCK = threading.RLock()  # of all receipts, because a receipt is copied with its model and a lock cannot be


class Image(NamedTuple):
    """Visual tokens of one image.

    tokens    : before any stage
    requested : that were to be kept; None if the method decides itself
    kept      : that entered the language model
    """

    tokens: int
    requested: int | None
    kept: int


class StagePass(NamedTuple):
    """The work of one stage in one prefill.

    tokens_in, tokens_out : visual tokens of each prompt, before and after the stage
    acted     : prompts in which the stage dropped or merged at least one visual token
    keeps_all : the stage was asked to keep all tokens of all these images
    decides   : the stage decides itself how many tokens stay
    """

    tokens_in: list[int]
    tokens_out: list[int]
    acted: int
    keeps_all: bool
    decides: bool


@dataclass
class Prefill:
    """One forward that brought images, as it really was.

    images   : per prompt, its images
    text     : per prompt, text tokens
    visual   : per decoder layer and prompt, visual tokens
    sequence : per decoder layer, tokens computed for every prompt, padding included
    kv       : per decoder layer, tokens in its KV cache afterwards, padding and earlier turns included; empty without
               a cache
    stages   : per stage of the patch
    timers   : time of each call of a method
    traces   : per prompt, where the tokens of each image went; None without `patch(..., record="tokens")`
    """

    images: list[list[Image]]
    text: list[int]
    visual: list[list[int]]
    sequence: list[int]
    kv: list[int]
    stages: list[StagePass] = field(default_factory=list)
    timers: list[Timer] = field(default_factory=list, repr=False)
    traces: list[list[Trace]] | None = field(default=None, repr=False)

    @property
    def selection_ms(self) -> float:
        """Milliseconds spent in the methods. Reading this waits for the device."""
        return sum(timer.ms for timer in self.timers)

    def as_dict(self) -> dict:
        """Return everything, ready for JSON."""
        images = [[image._asdict() for image in row] for row in self.images]
        stages = [stage._asdict() for stage in self.stages]
        counts = {name: getattr(self, name) for name in ("text", "visual", "sequence", "kv")}
        return {"images": images, **counts, "stages": stages, "selection_ms": self.selection_ms}


@dataclass(frozen=True)
class Tally:
    """Count, sum and range of numbers, without the numbers themselves. The range of no number means nothing."""

    count: int = 0
    total: int = 0
    least: int = 0
    most: int = 0

    @classmethod
    def of(cls, numbers: Sequence[int]) -> "Tally":
        """Tally some numbers."""
        return cls(len(numbers), sum(numbers), min(numbers), max(numbers)) if numbers else cls()

    def __add__(self, other: "Tally") -> "Tally":
        if not (self.count and other.count):
            return self if self.count else other
        least, most = min(self.least, other.least), max(self.most, other.most)
        return Tally(self.count + other.count, self.total + other.total, least, most)

    @property
    def mean(self) -> float | None:
        """The mean; None without a number."""
        return self.total / self.count if self.count else None

    @property
    def range(self) -> list[int] | None:
        """Smallest and largest number; None without one."""
        return [self.least, self.most] if self.count else None


@dataclass(frozen=True)
class StageCounts:
    """The work of one stage, summed over prompts; see `StagePass`."""

    tokens_in: int = 0
    tokens_out: int = 0
    acted: int = 0
    keeps_all: bool = True
    decides: bool = False

    @classmethod
    def of(cls, done: StagePass) -> "StageCounts":
        """Count the prompts of one prefill."""
        return cls(sum(done.tokens_in), sum(done.tokens_out), done.acted, done.keeps_all, done.decides)

    def __add__(self, other: "StageCounts") -> "StageCounts":
        return StageCounts(
            self.tokens_in + other.tokens_in,
            self.tokens_out + other.tokens_out,
            self.acted + other.acted,
            self.keeps_all and other.keeps_all,
            self.decides or other.decides,
        )


_TALLIES = ("tokens", "requested", "kept")
_TOTALS = ("prompts", "text_prompts", "text_tokens")
_BY_LAYER = ("visual", "sequence", "kv")


@dataclass
class Receipt:
    """The count of what a patched model did since the patch or the last reset. No number is derived from the settings.

    The receipt does not grow with the run: it keeps single values of the last prefill only.

    method     : the method with all its options
    positions  : "renumbered" or "original"
    backend    : attention implementation of the language model, in its last prefill
    dtype      : dtype that the language model computed in, in its last prefill
    kv_numbers : numbers that one token takes in the KV cache of one layer
    layers     : number of decoder layers
    places     : name and decoder layers of each stage, in the order in which they act

    tokens, requested, kept : visual tokens of an image: before any stage, to be kept, at the language model's entrance
    prompts, text_tokens    : prompts with images, and the text tokens in them
    text_prompts            : prompts without images
    visual, sequence, kv    : per decoder layer, summed over prompts: see `Prefill`
    stages                  : per stage, summed over prompts
    """

    method: str
    positions: str
    backend: str
    dtype: str
    kv_numbers: int
    layers: int
    places: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        with _LOCK:
            self._clear()

    def _clear(self) -> None:
        self.tokens, self.requested, self.kept = Tally(), Tally(), Tally()
        self.prompts = self.text_prompts = self.text_tokens = 0
        self.visual, self.sequence, self.kv = ([0] * self.layers for _ in range(3))
        self.stages = [StageCounts() for _ in self.places]
        self._last: Prefill | None = None
        self._ms = 0.0
        self._running: deque[Timer] = deque()

    @property
    def last(self) -> Prefill:
        """The last forward that brought images.

        Raises:
            RuntimeError: there was none since the patch or the last reset.
        """
        if self._last is None:
            raise RuntimeError("no image seen yet: run a prompt with an image through the patched model first")
        return self._last

    def saw_prefill(self, prefill: Prefill) -> None:
        """Count a batch of prompts with images. Several threads may count at once."""
        with _LOCK:
            self._count(prefill)

    def _count(self, prefill: Prefill) -> None:
        rows = len(prefill.text)
        tokens, requested, kept = zip(*chain.from_iterable(prefill.images), strict=True)
        self.tokens += Tally.of(tokens)
        self.kept += Tally.of(kept)
        self.requested += Tally.of([count for count in requested if count is not None])
        self.prompts += rows
        self.text_tokens += sum(prefill.text)
        self.visual = _plus(self.visual, map(sum, prefill.visual))
        self.sequence = _plus(self.sequence, (rows * n for n in prefill.sequence))
        self.kv = _plus(self.kv, (rows * n for n in prefill.kv or [0] * self.layers))
        self.stages = [a + StageCounts.of(b) for a, b in zip(self.stages, prefill.stages, strict=True)]
        self._last = prefill
        self._running += prefill.timers
        while self._running and self._running[0].finished:
            self._ms += self._running.popleft().ms

    def saw_text(self, rows: int) -> None:
        """Count a batch of prompts without images."""
        with _LOCK:
            self.text_prompts += rows

    @classmethod
    def pooled(cls, receipts: Iterable["Receipt"]) -> "Receipt":
        """Add up the receipts of several processes of one run; `last` is that of the last one that has it."""
        return reduce(cls._merge, receipts)

    def _merge(self, other: "Receipt") -> "Receipt":
        both = replace(self)
        for name in (*_TALLIES, *_TOTALS):
            setattr(both, name, getattr(self, name) + getattr(other, name))
        for name in _BY_LAYER:
            setattr(both, name, _plus(getattr(self, name), getattr(other, name)))
        both.stages = [a + b for a, b in zip(self.stages, other.stages, strict=True)]
        both._last, both._ms = other._last or self._last, self.selection_ms + other.selection_ms
        return both

    def as_record(self) -> dict:
        """Return all counts, ready for JSON. `of_record` makes a receipt of them, without the last prefill."""
        told = {f.name: getattr(self, f.name) for f in fields(self)}
        tallies = {name: asdict(getattr(self, name)) for name in _TALLIES}
        counts = {name: getattr(self, name) for name in (*_TOTALS, *_BY_LAYER)}
        stages = [asdict(stage) for stage in self.stages]
        return told | tallies | counts | {"stages": stages, "selection_ms": self.selection_ms}

    @classmethod
    def of_record(cls, record: dict) -> "Receipt":
        """Make a receipt of what `as_record` returned, also after JSON has turned tuples into lists."""
        told = {f.name: record[f.name] for f in fields(cls)}
        places = tuple((name, tuple(layers)) for name, layers in told.pop("places"))
        receipt = cls(**told, places=places)
        for name in _TALLIES:
            setattr(receipt, name, Tally(**record[name]))
        for name in (*_TOTALS, *_BY_LAYER):
            setattr(receipt, name, record[name])
        receipt.stages = [StageCounts(**stage) for stage in record["stages"]]
        receipt._ms = record["selection_ms"]
        return receipt

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
        """Milliseconds spent in the methods, over all prompts. Reading this waits for the device; counting does not."""
        with _LOCK:
            while self._running:
                self._ms += self._running.popleft().ms
            return self._ms

    @property
    def had_effect(self) -> bool:
        """True if any stage dropped or merged a visual token."""
        return any(total < self.tokens.total for total in self.visual)

    def summary(self) -> dict:
        """Return means, ready for JSON.

        - Per image: `visual_tokens`, `requested` (None if the method decides) and `kept`, each with its range.
        - Per prompt, without padding: `visual_tokens_per_layer`, `equivalent_tokens` (their mean), `text_tokens` and
          `kv_bytes`.
        - Per prompt, with padding: `sequence_per_layer` and `kv_per_layer`, the tokens that each layer computed and
          held.
        - `selection_ms`: milliseconds that a prompt spent in the methods.
        - `stages`: for each stage `name`, `layers` (empty before the language model), `tokens_in` and `tokens_out`
          (visual tokens of a prompt), `prompts`, and those in which it `acted`; `keeps_all` if it was asked to keep
          everything, `decides` if it decides itself.
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
            "stages": [
                {
                    "name": name,
                    "layers": list(layers),
                    "tokens_in": counts.tokens_in / prompts,
                    "tokens_out": counts.tokens_out / prompts,
                    "prompts": self.prompts,
                    "acted": counts.acted,
                    "keeps_all": counts.keeps_all,
                    "decides": counts.decides,
                }
                for (name, layers), counts in zip(self.places, self.stages, strict=True)
            ],
            "positions": self.positions,
            "backend": self.backend,
            "dtype": self.dtype,
        }

    def to_json(self, indent: int | None = 2) -> str:
        """Return the summary and the last prefill as JSON."""
        last = None if self._last is None else self._last.as_dict()
        return json.dumps(self.summary() | {"last": last}, indent=indent)

    def __str__(self) -> str:
        return headline(self.summary())


def headline(summary: dict) -> str:
    """Put a `Receipt.summary()` into one line. Summaries in old files, which lack some fields, work too."""
    s = summary
    if not s["images"]:
        return f"{s['method']}: no image seen yet"
    asked = "the method's choice" if s["requested"] is None else f"{s['requested']:.1f} asked for"
    if s.get("kept_range"):
        low, high = s["kept_range"]
        asked += f", {low} to {high} sent"
    selection = f", {s['selection_ms']:.1f} ms of selection" if "selection_ms" in s else ""
    abstained = "".join(
        f"; {stage['name']} acted on {stage['acted']} of {stage['prompts']} prompts"
        for stage in s.get("stages", [])
        if stage["acted"] < stage["prompts"] and not stage["keeps_all"]
    )
    return (
        f"{s['method']}: {s['images']} images, {s['visual_tokens']:.1f} -> {s['kept']:.1f} visual tokens each "
        f"({asked}); a prompt had {s['equivalent_tokens']:.1f} on average over the layers, "
        f"{s['visual_tokens_per_layer'][-1]:.1f} in the last, {s['kv_bytes'] / 2**20:.2f} MiB of KV cache"
        f"{selection}{abstained}; {s['positions']} positions, {s['backend']}, {s['dtype']}"
    )


def _plus(a: Iterable[int], b: Iterable[int]) -> list[int]:
    return [x + y for x, y in zip(a, b, strict=True)]
