"""uniform: keep visual tokens on a regular grid."""

from dataclasses import dataclass

import numpy as np
import torch

from vlmslim.compressor import Compressed, ImageTokens, Keep, Selector
from vlmslim.ops.cells import cell_members, even_cells


@dataclass
class Uniform(Selector):
    """Cut the image into k cells of near-equal size, and keep the token in the middle of each.

    The thumbnail, the mosaic of tiles and every frame of a video get their share of the budget. Newline tokens are
    dropped, unless everything is kept.

    keep      : visual tokens to keep per image, a count or a share
    positions : rotary positions: "auto", "original" or "renumbered"
    """

    keep: Keep

    def compress(self, image: ImageTokens) -> Compressed:
        """Pick the middle token of every cell."""
        member, size = cell_members(even_cells(image.mosaic_on_host, self.budget(image)))
        middle = np.sort(member[size.cumsum() - size + size // 2])
        return image.pick(torch.from_numpy(middle).to(image.features.device, non_blocking=True))
