"""The stages of a patch: where each acts in the model, and which stages do not go together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vlmslim.compressor import Compressor, ScoreAndKeep, resolve_layer
from vlmslim.engine.families import encoder_layers
from vlmslim.options.check import fits


@dataclass(frozen=True)
class Stage:
    """One stage of a patched model.

    name            : the name of its method, as on the command line
    method          : the object that the engine asks, a copy of the user's
    acts_before_llm : whether it compresses the tokens of each image before the language model
    layers          : the decoder layers before which it may drop tokens, ascending
    """

    name: str
    method: Compressor
    acts_before_llm: bool
    layers: tuple[int, ...]

    @classmethod
    def of(cls, name: str, method: Compressor, depth: int) -> "Stage":
        """Find out where a method acts in a model of `depth` decoder layers.

        Raises:
            ValueError: the method acts nowhere, or before a layer that does not exist, or it has one of `layers` and
                `retain` without the other.
        """
        kind, own = type(method).__name__, type(method)
        drops = method.drops_between_layers
        for option, numbers, kinds in (
            ("layers", method.layers, tuple[int | float, ...]),
            ("tower_layers", method.tower_layers, tuple[int, ...]),
        ):
            if not fits(numbers, kinds):
                raise ValueError(f"{kind} has {option}={numbers!r}: give a tuple of numbers, such as {option} = (2,)")
        layers = []
        for layer in method.layers:
            layers.append(resolve_layer(layer, depth))
            if not 0 < layers[-1] < depth:
                raise ValueError(
                    f"{method}: there is no decoder layer {layer} to drop tokens before; use 1 .. {depth - 1}"
                )
        if drops and not layers:
            raise ValueError(
                f"{kind} overrides `retain` but has no `layers`, so nothing would ask it; "
                "list the decoder layers before which it drops tokens, such as layers = (2,)"
            )
        if layers and not drops:
            raise ValueError(
                f"{kind} has layers={tuple(method.layers)} but does not override `retain`; "
                "write `retain`, or remove `layers` if it works before the language model only"
            )
        if own.compress is ScoreAndKeep.compress and getattr(own, "score", None) is ScoreAndKeep.score:
            raise ValueError(f"{kind} does not override `score`, so it ranks nothing; write `score`, or `compress`")
        if not drops and not method.acts_before_llm and own.requested is Compressor.requested:
            raise ValueError(
                f"{kind} overrides none of `compress`, `compress_images` and `retain`, so it would change nothing; "
                "for a patch that only counts, use patch(model, 'none')"
            )
        return cls(name, method, method.acts_before_llm, tuple(sorted(layers)))


def in_order(stages: Sequence[Stage]) -> tuple[Stage, ...]:
    """Sort stages by the moment at which each first acts: before the language model, then layer by layer.

    Raises:
        ValueError: two stages act at the same moment, or the first has an unknown `positions`.
    """
    before: Stage | None = None
    at_layer: dict[int, Stage] = {}
    for stage in stages:
        if stage.acts_before_llm:
            if before is not None:
                raise ValueError(
                    f"{before.method} and {stage.method} both work before the language model; "
                    "at most one stage may, the others between layers"
                )
            before = stage
        for name in ("positions", "layer_positions"):
            if (value := getattr(stage.method, name)) not in ("renumbered", "original"):
                hint = "; a __post_init__ first calls super().__post_init__()" if value == "auto" else ""
                raise ValueError(f"{name}={value!r}: use 'renumbered' or 'original'{hint}")
        for layer in stage.layers:
            if layer in at_layer:
                raise ValueError(f"{at_layer[layer].method} and {stage.method} both drop tokens before layer {layer}")
            at_layer[layer] = stage
    return tuple(sorted(stages, key=lambda stage: (not stage.acts_before_llm, *stage.layers[:1])))


def tower_layers(stages: tuple[Stage, ...], core: Any) -> tuple[int, ...]:
    """Collect the vision-tower layers that the stages read.

    Raises:
        ValueError: there is no such layer.
    """
    wanted = set()
    for stage in stages:
        for layer in stage.method.tower_layers:
            depth = len(encoder_layers(core))
            if not -depth <= layer < depth:
                raise ValueError(f"{stage.method}: the vision tower has {depth} layers, no layer {layer}")
            wanted.add(layer)
    return tuple(sorted(wanted))
