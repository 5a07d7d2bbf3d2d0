"""Slots of kept tokens: the places that they had in their image, carried along with their embeddings."""

import torch
from torch import Tensor

BASE = 128  # bfloat16 has all integers up to twice this


def with_slots(kept: Tensor, index: Tensor | None) -> Tensor:
    """Append to kept tokens (k, d) the slots that they take, as two digits: (k, d + 2).

    vLLM moves nothing but embeddings from the encoder to where positions are needed. As everywhere in vlmslim, the i-th
    token takes the i-th slot in reading order; tokens that a method made without saying where take the first k.
    """
    slots = torch.arange(len(kept), device=kept.device) if index is None else index.sort().values
    return torch.cat([kept, torch.stack([slots // BASE, slots % BASE], dim=1).to(kept)], dim=1)


def without_slots(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `with_slots`: the tokens (k, d), and their slots (k,)."""
    high, low = kept[:, -2:].round().long().unbind(1)
    return kept[:, :-2], high * BASE + low
