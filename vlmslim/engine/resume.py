"""A forward that goes on with a KV cache: its tokens, its positions, and whether the cache is whole."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


def trim_cached_prefix(kwargs: dict, seen: int) -> dict:
    """Drop leading tokens that the cache already accounts for from the arguments of a forward.

    A caller who continues a conversation asks the cache how long it is and sends the rest. The compressed cache is
    shorter than the conversation, so the rest is too long by the number of dropped tokens.

    Args:
        kwargs: of the forward.
        seen: tokens of the conversation that the cache accounts for.

    Raises:
        ValueError: mask or positions do not cover the conversation.
    """
    name = "inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"
    size = kwargs[name].shape[1]
    mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if mask is not None and mask.ndim == 2:
        fresh = mask.shape[1] - seen
        if fresh > size or fresh < 1:
            raise ValueError(
                f"the attention mask covers {mask.shape[1]} tokens, the cache stands for {seen} and {size} more "
                "came in; the mask must cover the whole conversation, dropped visual tokens included"
            )
    elif position is not None and size > 1:
        fresh = int(position.max()) + 1 - seen  # without a mask there is no padding
        if fresh < 1:
            raise ValueError(
                f"positions end at {fresh + seen - 1}, but the cache already stands for {seen} tokens; pass an "
                "attention mask that covers the whole conversation, dropped visual tokens included"
            )
    else:
        return kwargs
    if fresh >= size:
        return kwargs
    trimmed = {name: kwargs[name][:, -fresh:]}
    if position is not None:
        trimmed["position_ids"] = position[..., -fresh:]
    return kwargs | trimmed


def resumed_position(kwargs: dict, seen: int, delta: Tensor) -> Tensor:
    """Return the rotary positions (1, B, S) of what follows a KV cache, in models whose positions have several numbers.

    Such a model would count on from the length of the compressed cache.

    Args:
        kwargs: of the forward.
        seen: tokens of the conversation that the cache accounts for.
        delta: (B, 1) `Plan.delta`.
    """
    tokens = kwargs["inputs_embeds"] if kwargs.get("input_ids") is None else kwargs["input_ids"]
    size, mask = tokens.shape[1], kwargs.get("attention_mask")
    if mask is None:
        position = torch.arange(seen, seen + size, device=tokens.device)[None]
    else:
        position = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -size:]
    return (position + delta.to(tokens.device))[None]


def check_length(cache: Cache, mask: Any, size: int) -> None:
    """Refuse a KV cache that is shorter than the conversation that its caller describes.

    Args:
        cache: without a plan.
        mask: the caller's, over the whole conversation; None without one.
        size: tokens that come in.

    Raises:
        ValueError: the cache lacks tokens, so a patch dropped them and its record is lost.
    """
    held = cache.get_seq_length(0)
    whole = isinstance(mask, Tensor) and mask.ndim == 2
    if whole and mask.shape[1] > held + size and not cache.is_compileable:
        raise ValueError(
            f"the attention mask covers {mask.shape[1]} tokens, but the KV cache holds {held} and {size} come in: a "
            "patch shortened this cache, and what it dropped is not recorded in it; copy caches with copy.deepcopy, or "
            "prefill again"
        )
