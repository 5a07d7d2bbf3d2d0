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
            return image.pick_all()
        member, size = cell_members(even_cells(image.mosaic_on_host, k))
        first = member[size.cumsum() - size]
        order = first.argsort()  # cells in the order in which the language model meets them
        known = [torch.from_numpy(each).to(x.device, non_blocking=True) for each in (member, size, order, first[order])]
        members, sizes, cells, slots = known
        mean = torch.segment_reduce(x[members].float(), "mean", lengths=sizes, unsafe=True)  # the check would wait

        def into() -> torch.Tensor:
            return torch.full((n,), -1).scatter_(
                0, torch.from_numpy(member), torch.from_numpy(order.argsort().repeat(size))
            )

        return Compressed(mean[cells].to(x.dtype), slots, into)
