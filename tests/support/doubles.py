"""Compressors for tests: their decisions are whole-number rules, never decided by the last bits of a float.

Each one says what it would keep (`chosen`, `left`) in a way that `expect` can apply to an unpatched model by hand.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from prompts import batch, visual
from tiny import DEPTH, IMAGE, VIDEO
from torch import Tensor
from unpatched import Reference, keep_only, reference

from vlmslim import Compressed, Compressor, method, registry


def ranks(tokens, row: int) -> list[Tensor]:
    """The places of each image of a row, in order."""
    image = tokens.image[row]
    return [(image == i).nonzero()[:, 0] for i in range(1, int(image.max()) + 1)]


def _compress(self, image) -> Compressed:
    return image.pick(self.chosen(len(image.features), image.prompt).to(image.features.device))


def _retain(self, tokens) -> Tensor:
    keep = tokens.mask.clone()
    for row in range(len(keep)):
        text = int((tokens.mask[row] & (tokens.image[row] == 0)).sum())
        for place in ranks(tokens, row):
            keep[row, place] = False
            keep[row, place[self.left(tokens.layer, len(place), text)]] = True
    return keep


@dataclass
class Rule(Compressor):
    """Before the language model keep `chosen`; before each of `layers` keep `left` of what is there."""

    def chosen(self, n: int, prompt: Tensor) -> Tensor:
        return torch.arange(n)

    def left(self, layer: int, n: int, text: int) -> Tensor:
        return torch.arange(n)

    def __init_subclass__(cls) -> None:
        """Override only what the rule uses, because the engine reads from that where a method acts."""
        if cls.chosen is not Rule.chosen and "compress" not in vars(cls):
            cls.compress = _compress
        if cls.layers and "retain" not in vars(cls):
            cls.retain = _retain


@dataclass
class Everything(Rule):
    """Goes through every stage and keeps everything."""

    layers: ClassVar = (1, 2, 3)

    def chosen(self, n, prompt):
        return torch.arange(n)


@dataclass
class First(Rule):
    """The first five tokens of each image."""

    def chosen(self, n, prompt):
        return torch.arange(min(5, n))


@dataclass
class Strided(Rule):
    """Every third token: the count depends on the image's size, and there are gaps everywhere."""

    def chosen(self, n, prompt):
        return torch.arange(1, n, 3)


@dataclass
class StridedOriginal(Strided):
    positions: ClassVar = "original"


@dataclass
class Ragged(Rule):
    """The last few tokens, how many depends on the prompt's words."""

    def chosen(self, n, prompt):
        return torch.arange(n - 2 - int(prompt.sum()) % 5, n)


@dataclass
class RaggedOriginal(Ragged):
    positions: ClassVar = "original"


@dataclass
class Halve(Rule):
    """Between layers: every second token of each image goes before layer 2."""

    layers: ClassVar = (2,)

    def left(self, layer, n, text):
        return torch.arange(0, n, 2)


@dataclass
class Stairs(Rule):
    """Between layers: half goes before layer 1, and before layer 3 a number that depends on the row's text stays."""

    layers: ClassVar = (1, 3)

    def left(self, layer, n, text):
        return torch.arange(0, n, 2) if layer == 1 else torch.arange(min(n, 1 + text % 3))


@dataclass
class Blind(Rule):
    """Between layers: no visual token is left from layer 2 on."""

    layers: ClassVar = (2,)

    def left(self, layer, n, text):
        return torch.arange(0)


@dataclass
class BlindToLong(Rule):
    """Rows with an even number of text tokens lose every visual token before layer 1; others lose nothing."""

    layers: ClassVar = (1,)

    def left(self, layer, n, text):
        return torch.arange(n if text % 2 else 0)


