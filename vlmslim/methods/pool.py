"""pool: average visual tokens over a coarser grid."""

from dataclasses import dataclass

import torch

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_keep, resolve_keep, settle_positions
from vlmslim.ops.cells import cell_members, even_cells


@dataclass
class Pool(Compressor):
    """Cut the image into k cells of near-equal size, and send the mean of each.

    If k is a square number and the grid is square, this is adaptive average pooling. Components and newlines are
    treated as by `uniform`. A mean takes the slot of its cell's first token.

    keep      : visual tokens to send per image, a count or a share
    positions : rotary positions: "auto", "original" or "renumbered"
    """

    keep: Keep
    positions: str = "auto"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        settle_positions(self)

    def compress(self, image: ImageTokens) -> Compressed:
        """Average every cell."""
        x, n = image.features, len(image.features)
        k = resolve_keep(self.keep, n)
        if k == n:
            return image.pick(torch.arange(n, device=x.device))
        member, size = cell_members(even_cells(image.mosaic.cpu(), k))
        mean = torch.segment_reduce(x[member.to(x.device)].float(), "mean", lengths=size.to(x.device))
        first, order = member[size.cumsum(0) - size].sort()  # cells in the order in which the language model meets them

        def into() -> torch.Tensor:
            return torch.full((n,), -1).scatter_(0, member, order.argsort().repeat_interleave(size))

        return Compressed(mean[order.to(x.device)].to(x.dtype), first.to(x.device), into)
