"""VScan: "Rethinking Visual Token Reduction for Efficient LVLMs" (TMLR 2026, arXiv 2505.22654)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, Part, Positive, check_keep
from vlmslim.engine.families import encoder_layers
from vlmslim.engine.layout import to_device
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection, interleave
from vlmslim.methods.pyramiddrop import PyramidDrop
from vlmslim.ops.cells import dense
from vlmslim.ops.merging import ended, nearest, sum_joined
from vlmslim.ops.ranking import rank_within_groups


@dataclass
class VScanEntrance(ScoredSelection):
    """Stage 1: keep the best patches of each window and of the whole crop, and merge the others into them.

    The options are those of `VScan`.
    """

    pool = "view"
    compares = False
    merges = True

    keep: Keep = 1 / 6
    mode: str = "corrected"
    local: Part = 0.5
    window: Positive = 6
    shallow: int | float = 0.21
    merge: bool = True
    score: str = "auto"
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self)
        if self.shallow < 0 or (isinstance(self.shallow, float) and self.shallow >= 1):
            raise ValueError(f"shallow={self.shallow}: give a tower layer from 0 on, or a share of the depth below 1")
        if self.mode == "released":
            self.reads_back = "attention decides how much of the budget is lost"

    def setup(self, model: Any) -> None:
        """Find the shallow layer of this tower."""
        super().setup(model)
        depth = len(encoder_layers(model.model))
        self.local_layer = round(self.shallow * depth) if isinstance(self.shallow, float) else self.shallow
        self.tower_layers = (*self.tower_layers, self.local_layer)

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int | None:
        """Return the budget; in the release attention decides how much is lost of it."""
        return self.requested(n) if self.mode == "corrected" else None

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return attention in both layers."""
        return self.scores(image, self.local_layer), self.scores(image)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Take local and global tokens in turns."""
        orders = []
        for pool, shallow, deep in zip(pools, *read, strict=True):
            place = dense(pool.image.grid_on_host[pool.slots_on_host])[:, 1:]
            both = local_and_global(shallow, deep, windows(place, self.window), k, int(k * self.local))
            orders.append(interleave([*both]))
        return torch.stack(orders)

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Choose, and merge into what was chosen."""
        chosen = super().select_images(images)
        if self.mode == "released" or not self.merge:
            return chosen
        return [self._merged(image, result) for image, result in zip(images, chosen, strict=True)]

    def _merged(self, image: ImageTokens, chosen: Compressed) -> Compressed:
        x, index = image.features, chosen.index
        if index is None or len(index) == len(x):
            return chosen
        features, others, joined = merged(x, index, image.grid[:, 0].to(x.device))
        return Compressed(features, index, partial(ended, len(x), index, others, joined))

    def released(self, image: ImageTokens, k: int) -> Compressed:
        """Choose and merge among all patches of every view; then unpad, and keep every newline."""
        views = len(image.tower)
        if (own := k // views) < 32 or image.side % 4:
            raise ValueError(
                f"VScan's release fails with {own} tokens for each of {views} views of {image.side} x {image.side} "
                "patches: it needs 32 tokens and a side that 4 divides; use mode='corrected'"
            )
        kept = released_mask(self.patch_scores(image, self.local_layer), self.patch_scores(image), own)
        with torch.no_grad():
            patches = image.project(image.tower[:, -kept.shape[1] :])
        if self.merge:
            for view, mask in zip(patches, kept, strict=True):
                view[mask] = merged(view, mask.nonzero()[:, 0])[0]
        newline = image.grid[:, 0] < 0
        index = (image.at_tokens(kept) | newline).nonzero()[:, 0]
        features = torch.where(newline[:, None], image.features, image.at_tokens(patches).to(image.features))
        return Compressed(features[index], index)


@dataclass
class VScan(VScanEntrance):
    """Keep patches that a shallow and a deep tower layer look at; drop more before a middle decoder layer.

    1. In each crop or frame, half of the budget goes to local tokens: those of most CLS attention in a shallow layer,
       equally many in each window of the grid. The other half goes to global tokens: of the patches left, those of
       most CLS attention in the layer whose output LLaVA reads. Each dropped token joins the kept token of largest
       cosine to it, after the projector; a kept token becomes the mean of itself and those that joined it.
    2. Before a middle decoder layer, keep the tokens that the last prompt token is about to attend to most in that
       layer (the stage `pyramiddrop` with one drop). Positions are counted anew from there on.

    The release's "64 tokens" are 96 at the entrance and 32 from layer 16 of 32 on, which is 64 on average.

    mode="released" follows stage 1 of the release (commit a82450e), for LLaVA-1.5 and LLaVA-NeXT, with these faults:
    a remainder of half the budget by 16 windows is lost; fewer than 32 tokens fail; where attention underflows to 0,
    local tokens are taken for global ones again; padded patches compete, and what merges into them is lost; every
    newline is kept, on top of the budget. mode="corrected", the default, meets `keep` exactly, excludes local tokens,
    and chooses among the image's own tokens. Windows of odd grids are those of the release for Qwen2.5-VL: the last row
    and column of windows take what is left over. In both modes merging is in fp32, stage 2 counts the tokens that
    really entered (on LLaVA-NeXT, the release drops most of the thumbnail instead) and ranks every image, and ties go
    to the lower index.

    keep            : visual tokens that enter the language model per image, a count or a share
    mode            : "corrected" or "released"
    local           : part of the budget for local tokens
    window          : rows and columns of tokens of a window; 6 in the release, and 4 for Qwen2.5-VL there
    shallow         : tower layer of the local tokens, counted from 0, or a share of the depth; 5 of 24 as released
    merge           : merge dropped tokens into kept ones
    score           : attention from CLS ("cls"), mean attention received ("received", as released for Qwen2.5-VL), or
                      "auto": "cls" if the tower has CLS
    newline         : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions       : rotary positions: "auto", "original" or "renumbered" (as released) at the entrance
    deep            : what stage 2 leaves of the tokens that entered, a count or a share
    layer           : decoder layer of stage 2, a number or a share of the depth; None leaves stage 2 out
    layer_positions : "renumbered" (as released) or "original" from there on
    """

    deep: Keep = 1 / 3
    layer: int | float | None = 0.5
    layer_positions: str = "renumbered"

    def __post_init__(self) -> None:
        check_keep(self.deep, "deep")
        self.stages()  # each stage checks its options

    def stages(self) -> list[Compressor]:
        """Return the stages, or only the first if everything is to be kept, or if no layer is given."""
        first = VScanEntrance.stage_of(self)
        if self.layer is None or (isinstance(self.keep, float) and self.keep == 1):
            return [first]
        return [first, PyramidDrop(keep=self.deep, layer=(self.layer,), layer_positions=self.layer_positions)]


def windows(place: np.ndarray, side: int) -> np.ndarray:
    """Return the window (m,) of patches at rows and columns (m, 2); the last windows take what is left over."""
    count = ((place.max(0) + 1) // side).clip(min=1)
    row, column = np.minimum(place // side, count - 1).T
    return row * count[1] + column


def local_and_global(shallow: Tensor, deep: Tensor, window: np.ndarray, k: int, half: int) -> tuple[Tensor, Tensor]:
    """Choose k of m patches.

    Args:
        shallow: (m,) attention that decides on local tokens.
        deep: (m,) attention that decides on global tokens.
        window: (m,) the window of each patch, on the host.
        k: number of picks.
        half: number of local ones, as far as their windows have room.

    Returns:
        Local tokens and global ones, best first.
    """
    sizes = np.unique(window, return_counts=True)[1]
    room = -(-half // len(sizes))
    (group,) = to_device(shallow.device, window)
    full = rank_within_groups(shallow[None], group[None])[0] >= room
    order = shallow.argsort(descending=True, stable=True)
    local = order[full[order].byte().argsort(stable=True)][: min(half, int(sizes.clip(max=room).sum()))]
    rest = deep.index_fill(0, local, float("-inf"))
    return local, rest.argsort(descending=True, stable=True)[: k - len(local)]


def released_mask(shallow: Tensor, deep: Tensor, k: int) -> Tensor:
    """Choose patches of each crop (c, p) in 4 x 4 windows as the release does: (c, p) bool, k of them or fewer True."""
    side = isqrt(shallow.shape[1])
    (window,) = to_device(shallow.device, windows(np.argwhere(np.ones((side, side))), side // 4))
    local = rank_within_groups(shallow, window.expand_as(shallow)) < k // 2 // 16
    order = deep.masked_fill(local, 0).argsort(dim=1, descending=True, stable=True)
    return local.scatter(1, order[:, : k - k // 2], True)


def merged(x: Tensor, kept: Tensor, group: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Average each token that is not kept into the kept token that it resembles most.

    Args:
        x: (n, d) tokens, compared by cosine.
        kept: (k,) those that stay, ascending.
        group: (n,) tokens of different groups never merge, and those of group -1 not at all; None for one group.

    Returns:
        (k, d), and as in `nearest` (m,) the others and (m,) what each joins.
    """
    stays = torch.zeros(len(x), dtype=torch.uint8, device=x.device).index_fill(0, kept, 1)
    others = stays.argsort(stable=True)[: len(x) - len(kept)]
    joined = nearest(x, others, kept, group)
    total, size = sum_joined(x, others, joined, kept)
    return ((x[kept].float() + total) / (1 + size)).to(x), others, joined
