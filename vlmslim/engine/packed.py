"""Samples that a caller packed into one row, as training without padding does."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor
from transformers import Cache

from vlmslim.engine.layout import to_device

#: How flash attention is told where packed samples end, among the arguments of a forward.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class Packed:
    """The places of the tokens of packed rows (B, L) when each of the n samples has a row of its own: (n, W).

    Inside the language model a patched forward gives each sample its own row, padded on the left. So the samples cannot
    see each other whatever the attention back end, and a method is shown one sample at a time.

    All of it is on the host.

    row    : (B, L) the sample that a token belongs to
    column : (B, L) where the token stands in it
    mask   : (n, W) False at padding
    """

    row: np.ndarray
    column: np.ndarray
    mask: np.ndarray

    @classmethod
    def of(cls, position: np.ndarray) -> "Packed | None":
        """Find the samples in rows (B, L) by their rotary positions. A sample ends where they do not go up by one.

        Returns:
            None if every row is one sample.
        """
        starts = np.diff(position, axis=1, prepend=-2) != 1
        starts[:, 0] = True
        if starts.sum() == len(starts):
            return None
        row = starts.cumsum().reshape(starts.shape) - 1
        first = np.flatnonzero(starts)
        length = np.diff(first, append=starts.size)
        width = length.max()
        column = np.arange(starts.size).reshape(starts.shape) - first[row] + (width - length)[row]
        mask = np.arange(width) >= (width - length)[:, None]
        return cls(row, column, mask)

    def unpack(self, x: Tensor, fill: int = 0) -> Tensor:
        """Give each sample its own row: (B, L, ...) -> (n, W, ...), with `fill` at padding."""
        rows = x.new_full((*self.mask.shape, *x.shape[2:]), fill)
        row, column = to_device(x.device, self.row, self.column)
        rows[row, column] = x
        return rows

    def pack(self, x: Tensor) -> Tensor:
        """Put the samples back: (n, W, ...) -> (B, L, ...)."""
        row, column = to_device(x.device, self.row, self.column)
        return x[row, column]


def packed_samples(kwargs: dict, position: np.ndarray | None, cache: Cache | None, uses_cache: bool) -> Packed | None:
    """Find samples that the caller packed into rows. Only a forward without a mask and a filled cache can have them.

    Args:
        kwargs: the arguments of the language model.
        position: (B, L) rotary positions as the caller gave them, read before the vision tower started; None if not.
        cache: the KV cache; None without one.
        uses_cache: the language model makes a cache if the caller does not say otherwise.

    Raises:
        ValueError: the rows are packed, and the forward fills a KV cache.
    """
    if position is None or kwargs.get("attention_mask") is not None:
        return None
    if cache is not None and cache.get_seq_length() > 0:
        return None
    packed, asked = Packed.of(position), kwargs.get("use_cache")
    if packed is not None and (cache is not None or (uses_cache if asked is None else asked)):
        raise ValueError(
            "rotary positions that start again inside a row pack several samples into it, and transformers keeps "
            "them apart only without a KV cache: pass use_cache=False, or give each sample a row of its own"
        )
    return packed
