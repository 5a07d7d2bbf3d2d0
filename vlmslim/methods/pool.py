"""pool: average visual tokens over a coarser grid."""

from dataclasses import dataclass

import torch

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_keep, resolve_keep
from vlmslim.methods.uniform import even_cells


@dataclass
class Pool(Compressor):
    """Cut the image into k cells, as even as k allows, and send the mean of each.

    With k a square number on a square grid this is adaptive average pooling. Components and newlines are treated as
    by `uniform`. A mean takes the slot of its cell's first token.

    keep      : visual tokens to send per image, a count or a share
    positions : "renumbered" or "original" rotary positions
    """

    keep: Keep
    positions: str = "renumbered"

    def __post_init__(self):
        check_keep(self.keep)

    def compress(self, image: ImageTokens) -> Compressed:
        """Average every cell."""
        x = image.features
        n = len(x)
        k = resolve_keep(self.keep, n)
        if k == n:
            return Compressed(x, torch.arange(n, device=x.device))
        cell = even_cells(image.mosaic, k)
        first = torch.full((k,), n).scatter_reduce(0, cell[cell >= 0], (cell >= 0).nonzero()[:, 0], "amin")
        order = first.argsort()  # cells in the order in which the language model meets them
        cell, member = order.argsort()[cell[cell >= 0]].to(x.device), (cell >= 0).to(x.device)
        total = torch.zeros(k, x.shape[1], device=x.device).index_add(0, cell, x[member].float())
        mean = total / cell.bincount(minlength=k)[:, None]
        return Compressed(mean.to(x.dtype), first[order].to(x.device))
