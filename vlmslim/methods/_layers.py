"""Helpers of the methods that drop tokens before several decoder layers."""

from collections.abc import Sequence
from typing import Any

from vlmslim.compressor import resolve_layer
from vlmslim.engine.families import language_model


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
