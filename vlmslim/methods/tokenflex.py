"""TokenFLEX: "Unified VLM Training for Flexible Visual Tokens Inference" (arXiv 2504.03154)."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, check_choices, check_keep, resolve_keep
from vlmslim.engine.families import has_cls, projector
from vlmslim.saving.trained import load_part


class Projector(nn.Module):
    """The token-adaptive projector: LayerNorm and SwiGLU on pooled tower features; all counts share all weights.

    Section 3.2 of the paper; layout and sizes are those of the released code.

    Args:
        width: width of the tower's features.
        hidden: width of the language model.
        expansion: inner width over `width`.
    """

    def __init__(self, width: int, hidden: int, expansion: int = 3):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, expansion * width)
        self.value = nn.Linear(width, expansion * width)
        self.out = nn.Linear(expansion * width, hidden)

    def forward(self, pooled: Tensor) -> Tensor:
        """Project (..., width) to (..., hidden)."""
        z = self.norm(pooled)
        return self.out(F.silu(self.gate(z)) * self.value(z))


def pool_square(x: Tensor, side: int, how: str = "resize") -> Tensor:
    """Pool a square grid of features to side x side.

    "resize" stretches the grid to the next multiple of `side` (bilinear, corners aligned) and averages equal cells, so
    that every cell has the same weight; "adaptive" is adaptive average pooling. The two agree where `side` divides
    the grid.

    Args:
        x: (B, H * H, C) features in raster order.
        side: at least 1; may exceed H with "resize".
        how: "resize" or "adaptive".

    Returns:
        (B, side * side, C).

    Raises:
        ValueError: the grid is not square.
    """
    grid = math.isqrt(x.shape[1])
    if grid**2 != x.shape[1]:
        raise ValueError(f"{x.shape[1]} features form no square grid: TokenFLEX pools square grids only")
    x = x.transpose(1, 2).unflatten(2, (grid, grid))
    if how == "adaptive":
        x = F.adaptive_avg_pool2d(x, side)
    else:
        cell = -(-grid // side)
        if cell * side != grid:
            x = F.interpolate(x, size=(cell * side, cell * side), mode="bilinear", align_corners=True)
        x = F.avg_pool2d(x, cell)
    return x.flatten(2).transpose(1, 2)


def square_side(count: int, name: str = "keep") -> int:
    """Return the side of a square count.

    Raises:
        ValueError: the count is not a square; the message names the nearest squares.
    """
    side = math.isqrt(count)
    if side**2 != count:
        near = " or ".join(str(s**2) for s in (side, side + 1))
        raise ValueError(f"{name}={count}: TokenFLEX pools to a square; use {near}")
    return side


@dataclass
class TokenFlex(Compressor):
    """Pool the tower's features to t x t, and project them with one projector trained for many counts.

    Each crop of an anyres image and each frame of a video is pooled to the same t. Unpadding and newlines follow the
    model's own packing, at side t. Differs from the release: the engine removes the placeholders that are left over,
    so the processor stays as it is. Therefore no more tokens than placeholders can be kept.

    While the projector is in training mode, every forward draws one count from `counts`, and `keep` is not used.

    keep          : visual tokens per image. A count is a square (64, 144, 256), and needs images of one crop; a share
                    applies to every crop, and is rounded down to a square
    weights       : a folder of trained weights; "random" to start a training; "pool" for the training-free control,
                    which pools and then uses the model's own projector
    pool          : "resize" as released, or "adaptive" for an ablation; see `pool_square`
    expansion     : inner width of the projector over the tower's width
    counts        : visual tokens per crop in training
    probabilities : how often each of `counts` is drawn
    """

    keep: int | float = 256
    weights: str = ""
    pool: str = "resize"
    expansion: int = 3
    counts: tuple[int, ...] = (64, 144, 256)
    probabilities: tuple[float, ...] = (0.2, 0.3, 0.5)

    needs_patches: ClassVar = True

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choices(self, pool=("resize", "adaptive"))
        if not 1 <= self.expansion <= 64:
            raise ValueError(f"expansion={self.expansion}: give an integer from 1 to 64; the paper uses 3")
        if isinstance(self.keep, int):
            square_side(self.keep)
        self.counts, self.probabilities = tuple(self.counts), tuple(self.probabilities)
        if min(self.counts, default=0) < 1:
            raise ValueError(f"counts={self.counts}: give squares from 1 on")
        for count in self.counts:
            square_side(count, "counts")
        if len(self.counts) != len(self.probabilities) or min(self.probabilities, default=0) <= 0:
            raise ValueError(f"probabilities={self.probabilities}: give one above 0 for each of counts={self.counts}")

    def setup(self, model: Any) -> None:
        """Make the projector and load its weights."""
        config = model.config
        own = [layer for layer in projector(model.model).children() if hasattr(layer, "in_features")]
        grid = config.vision_config.image_size // config.vision_config.patch_size
        with_cls = getattr(config, "vision_feature_select_strategy", "") == "full" and has_cls(model.model)
        self.patches = grid**2 + with_cls  # of a crop, as the projector sees it
        #: the most tiles whose tokens OneVision does not shrink; 0 for other models
        self.most_tiles = int(getattr(config, "vision_aspect_ratio", "0").removeprefix("anyres_max_"))
        self.projector: nn.Module | None = None  # the model's own
        if self.weights != "pool":
            with torch.device("meta"):
                self.projector = Projector(own[0].in_features, own[-1].out_features, self.expansion)
            load_part(self, self.projector, model)

    def trained(self) -> nn.Module | None:
        """Return the projector, or None for the training-free control."""
        return self.projector

    def draw(self) -> int:
        """Draw a count for one forward of the training."""
        return self.counts[int(torch.multinomial(torch.tensor(self.probabilities), 1))]

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Pool and project the crops of all images together, those of equal grids and sides at a time."""
        count = self.draw() if self.projector is not None and self.projector.training else None
        results: dict[int, Compressed] = {}
        groups: dict[tuple[int, torch.Size], list[int]] = {}
        for i, image in enumerate(images):
            side = self._side(image, count)
            if self.projector is None and side**2 == image.tower.shape[1]:  # nothing to pool: keep every bit
                results[i] = image.pick_all()
            else:
                groups.setdefault((side, image.tower.shape[1:]), []).append(i)
        for (side, _), members in groups.items():
            tokens = self._project(images[members[0]], torch.cat([images[i].tower for i in members]), side)
            for i, crops in zip(members, tokens.split([len(images[i].tower) for i in members]), strict=True):
                packed = self._packed(images[i], crops.to(images[i].features.device), side)
                results[i] = Compressed(packed, made_of=partial(self._made_of, images[i], side))
        return [results[i] for i in range(len(images))]

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int:
        """Return the pooled tokens of all crops, and the newlines of what `size` leaves of the mosaic."""
        patches = math.isqrt(self.patches) ** 2
        if not tiles[1]:
            return self._asked_side(patches, 1) ** 2 + n - self.patches
        side = self._asked_side(patches, 1 + math.prod(tiles))
        height, width = self._shrunk(side, *unpadded((tiles[0] * side, tiles[1] * side), size))
        return side**2 + height * (width + 1)

    def _side(self, image: ImageTokens, count: int | None) -> int:
        """Return the side to pool to, for the count that a training forward drew or for `keep`."""
        patches = _grid(image.tower).shape[1]
        if image.video:  # the model itself pools a frame to fewer tokens
            patches = (len(image.features) - 1) // len(image.tower)
        if count is None:
            return self._asked_side(patches, len(image.tower))
        if count > patches:
            raise ValueError(f"counts={self.counts}: an image here has only {patches} visual tokens per crop")
        return square_side(count, "counts")

    def _asked_side(self, patches: int, crops: int) -> int:
        """Return the side that `keep` asks for, of crops or frames of `patches` tokens."""
        if isinstance(self.keep, float):
            return math.isqrt(resolve_keep(self.keep, patches))
        if crops > 1:
            raise ValueError(
                f"keep={self.keep} counts the tokens of an image, but this one has {crops} crops or frames "
                f"of {patches} tokens; give a share: keep={round(self.keep / patches, 4)} pools each to {self.keep}"
            )
        return square_side(resolve_keep(self.keep, patches))

    def _project(self, image: ImageTokens, tower: Tensor, side: int) -> Tensor:
        """Pool and project tower features of the model of `image`: (c, p, v) -> (c, side * side, d)."""
        if self.projector is None:
            return image.project(pool_square(_grid(tower), side, self.pool))
        parameter = next(self.projector.parameters())
        return self.projector(pool_square(_grid(tower).to(parameter), side, self.pool))

    def _packed(self, image: ImageTokens, crops: Tensor, side: int) -> Tensor:
        """Join projected crops as the model joins the image's own tokens: (c, side * side, d) -> (k, d)."""
        newline = image.features[-1:].to(crops)  # if there is a newline, it is last
        if image.video:
            return torch.cat([crops.flatten(0, 1), newline])
        if len(crops) == 1:
            return torch.cat([crops[0], newline[: len(image.features) - image.tower.shape[1]]])
        rows, columns = image.tiles
        mosaic = crops[1:].view(rows, columns, side, side, -1).permute(4, 0, 2, 1, 3).flatten(1, 2).flatten(2, 3)
        mosaic = unpad(mosaic, image.size)
        shrunk = self._shrunk(side, *mosaic.shape[1:])
        if shrunk != mosaic.shape[1:]:
            mosaic = F.interpolate(mosaic[None], shrunk, mode="bilinear")[0]
        lines = newline.T[:, None].expand(-1, mosaic.shape[1], 1)
        return torch.cat([crops[0], torch.cat([mosaic, lines], 2).flatten(1).T])

    def _made_of(self, image: ImageTokens, side: int) -> Tensor:
        """Return how much of each of the image's tokens is in each pooled one, as `Compressed.made_of`.

        An identity matrix travels through the pooling and the packing in place of the features. Its last column marks
        newlines.
        """
        n = len(image.features)
        one_hot = F.one_hot(torch.from_numpy(tokens_at_patches(image)) + 1, n + 1)[..., 1:].float()
        newline = F.pad(torch.zeros(n, n), (0, 1), value=1)
        packed = self._packed(
            replace(image, features=newline), pool_square(F.pad(one_hot, (0, 1)), side, self.pool), side
        )
        made_of, lines = packed[:, :n], packed[:, n].nonzero()[:, 0]
        own = torch.from_numpy(np.flatnonzero(image.grid_on_host[:, 0] < 0))[: len(lines)]
        made_of[lines[: len(own)], own] = 1
        return made_of

    def _shrunk(self, side: int, height: int, width: int) -> tuple[int, int]:
        """Return height and width to which OneVision resizes a large mosaic; other models leave it as it is."""
        ratio = math.sqrt(height * width / (self.most_tiles * side**2)) if self.most_tiles else 0
        return (int(height // ratio), int(width // ratio)) if ratio > 1.1 else (height, width)


def unpad(mosaic: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut away the padding that gave a picture the aspect ratio of its mosaic, with the rounding of LLaVA-NeXT.

    Args:
        mosaic: (d, height, width) tokens.
        size: height and width of the picture in pixels.

    Returns:
        (d, height', width'), shorter in at most one direction.
    """
    height, width = unpadded((mosaic.shape[1], mosaic.shape[2]), size)
    top, left = (mosaic.shape[1] - height) // 2, (mosaic.shape[2] - width) // 2
    return mosaic[:, top : top + height, left : left + width]


def unpadded(mosaic: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a mosaic of tokens without its padding, for a picture of `size` pixels."""
    height, width = mosaic
    if size[1] / size[0] > width / height:
        lost = (height - int(round(size[0] * (width / size[1]), 7))) // 2
        return height - 2 * lost, width
    lost = (width - int(round(size[1] * (height / size[0]), 7))) // 2
    return height, width - 2 * lost


def tokens_at_patches(image: ImageTokens) -> np.ndarray:
    """Return the image's token that stands at each patch of its crops: (c, p); -1 where the model cut padding away.

    If the model made fewer tokens than patches, because it pooled frames or shrank a mosaic, it is the nearest token.
    """
    side, (rows, columns) = image.side, image.tiles
    component, row, column = image.mosaic_on_host.T
    tiled = bool(columns) and not image.video

    def at(component_of: int) -> np.ndarray:
        mosaic = tiled and component_of == 1
        own = np.flatnonzero((component == component_of) & (row >= 0))
        if not len(own):
            return np.full((rows * side, columns * side) if mosaic else (side, side), -1)
        found = []
        for places, parts in ((row[own], rows), (column[own], columns)):
            known = np.unique(places)
            patches, step = (parts * side, 1.0) if mosaic else (side, side / (known[-1] + 1))
            patch = np.arange(patches)
            nearest = np.abs(patch[:, None] - ((known + 0.5) * step - 0.5)).argmin(1)
            inside = (patch >= int(known[0] * step)) & (patch < (known[-1] + 1) * step)
            found.append((np.searchsorted(known, places), np.where(inside, nearest, -1), len(known)))
        (r, at_row, height), (c, at_column, width) = found
        table = np.full((height + 1, width + 1), -1)  # the last row and column are for patches without a token
        table[r, c] = own
        return table[np.ix_(at_row, at_column)]

    if not tiled:
        return np.stack([at(crop).ravel() for crop in range(len(image.tower))])
    tiles = at(1).reshape(rows, side, columns, side).swapaxes(1, 2).reshape(rows * columns, side**2)
    return np.concatenate([at(0).reshape(1, -1), tiles])


def _grid(tower: Tensor) -> Tensor:
    """Remove the CLS token that `vision_feature_select_strategy="full"` leaves in front of the features (c, p, v)."""
    side = math.isqrt(tower.shape[1])
    return tower[:, 1:] if side**2 == tower.shape[1] - 1 else tower
