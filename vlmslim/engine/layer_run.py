"""A run of decoder layers that see the same tokens, and the masks and positions that these layers get."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from vlmslim.engine.attention import Rotary
from vlmslim.engine.families import causal_mask, layer_type, rotary
from vlmslim.engine.layout import Segment, concat_masks
from vlmslim.ops.attention import visible, weighted_causal_mask


@dataclass
class Run:
    """Consecutive decoder layers that see the same tokens. A drop before a layer ends one run and starts the next.

    first  : its first layer
    tokens : the tokens that these layers compute
    visual : visual tokens of each row
    present : of each row, the counts of its images; their sum alone, if no more is known
    cached : (B, P) mask of what the KV cache of these layers held before this forward; None if nothing
    weight : (B, S) how strongly each token may be attended to, while a method trains; None if all count in full
    lower  : (B, 1) how much further than in `Call.shift` positions after this forward move down here, because a drop
             between layers closed its gaps; None if they do not
    size   : (B, P + S) how many tokens each key stands for in attention; None if each stands for one
    """

    first: int
    tokens: Segment
    visual: list[int] = field(default_factory=list)
    present: list[list[int]] = field(default_factory=list)
    cached: Tensor | None = None
    weight: Tensor | None = None
    lower: Tensor | None = None
    size: Tensor | None = None
    _attention_masks: dict[str, Any] = field(default_factory=dict, init=False)  # tensors, None, or flex attention's
    _rotary: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def mask(self) -> Tensor:
        """(B, P + S) False at padding, of what is cached and of the tokens."""
        return concat_masks(self.cached, self.tokens.mask)

    def attention_mask(
        self, lm: Any, layer: int, hidden: Tensor, cache: Cache | None, blocks: np.ndarray | None = None
    ) -> Any:
        """Return the attention mask of a decoder layer for `hidden` (B, S, d). Layers of one type share it.

        Args:
            lm: the language model.
            layer: of this run.
            hidden: its input.
            cache: the KV cache.
            blocks: (B, L) of the caller's tokens, the block in which a token sees all others; -1 where it is causal.
        """
        kind = layer_type(lm, layer)
        if kind not in self._attention_masks:
            own = None if blocks is None else self.tokens.of_callers(blocks, fill=-1)
            if self.weight is not None:
                mask = self._weighted_mask(lm, hidden, cache)
            elif self.size is not None:
                mask = self._sized_mask(lm, kind, hidden, own)
            else:
                mask = causal_mask(lm, layer, hidden, self.mask.to(hidden.device), cache, own)
            self._attention_masks[kind] = mask
        mask = self._attention_masks[kind]
        return mask.to(hidden.device) if isinstance(mask, Tensor) else mask

    def _weighted_mask(self, lm: Any, hidden: Tensor, cache: Cache | None) -> Tensor:
        """Make a mask (B, 1, S, S) that adds the logarithm of each key's weight."""
        assert self.weight is not None
        _check_backend(lm, "weights of keys, which training between layers needs")
        if cache is not None:
            raise ValueError(
                "a method in training hides visual tokens instead of dropping them, and a KV cache would bring them "
                "back: pass use_cache=False, or call .eval() on the trained part to drop them"
            )
        return weighted_causal_mask(self.tokens.mask, self.weight, hidden.dtype)

    def _sized_mask(self, lm: Any, kind: str, hidden: Tensor, blocks: Tensor | None) -> Tensor:
        """Make a mask (B, 1, S, P + S) that adds the logarithm of each key's size."""
        assert self.size is not None
        _check_backend(lm, "sizes of keys, which rectify=True needs")
        mask, size = self.mask.to(hidden.device), self.size.to(hidden.device)
        held = mask.shape[1] - hidden.shape[1]
        rows = torch.arange(held, mask.shape[1], device=hidden.device).expand(len(mask), -1)
        window = lm.config.sliding_window if kind == "sliding_attention" else None
        blocks = None if blocks is None else torch.nn.functional.pad(blocks.to(mask.device), (held, 0), value=-1)
        hidden_keys = ~visible(mask, rows, window, blocks)[:, None]
        return size.log()[:, None, None].to(hidden.dtype).masked_fill(hidden_keys, torch.finfo(hidden.dtype).min)

    def rotary(self, lm: Any, layer: int, hidden: Tensor) -> Rotary:
        """Return cosine and sine of the rotary positions of a layer. Layers of one type share them."""
        kind = layer_type(lm, layer)
        if kind not in self._rotary:
            self._rotary[kind] = rotary(lm, layer, hidden, self.tokens.position)
        made = self._rotary[kind]
        return made.to(hidden.device) if isinstance(made, Tensor) else tuple(x.to(hidden.device) for x in made)


def wider(size: Tensor | None, more: int) -> Tensor | None:
    """Append the sizes of `more` tokens that stand for themselves alone: (B, P) -> (B, P + more)."""
    return None if size is None else torch.nn.functional.pad(size, (0, more), value=1.0)


def _check_backend(lm: Any, needed: str) -> None:
    """Refuse an attention back end whose masks cannot carry numbers; `needed` says which, and why.

    Raises:
        ValueError: names the back end.
    """
    backend = lm.config._attn_implementation
    if backend not in ("eager", "sdpa"):
        raise ValueError(f"{backend} attention takes no {needed}; call model.set_attn_implementation('sdpa')")