@dataclass
class Both(Rule):
    """Before the language model and between its layers."""

    layers: ClassVar = (2, 3)

    def chosen(self, n, prompt):
        return torch.arange(0, n, 2)

    def left(self, layer, n, text):
        return torch.arange(n - (n + 1) // 2, n)


@dataclass
class BothOriginal(Both):
    positions: ClassVar = "original"


@dataclass
class BothClosed(Both):
    """The same, and later layers count positions anew."""

    layer_positions: ClassVar = "renumbered"


@dataclass
class PairMean(Compressor):
    """Merges: the mean of each pair of neighbours."""

    def compress(self, image) -> Compressed:
        return Compressed(pair_mean(image.features))


@dataclass
class PlacedPairMean(Compressor):
    """The same, and says that the means take the first slots."""

    def compress(self, image) -> Compressed:
        means = pair_mean(image.features)
        return Compressed(means, torch.arange(len(means), device=means.device))


def pair_mean(x: Tensor) -> Tensor:
    even = len(x) // 2 * 2
    return torch.cat([x[:even].view(-1, 2, x.shape[-1]).mean(1), x[even:]])


BEFORE = [First(), Strided(), StridedOriginal(), Ragged(), RaggedOriginal()]
BETWEEN = [Halve(), Stairs(), Blind(), BlindToLong()]
RULES = [*BEFORE, *BETWEEN, Both(), BothOriginal()]


def name_of(method) -> str:
    return type(method).__name__


def decide(inputs: dict, rule: Rule) -> tuple[Tensor, dict[int, Tensor]]:
    """Apply a rule to one row by hand.

    Returns:
        The caller's positions (S,) that enter the language model, and for each layer the (S,) bool that go before it.
    """
    ids = inputs["input_ids"][0]
    text = ids[(ids != IMAGE) & (ids != VIDEO)]
    places = visual(inputs)
    kept = keep_only(inputs, [rule.chosen(len(place), text) for place in places])
    there = [torch.isin(kept, place).nonzero()[:, 0] for place in places]  # among the kept, image by image
    drops = {}
    for layer in rule.layers:
        gone = torch.zeros(len(kept), dtype=torch.bool)
        for i, place in enumerate(there):
            there[i] = place[rule.left(layer, len(place), len(text))]
            gone[place] = True
            gone[there[i]] = False
        drops[layer] = gone
    return kept, drops


def expect(model, row: list, rule: Rule, generated: list[int] = ()) -> Reference:
    """Run `row` on an unpatched model, shortened by hand as `rule` says, with `generated` appended.

    Decisions are taken on `row` alone: appended tokens are decoded, so they do not change them.
    """
    inputs = batch(model, [row])
    length, more = inputs["input_ids"].shape[1], len(generated)
    kept, drops = decide(inputs, rule)
    if more:
        kept = torch.cat([kept, torch.arange(length, length + more)])
        drops = {layer: torch.cat([gone, gone.new_zeros(more)]) for layer, gone in drops.items()}
        inputs |= dict(input_ids=torch.cat([inputs["input_ids"], torch.tensor([generated])], 1))
    return reference(model, inputs, kept, positions=rule.positions, drops=drops)


def expected_lengths(ref: Reference, depth: int = DEPTH) -> list[int]:
    """Tokens each layer caches for the row of a reference."""
    return [int(ref.alive(layer).sum()) for layer in range(depth)]


def options_of(name: str) -> set[str]:
    """The options of a registered method."""
    return set(registry.options_of(name))


#: the methods that run on any tiny model at any budget: others need a CLIP or a tokenizer, which their own tests bring
BUDGETED = [
    method.name
    for method in registry.listings()
    if method.cls and "keep" in options_of(method.name) and not {"clip", "tokenizer"} & options_of(method.name)
]


def registered(name: str, keep: int | float, **options) -> Compressor:
    """One of `BUDGETED` at a budget."""
    if "weights" in options_of(name):
        options["weights"] = "random"
    if name == "tokenflex":  # counts are squares, of every crop; nothing but its control gives the model's own tokens
        keep, options["weights"] = (1.0, "pool") if keep == 1.0 else (0.25, "random")
    return method(name, keep=keep, **options)


def keeping_everything(name: str) -> Compressor:
    """A registered method at a setting that keeps everything."""
    return method(name) if name == "none" else registered(name, 1.0)


def every_method() -> list:
    """List methods for tests that hold under any: rules of every kind, and the registered methods at a budget."""
    return [Both(), Stairs(), [Strided(), Halve()], "none", *BUDGETED]


def build(given, keep: int | float = 5):
    """A registered method of this name at a budget; what is no name stays as it is."""
    if given == "none":
        return method("none")
    return registered(given, keep) if isinstance(given, str) else given


def watched(cls: type[Compressor], **options) -> tuple[Compressor, list]:
    """A method that works before the language model, and the list to which it adds (image, result) for every image."""
    seen = []

    class Watched(cls):
        def compress_images(self, images):
            results = super().compress_images(images)
            seen.extend(zip(images, results, strict=True))
            return results

    return Watched(**options), seen
