"""Helpers of the methods that drop tokens before decoder layers."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import Compressor, ImageTokens, LayerInput, check_layer, resolve_layer
from vlmslim.engine.families import language_model


def check_layers(layer: Sequence[int | float], counts: Sequence[Any], name: str) -> None:
    """Refuse decoder layers before which nothing can be dropped, and counts that do not fit them.

    Raises:
        ValueError: names the option `layer`, or the option `name` with the counts.
    """
    if not layer or len(layer) != len(counts):
        one = name.removesuffix("s")
        raise ValueError(f"layer={tuple(layer)} and {name}={tuple(counts)}: give one {one} for each layer")
    for each in layer:
        check_layer(each)


def ascending(layer: Sequence[int | float], model: Any, spread: bool = False) -> tuple[int, ...]:
    """Turn shares of the depth into decoder layers of a model.

    Args:
        layer: numbers from 1, or shares of the depth.
        model: the model.
        spread: in a shallow decoder, where two shares are the same layer, the later one moves to the next layer.

    Raises:
        ValueError: the layers do not ascend.
    """
    depth = len(language_model(model.model).layers)
    found: list[int] = []
    for each in layer:
        at = resolve_layer(each, depth)
        found.append(max([at, *(x + 1 for x in found)]) if spread and isinstance(each, float) else at)
    if found != sorted(set(found)) or found[-1] >= depth:
        raise ValueError(f"layer={tuple(layer)}: in a decoder of {depth} layers these do not ascend; give others")
    return tuple(found)


def seen_by_layers(n: int, depth: int, layer: Sequence[int | float], counts: Sequence[int]) -> list[int]:
    """Return how many of n tokens each of `depth` layers sees, if `counts` are left before each of some layers."""
    seen = [n] * depth
    for each, count in zip(layer, counts, strict=True):
        at = resolve_layer(each, depth)
        seen[at:] = [min(seen[at], count)] * (depth - at)
    return seen


class LayerDrops(Compressor):
    """A method that drops tokens of each image before several decoder layers, and knows how many it leaves.

    Subclasses have the option `layer`, and override `after` and `retain`.

    Attributes:
        layer: decoder layers, ascending: numbers from 1, or shares of the depth.
        spread: see `ascending`.
        first_only: drop tokens of the first image of a prompt alone.
    """

    spread: ClassVar[bool] = False
    first_only: bool = False
    layer: Sequence[int | float] | None

    def setup(self, model: Any) -> None:
        """Turn shares of the depth into layers."""
        self.layers = ascending(self.layer or (), model, self.spread)

    def after(self, n: int, there: int, drop: int) -> int:
        """Return how many tokens of an image a drop leaves.

        Args:
            n: its tokens that entered the language model.
            there: those that are there now.
            drop: number of the drop, from 0.
        """
        raise NotImplementedError

    def left(self, n: int) -> list[int]:
        """Return how many of an image's n tokens are there after each drop."""
        there = [n]
        for drop in range(len(self.layers)):
            there.append(self.after(n, there[-1], drop))
        return there[1:]

    def requested(self, n: int) -> int | None:
        """Return what the last drop leaves."""
        return self.left(n)[-1]

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """Return what the drops leave, layer by layer."""
        return seen_by_layers(n, depth, self.layer or (), self.left(n))

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return what this drop leaves of each image, if it is known how many tokens each one has."""
        drop, found = self.layers.index(tokens.layer), []
        for entered, present in zip(tokens.entered, tokens.present, strict=True):
            if len(entered) != len(present):
                return None
            pruned = 1 if self.first_only else len(entered)
            left = [self.after(n, there, drop) for n, there in zip(entered[:pruned], present, strict=False)]
            found.append(left + present[pruned:])
        return found


@dataclass
class PlacedImage:
    """The tokens of one image that are about to enter a decoder layer, and the text after it.

    image   : the image itself
    row     : of the batch
    number  : of the image in its row, from 1
    entered : how many of its tokens entered the language model
    place   : (v,) where its tokens stand in the row, ascending; v is not 0
    text    : (t,) where the text after it stands, ascending
    """

    image: ImageTokens
    row: int
    number: int
    entered: int
    place: Tensor
    text: Tensor


def placed_images(tokens: LayerInput) -> list[PlacedImage]:
    """Find the tokens of each image, and the text after it.

    The numbers of tokens are known on the host, so nothing waits for the device. Only the tokens of several images in a
    prompt are counted, if a stage before did not say how many of each it kept.
    """
    found = []
    for row, (entered, present) in enumerate(zip(tokens.entered, tokens.present, strict=True)):
        text = tokens.mask[row] & (tokens.image[row] == 0)
        for i, n in enumerate(entered):
            own = tokens.image[row] == i + 1
            if count := present[i] if len(present) == len(entered) else int(own.sum()):
                place = first_true(own, count)
                after = text & (torch.arange(len(text), device=text.device) > place[-1])
                words = first_true(after, tokens.text_after[row][i])
                found.append(PlacedImage(tokens.images[row][i], row, i + 1, n, place, words))
    return found


def first_true(x: Tensor, count: int) -> Tensor:
    """Return the indices of the first `count` True of x (n,), without waiting for the device as `nonzero` does."""
    return x.byte().argsort(descending=True, stable=True)[:count]


def attention_of_text(
    tokens: LayerInput, images: list[PlacedImage], heads: bool = False, coming: bool = False
) -> list[Tensor]:
    """Compute what the text after each image pays to its tokens, in the layer before.

    Args:
        tokens: the input of a decoder layer.
        images: of these tokens, in the order of `placed_images`.
        heads: keep the heads apart.
        coming: compute what it is about to pay in the layer itself.

    Returns:
        (t, v) for each image, averaged over heads, or (heads, t, v). Without text after the image, t is 1, and the
        prompt's last token pays.
    """
    if not images:
        return []
    lengths: dict[int, int] = {}
    for image in images:
        lengths.setdefault(image.row, len(image.text))
    rows = tokens.last[:, None].repeat(1, max(lengths.values()) + any(len(image.text) == 0 for image in images))
    for image in reversed(images):  # the text after an image ends the text after the image before it
        rows[image.row, : len(image.text)] = image.text
    attend = tokens.coming_attention if coming else tokens.attention
    steps = (attend(part).float() for part in rows.split(128, dim=1))  # a step's map is in memory at once
    paid = torch.cat([step if heads else step.mean(1) for step in steps], dim=-2)
    found = []
    for image in images:
        end = lengths[image.row]
        own = slice(end - len(image.text), end) if len(image.text) else slice(-1, None)
        found.append(paid[image.row][..., own, :][..., image.place])
    return found
