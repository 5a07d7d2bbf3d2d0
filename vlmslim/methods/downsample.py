"""downsample: the picture shrunk until it makes as many tokens; what every selection of tokens has to beat."""

import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_keep, resolve_keep
from vlmslim.engine.families import check_patches, feature_layers, has_cls, tower
from vlmslim.ops.budgets import share_out


@dataclass
class DownSample(Compressor):
    """Shrink the picture, and encode it anew with the model's own vision tower and projector.

    Each crop or frame is shrunk to a grid of patches as square as its picture, with its part of the budget; padding is
    cut off first. The position embeddings of the tower are interpolated. If the grid has more patches than the budget,
    evenly spaced ones are left out. Newlines of tiles are gone, and tokens get renumbered rotary positions. The model's
    own encoding of the picture does not run, except for videos and where methods share it.

    A question that this baseline answers does not need the tokens that a method chooses.

    keep : visual tokens to send per image, a count or a share
    """

    keep: Keep

    def __post_init__(self) -> None:
        check_keep(self.keep)

    def setup(self, model: Any) -> None:
        """Find the tower, and the layers whose features the projector reads.

        Raises:
            TypeError: tokens are not single patches, or the tower takes pictures of one size only.
        """
        check_patches(model.model, "DownSample")
        self.tower, config = tower(model.model), model.config
        if "interpolate_pos_encoding" not in inspect.signature(self.tower.forward).parameters:
            raise TypeError(
                f"DownSample shrinks pictures, and {type(self.tower).__name__} takes pictures of one size only: "
                "vlmslim cannot recompute it for another; use another method"
            )
        self.feature_layers = feature_layers(config)
        full = getattr(config, "vision_feature_select_strategy", "default") == "full"
        self.skip = int(has_cls(model.model) and not full)
        self.patch = config.vision_config.patch_size

    def encode(self, image: ImageTokens) -> Compressed | None:
        """Encode every crop at its budget; None if there is nothing to shrink, or a budget waits for the features."""
        if isinstance(self.keep, dict):
            return None
        grid = image.grid_on_host
        k, crops = resolve_keep(self.keep, len(grid)), grid[grid[:, 0] >= 0, 0]
        if k >= len(crops):
            return None
        budgets = share_out(k, np.bincount(crops, minlength=len(image.pixels)).tolist())
        shrunk = [
            self.shrunk(image, crop, grid[grid[:, 0] == crop], budget) for crop, budget in enumerate(budgets) if budget
        ]
        return Compressed(torch.cat(shrunk).to(image.features), into=partial(covered, grid, budgets))

    def compress(self, image: ImageTokens) -> Compressed:
        """Send what was encoded at a smaller size; all patches if there was nothing to shrink."""
        encoded = image.encoded or self.encode(image)
        if encoded is not None:
            return encoded
        placed = image.grid_on_host[:, 0] >= 0
        patches, others = np.flatnonzero(placed), np.flatnonzero(~placed)
        k = resolve_keep(self.keep, len(placed))
        index = np.sort(np.concatenate([patches, others[: k - len(patches)]]))
        return image.pick(torch.from_numpy(index).to(image.features.device, non_blocking=True))

    def shrunk(self, image: ImageTokens, crop: int, places: np.ndarray, k: int) -> Tensor:
        """Encode one crop as k tokens (k, d), of the part of it in which its tokens (m, 3) stand."""
        side = image.side
        if image.video:  # pooled after the tower, so that fewer tokens stand on the frame
            side = int(places[:, 1].max()) + 1
        (_, top, left), (_, bottom, right) = places.min(0).tolist(), places.max(0).tolist()
        height, width = image.pixels.shape[-2:]
        rows, columns = shape_of(k, bottom + 1 - top, right + 1 - left)
        part = image.pixels[
            crop : crop + 1,
            :,
            top * height // side : (bottom + 1) * height // side,
            left * width // side : (right + 1) * width // side,
        ]
        size = (rows * self.patch, columns * self.patch)
        small = F.interpolate(part.float(), size, mode="bicubic", antialias=True).to(image.pixels)
        output = self.tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
        features = output.last_hidden_state
        if self.feature_layers:
            features = torch.cat([output.hidden_states[layer] for layer in self.feature_layers], dim=-1)
        features = features[:, -(rows * columns) :] if self.skip else features
        kept = torch.arange(k, device=features.device) * features.shape[1] // k
        return image.project(features[:, kept])[0]


def covered(grid: np.ndarray, budgets: list[int]) -> Tensor:
    """Return the token of the shrunk picture that covers each of the image's tokens, as `Compressed.into`.

    Args:
        grid: (n, 3) `ImageTokens.grid_on_host`.
        budgets: tokens of each crop.
    """
    into = np.full(len(grid), -1)
    for crop, k in enumerate(budgets):
        own = np.flatnonzero((grid[:, 0] == crop) & (grid[:, 1] >= 0))
        if not k or not len(own):
            continue
        place = grid[own, 1:] - grid[own, 1:].min(0)
        height, width = place.max(0) + 1
        rows, columns = shape_of(k, int(height), int(width))
        token = np.full(rows * columns, -1)
        token[np.arange(k) * (rows * columns) // k] = np.arange(k) + sum(budgets[:crop])
        into[own] = token[place[:, 0] * rows // height * columns + place[:, 1] * columns // width]
    return torch.from_numpy(into)


def shape_of(k: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the rows and columns of a grid of at least k points, about as square as rows x columns, and within it."""
    height = min(rows, max(1, round((k * rows / columns) ** 0.5), -(-k // columns)))
    width = -(-k // height)
    return -(-k // width), width
