"""The shortened prompt as embeddings, for engines that take those instead of pictures."""

from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlmslim.engine.families import added_layers

if TYPE_CHECKING:
    from vlmslim.engine.hooks import Hooks

#: What `compressed_prompt` waits for in this thread or task; None elsewhere.
_WANTED: ContextVar[dict[str, Tensor] | None] = ContextVar("vlmslim_wanted", default=None)


class _Reached(Exception):
    """Ends a forward that has reached the language model."""


def compressed_prompt(hooks: "Hooks", inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Encode and compress the images of prompts, and stop where the language model would begin.

    Args:
        hooks: of the patch.
        inputs: of the model's forward, with images.

    Returns:
        What the language model would see: `inputs_embeds` (B, S, d), `attention_mask` (B, S) bool, and `position_ids`
        (B, S), or (axes, B, S) where a position has several numbers. Rows are padded on the left.

    Raises:
        ValueError: a stage works inside the decoder, the language model needs more than embeddings, or no image came.
    """
    if late := next((stage for stage in hooks.stages if stage.layers), None):
        raise ValueError(
            f"{late.method} drops tokens between decoder layers, which embeddings cannot carry; use a method that "
            "works before the language model"
        )
    if hooks.family.masks_by_type or added_layers(hooks.core):
        raise ValueError(
            f"{type(hooks.model).__name__}: its decoder layers need more than embeddings, a mask and positions; call "
            "the patched model instead"
        )
    found: dict[str, Tensor] = {}
    before = _WANTED.set(found)
    handle = hooks.lm.register_forward_pre_hook(partial(_take, hooks), with_kwargs=True)  # after the patch's own hook
    try:
        hooks.core(**inputs | {"use_cache": False})
    except _Reached:
        return found
    finally:
        handle.remove()
        _WANTED.reset(before)
    raise RuntimeError("the language model was replaced after the patch; remove() the patch, and patch again")


def _take(hooks: "Hooks", lm: nn.Module, args: tuple, kwargs: dict) -> None:
    """Note what enters the language model, and end the forward."""
    found, call = _WANTED.get(), hooks.call
    if found is None:
        return
    if call is None or not call.encoded:
        raise ValueError("there is no image in these inputs, so nothing to compress: give pixel_values")
    if call.runs[0].size is not None:
        raise ValueError(
            "rectify=True counts merged tokens in every decoder layer, which embeddings cannot carry; leave out rectify"
        )
    tokens = call.runs[0].tokens
    found |= {"inputs_embeds": kwargs["inputs_embeds"], "attention_mask": tokens.mask, "position_ids": tokens.position}
    hooks.receipt.saw_prefill(call.prefill(hooks.stages, None, hooks.depth))
    raise _Reached
