"""A drop before a decoder layer: ask the stage, and remove the visual tokens that it does not keep."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from vlmslim.compressor import LayerInput
from vlmslim.engine.answers import (
    NAN_SCORES,
    NOT_FINITE,
    check_counts,
    check_retained,
    check_unchanged,
    check_values,
    check_weight,
    writes,
)
from vlmslim.engine.attention import LayerAttention
from vlmslim.engine.coming_keys import ComingKeys
from vlmslim.engine.families import cached_keys
from vlmslim.engine.forward import Call, Visit
from vlmslim.engine.later import Later
from vlmslim.engine.layer_run import Run
from vlmslim.engine.layout import Segment
from vlmslim.engine.stages import Stage
from vlmslim.ops.attention import gather_rows


def drop(
    stage: Stage, layer: int, lm: Any, call: Call, hidden: Tensor, cache: Cache | None, kwargs: dict, later: Later
) -> Tensor:
    """Ask a stage which visual tokens stay from a decoder layer on, and drop the others.

    Args:
        stage: the stage that acts before this layer.
        layer: number of the decoder layer.
        lm: the language model.
        call: the forward. It gets a new run of layers if the stage drops or hides tokens.
        hidden: (B, S, d) the input of the layer.
        cache: the KV cache; None without one.
        kwargs: the other arguments of the layer.
        later: runs the checks of values.

    Returns:
        (B, S', d) the input without the dropped tokens.
    """
    tokens = _layer_input(stage, layer, lm, call, hidden, cache, kwargs)
    call.coming = looked = ComingKeys(layer)
    with call.timed(hidden.device):
        weight = check_weight(stage.method, tokens, stage.method.soft_retain(tokens))
        if weight is None:
            with torch.no_grad():
                before = writes(tokens)
                keep, states = check_retained(stage.method, tokens, stage.method.retain(tokens))
                check_unchanged(stage.method, tokens, before)
                keep = nn.functional.pad(keep, (0, call.guess), value=True)
    if call.recorder is not None:
        call.recorder.note(layer, tokens)
    call.previous = call.coming = None
    if weight is not None:
        _hide(stage, layer, call, weight)
        return hidden
    is_image = tokens.image > 0
    rows = [is_image.shape[1]] * len(is_image)
    if tokens.score is not None:
        ranked = ~(tokens.score.isnan() & is_image.to(tokens.score.device))
        later.check(ranked.flatten(), partial(check_values, stage.method, "row", NAN_SCORES, rows))
    if states is not None:
        finite = states.isfinite().all(-1) | ~is_image.to(states.device)
        later.check(finite.flatten(), partial(check_values, stage.method, "row", f"states {NOT_FINITE}", rows))
        made = torch.cat([states.to(hidden), hidden[:, states.shape[1] :]], dim=1)
        hidden = torch.where((_image(call.run(layer)) > 0).to(hidden.device)[..., None], made, hidden)
    index = _remove(stage, layer, call, keep, tokens, later)
    call.coming = looked.keep(index, hidden) if states is None else None
    return hidden if index is None else gather_rows(hidden, index.to(hidden.device))


def _image(run: Run) -> Tensor:
    """Return the number of the image to which each token of a run belongs, (B, S); 0 at text and padding."""
    assert run.tokens.layout is not None
    return run.tokens.layout.image


def _held(run: Run) -> int:
    """Return how many tokens the KV cache of a run held before this forward."""
    return 0 if run.cached is None else run.cached.shape[1]


def _layer_input(
    stage: Stage, layer: int, lm: Any, call: Call, hidden: Tensor, cache: Cache | None, kwargs: dict
) -> LayerInput:
    """Make what the stage is shown.

    Raises:
        ValueError: the KV cache held tokens before the image, and does not give their keys.
    """
    run = call.run(layer)
    layout, held = run.tokens.layout, _held(run)
    assert layout is not None
    keys = cached_keys(cache, layer - 1, hidden, held)
    if held and keys is None:
        raise ValueError(
            f"{stage.method} reads attention to the {held} tokens that the KV cache held before the image, and a "
            f"{type(cache).__name__} does not give their keys; prefill text and image together"
        )

    def coming() -> LayerAttention:
        own = cached_keys(cache, layer, hidden[:, :0], held) if held else None
        if held and own is None:
            raise ValueError(
                f"{stage.method} reads attention to the {held} tokens that the KV cache held before the image, and "
                f"this {type(cache).__name__} does not give their keys of layer {layer}; prefill text and image "
                "together"
            )
        given = kwargs
        if run.tokens is not call.runs[0].tokens:
            given = kwargs | {"position_embeddings": run.rotary(lm, layer, hidden)}
        return LayerAttention.coming(lm.layers[layer], hidden, given, own)

    return LayerInput(
        layer=layer,
        hidden=hidden,
        mask=run.tokens.mask,
        image=layout.image,
        slot=layout.slot,
        origin=layout.origin,
        last=layout.last,
        entered=call.entered,
        present=run.present,
        image_last=call.image_last,
        text_after=call.text_after,
        images=call.images,
        weight=run.weight,
        previous=call.previous,
        coming=coming,
        in_cache=keys,
        cached=run.cached,
        size=run.size,
        blocks=None if call.blocks is None else run.tokens.of_callers(call.blocks, fill=-1),
    ).without_last(call.guess)


def _hide(stage: Stage, layer: int, call: Call, weight: Tensor) -> None:
    """Begin a run of layers in which tokens count as much as `weight` (B, S) says, while a method trains.

    Raises:
        ValueError: the patch has an option that only dropping can fulfil.
    """
    run = call.run(layer)
    if run.size is not None:
        raise ValueError(
            f"{stage.method} hides tokens in training, and rectify=True counts merged ones; leave out rectify"
        )
    if stage.method.layer_positions == "renumbered":
        raise ValueError(
            f"{stage.method} hides tokens in training instead of dropping them, so there are no gaps to close; "
            "use layer_positions='original' with it"
        )
    weight = weight.to(run.tokens.mask.device).masked_fill(_image(run) == 0, 1)
    weight = weight if run.weight is None else run.weight * weight
    call.runs.append(Run(layer, run.tokens, run.visual, run.present, run.cached, weight))
    call.visits.append(Visit(stage, run.visual, run.visual))


def _remove(stage: Stage, layer: int, call: Call, keep: Tensor, tokens: LayerInput, later: Later) -> Tensor | None:
    """Begin a run of layers with the tokens that stay, and return their indices (B, S'); None if all stay.

    Args:
        stage: the stage that chose.
        layer: number of the decoder layer.
        call: the forward.
        keep: (B, S) bool, the choice of the stage.
        tokens: the stage's view of the input.
        later: runs the checks of values.
    """
    run, device = call.run(layer), call.run(layer).tokens.mask.device
    layout, held = run.tokens.layout, _held(run)
    assert layout is not None
    keep = keep.to(device) | (layout.image == 0)  # text stays whatever the method says
    known, counts = stage.method.known_counts(tokens), None
    if known is not None:
        visual = [sum(row) for row in known]
        kept = (keep & (layout.image > 0)).sum(1)
        later.check(kept, partial(check_counts, stage.method, visual))
        counts = [each + text for each, text in zip(visual, call.text, strict=True)]
    renumber = stage.method.layer_positions == "renumbered"
    selection = layout.select(keep, renumber, counts)
    if selection is None:
        call.visits.append(Visit(stage, run.visual, run.visual))
        return None
    visual = [count - text for count, text in zip(selection.layout.counts, call.text, strict=True)]
    index = selection.index
    weight = None if run.weight is None else run.weight.gather(1, index)
    size = None if run.size is None else torch.cat([run.size[:, :held], run.size[:, held:].gather(1, index)], 1)
    lower = run.lower
    if renumber:
        lower = selection.shift if lower is None else lower + selection.shift
    present = known or [[count] for count in visual]
    call.runs.append(Run(layer, Segment.of(selection.layout), visual, present, run.cached, weight, lower, size))
    call.visits.append(Visit(stage, run.visual, visual))
    return index
