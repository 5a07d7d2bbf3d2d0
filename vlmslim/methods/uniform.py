"""uniform: keep visual tokens on a regular grid."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_keep, resolve_keep
from vlmslim.ops.selection import grid_cells, share_out


@dataclass
class Uniform(Compressor):
    """Cut the image into k cells, as even as k allows, and keep the token at the middle of each.

    The thumbnail, the mosaic of tiles and every frame of a video get their share of the budget; newline tokens go,
    unless everything is kept.

    keep      : visual tokens to keep per image, a count or a share
    positions : "renumbered" or "original" rotary positions
    """

    keep: Keep
    positions: str = "renumbered"

    def __post_init__(self):
        check_keep(self.keep)

    def compress(self, image: ImageTokens) -> Compressed:
        """Pick the middle token of every cell."""
        middle = _middles(_key(image.mosaic), resolve_keep(self.keep, len(image.features)))
        return image.pick(torch.from_numpy(middle.copy()).to(image.features.device))


def even_cells(mosaic: Tensor, k: int) -> Tensor:
    """Cells of near-equal size over all components of an image, on the CPU; found once for images of one arrangement.

    Args:
        mosaic: (n, 3) component, row and column of every token (`ImageTokens.mosaic`).
        k: number of cells.

    Returns:
        (n,) long: the cell of every token, 0 .. k-1; -1 at tokens without a place, such as newlines. A budget that
        exceeds the tokens on grids turns those into cells of their own, first ones first.
    """
    return torch.from_numpy(_even_cells(_key(mosaic), k).copy())


def _key(mosaic: Tensor) -> bytes:
    return mosaic.cpu().numpy().tobytes()


@lru_cache(maxsize=256)
def _middles(mosaic: bytes, k: int) -> np.ndarray:
    cell = _even_cells(mosaic, k)
    order = cell.argsort(kind="stable")[(cell < 0).sum() :]
    size = np.bincount(cell[order])
    return np.sort(order[size.cumsum() - size + size // 2])


@lru_cache(maxsize=256)
def _even_cells(mosaic: bytes, k: int) -> np.ndarray:
    component, row, column = torch.from_numpy(np.frombuffer(mosaic, dtype=np.int64).reshape(-1, 3).copy()).unbind(1)
    cell = torch.full_like(component, -1)
    placeless = (row < 0).nonzero()[:, 0]
    extra = max(0, k - (len(component) - len(placeless)))
    component = component.masked_fill(row < 0, -1)
    parts = [(component == c).nonzero()[:, 0] for c in component[component >= 0].unique().tolist()]
    first = 0
    for index, share in zip(parts, share_out(k - extra, [len(p) for p in parts]), strict=True):
        if share:
            # ranks, not coordinates: a mosaic that was shrunk to fewer tokens leaves rows and columns out
            r, c = (x[index].unique(return_inverse=True)[1] for x in (row, column))
            cell[index] = first + grid_cells(int(r.max()) + 1, int(c.max()) + 1, share)[r, c]
            first += share
    cell[placeless[:extra]] = first + torch.arange(extra)
    return cell.numpy()
