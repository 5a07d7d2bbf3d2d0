"""The decoder of a model in any version of transformers: masks, rotary positions and the KV cache."""

import inspect
from dataclasses import fields
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

#: What the KV cache is called among a forward's arguments and on its output; transformers 5.24 renamed it.
KV_CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"


def layer_type(lm: Any, layer: int) -> str:
    """Return the type of a decoder layer, such as "full_attention". Layers of one type share masks and positions."""
    types = getattr(lm.config, "layer_types", None)
    return types[layer] if types else "full_attention"


def rotary(lm: Any, layer: int, hidden: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Compute cosine and sine of rotary positions for a decoder layer; its frequencies may depend on its type."""
    if position.ndim == 2 and "mrope_section" in (getattr(lm.config, "rope_parameters", None) or ()):
        position = position.expand(3, -1, -1)  # text alone; transformers 5.17 wants time, height and width even so
    if "layer_type" in inspect.signature(type(lm.rotary_emb).forward).parameters:
        return lm.rotary_emb(hidden, position, layer_type(lm, layer))
    return lm.rotary_emb(hidden, position_ids=position)


def causal_mask(
    lm: Any, layer: int, hidden: Tensor, mask: Tensor, cache: Cache | None, blocks: Tensor | None = None
) -> Any:
    """Make the attention mask of a decoder layer, in the form that its attention back end takes.

    Args:
        lm: the language model.
        layer: number of the decoder layer, which may have a sliding window.
        hidden: (B, S, d) its input.
        mask: (B, P + S) False at padding.
        cache: the KV cache, of P tokens.
        blocks: (B, S) tokens of one block see each other both ways; -1 for none.
    """
    window = layer_type(lm, layer) == "sliding_attention"
    if blocks is None:
        make = create_sliding_window_causal_mask if window else create_causal_mask
        return make(lm.config, hidden, mask, cache, layer_idx=layer)
    if not window:
        return create_causal_mask(lm.config, hidden, mask, cache, layer_idx=layer, block_sequence_ids=blocks)
    everywhere = nn.functional.pad(blocks, (mask.shape[1] - blocks.shape[1], 0), value=-1)
    return create_causal_mask(
        lm.config,
        hidden,
        mask,
        cache,
        layer_idx=layer,
        or_mask_function=blockwise_overlay(everywhere),
        and_mask_function=sliding_window_overlay(lm.config.sliding_window),
    )


def blocks_of(kwargs: dict) -> np.ndarray | None:
    """Find the tokens that see each other both ways: (B, L) the block of each, -1 for none; None without any."""
    types = kwargs.get("token_type_ids")
    if types is None or not bool(types.any()):
        return None
    starts = (types == 1) & (nn.functional.pad(types, (1, 0), value=0)[:, :-1] != 1)
    blocks = starts.long().cumsum(1) - 1
    return blocks.masked_fill(types != 1, -1).cpu().numpy()


def kv_cache(where: dict | ModelOutput) -> Cache | None:
    """Return the KV cache among a forward's keyword arguments, or on its output; None without one."""
    if isinstance(where, ModelOutput):
        return where.get(KV_CACHE)
    names = (KV_CACHE, "past_key_values", "layer_past")  # a caller may use the old name, and GPT-NeoX has its own
    return next((where[name] for name in names if where.get(name) is not None), None)


def cached_keys(cache: Cache | None, layer: int, hidden: Tensor, before: int = 0) -> Tensor | None:
    """Return the rotated keys of a layer that has just cached `hidden` (B, S, d): (B, kv heads, P + S, head_dim).

    `before` is P, the number of tokens that it held before. None if the cache does not have the keys as they were,
    because it quantises them or moves them to another device.
    """
    keys = getattr(cache.layers[layer], "keys", None) if cache is not None else None
    if keys is None or keys.ndim != 4 or keys.device != hidden.device or not keys.is_floating_point():
        return None
    return keys if keys.shape[::2] == (len(hidden), before + hidden.shape[1]) else None
