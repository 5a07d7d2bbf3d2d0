"""Samples that a caller packed into one row, as training without padding does."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

#: How flash attention is told where packed samples end, among the arguments of a forward.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


@dataclass
class Packed:
    """Where the tokens of packed rows (B, L) stand once each of the n samples has a row of its own: (n, W).

    Inside the language model a patched forward gives each sample its own row, padded on the left. So the samples cannot
    see each other whatever the attention back end, and a method is shown one sample at a time.

    row    : (B, L) the sample that a token belongs to
    column : (B, L) where the token stands in it
    mask   : (n, W) False at padding
    """

    row: Tensor
    column: Tensor
    mask: Tensor

    @classmethod
    def of(cls, position: Tensor) -> "Packed | None":
        """Find the samples in rows (B, L) by their rotary positions. A sample ends where they do not go up by one.

        Waits for the device.

        Returns:
            None if every row is one sample.
        """
        starts = np.diff(position.cpu().numpy(), axis=1, prepend=-2) != 1
        starts[:, 0] = True
        if starts.sum() == len(starts):
            return None
        row = starts.cumsum().reshape(starts.shape) - 1
        first = np.flatnonzero(starts)
        length = np.diff(first, append=starts.size)
        width = length.max()
        column = np.arange(starts.size).reshape(starts.shape) - first[row] + (width - length)[row]
        mask = np.arange(width) >= (width - length)[:, None]
        return cls(*(torch.from_numpy(x).to(position.device) for x in (row, column, mask)))

    def unpack(self, x: Tensor, fill: int = 0) -> Tensor:
        """Give each sample its own row: (B, L, ...) -> (n, W, ...), with `fill` at padding."""
        rows = x.new_full((*self.mask.shape, *x.shape[2:]), fill)
        rows[self.row.to(x.device), self.column.to(x.device)] = x
        return rows

    def pack(self, x: Tensor) -> Tensor:
        """Put the samples back: (n, W, ...) -> (B, L, ...)."""
        return x[self.row.to(x.device), self.column.to(x.device)]
