"""The places of an image's visual tokens: `ImageTokens.grid`."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def crop_grid(side: int, patches: int) -> Tensor:
    """Lay out one crop: (p, 3) zero, row and column of each token; -1 twice at CLS."""
    rows, columns = torch.arange(side), torch.arange(side)
    grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, columns)
    cls = torch.tensor([[0, -1, -1]]).expand(patches - side**2, 3)  # vision_feature_select_strategy="full" keeps CLS
    return torch.cat([cls, grid])


def cell_grid(size: tuple[int, int, int]) -> Tensor:
    """Lay out frames of rows and columns of tokens: (n, 3)."""
    return torch.stack(torch.meshgrid(*map(torch.arange, size), indexing="ij"), dim=-1).flatten(0, 2)


def token_order(patches: tuple[int, int], merge: int) -> Tensor:
    """Return the order that puts the patches (rows, columns) of each token next to each other, token by token."""
    rows, columns = patches
    number = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    return number.transpose(1, 2).flatten()


def in_order(x: Tensor, order: Tensor) -> Tensor:
    """Put the patches of a tower's tokens (..., p', v) in an order (p,); a CLS token in front stays there."""
    ahead, patches = x.split([x.shape[-2] - len(order), len(order)], dim=-2)
    return torch.cat([ahead, patches[..., order, :]], dim=-2)


def packed_grid(repack: Callable[[Tensor], Tensor], crops: int, columns: int, side: int, patches: int) -> Tensor:
    """Lay out an image that the model packs: tiles are unpadded, resized and joined by newlines.

    To learn where each token ends up, the coordinates themselves travel through the model's own packing and are read
    off its result. A flat patch index would not survive the bilinear resizing of OneVision.

    Args:
        repack: sends other features (c, p, 3) through the packing of this image.
        crops: of the image, the thumbnail included.
        columns: of tiles; 0 without tiles.
        side: patches along one side of a crop.
        patches: tokens of a crop, CLS included if the model keeps it.

    Returns:
        (n, 3) crop, row and column of each token; -1 three times at a newline.
    """
    crop = crop_grid(side, patches)
    tiles = [crop + torch.tensor([1, i // columns * side, i % columns * side]) for i in range(crops - 1)]
    component, row, column = repack(torch.stack([crop, *tiles]).float()).round().long().unbind(1)
    in_tile = component == 1
    tile = 1 + row // side * max(columns, 1) + column // side
    return torch.stack(
        [
            torch.where(in_tile, tile, component),
            torch.where(in_tile, row % side, row),
            torch.where(in_tile, column % side, column),
        ],
        dim=1,
    )


def video_grid(frames: int, n: int) -> Tensor:
    """Lay out a video of `n` tokens: pooled frames one after the other, and one newline at the end."""
    side = math.isqrt(n // frames)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(side), torch.arange(side))
    return torch.cat([grid, grid.new_full((n - len(grid), 3), -1)])
