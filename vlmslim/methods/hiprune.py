"""HiPrune: "Hierarchical Attention for Efficient Token Pruning in VLMs" (ACL 2026, arXiv 2508.00553)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmslim.compressor import ImageTokens, Keep, Part, check_choices
from vlmslim.engine.families import encoder_layers, has_cls
from vlmslim.engine.layout import to_device
from vlmslim.methods._selection import Pool, Selection, check_selection
from vlmslim.ops.attention import received_attention
from vlmslim.ops.cells import dense
from vlmslim.ops.ranking import full_precision


@dataclass
class HiPrune(Selection):
    """Keep patches that receive much attention in a middle layer, their neighbours, and those of a late layer.

    In each crop or frame, of a budget t, round(t x alpha / 5) patches are anchors: they receive most attention in a
    middle layer of the vision tower. Their four neighbours on the grid are buffers. What is left of the budget goes to
    registers: the patches that receive most attention in the layer whose output LLaVA reads. Attention is the mean over
    heads and all queries, CLS included. Needs no CLS.

    mode="released" follows the release (commit 6e83a12), for LLaVA-1.5 and LLaVA-NeXT, with these faults: a neighbour
    outside the grid becomes the first or last patch of the crop; the right neighbour of a row's end is the next row's
    start; padded patches compete; every view has the same budget, rounded down; newlines are gone. mode="corrected",
    the default, has neighbours on the grid alone, chooses among the image's own tokens, and meets `keep` exactly. In
    both modes means are in fp32 (in fp16, as released, hundreds of patches tie), ties go to the lower index, and the
    budget of an image does not depend on the batch.

    HiPrune++ of the paper is left out, because it has no release and its text can be read in two ways: it adds patches
    that resemble the question, a tenth of N, and does not say whether they count within the budget.

    keep       : visual tokens to keep per image, a count or a share
    mode       : "corrected" or "released"
    alpha      : part of the budget for anchors and buffers, if no two of them meet; the paper uses 0.1
    middle     : tower layer of the anchors, counted from 1, or a share of the depth; 9 of 24 in the paper
    neighbours : "grid"; "paper", by index in reading order, those outside the crop left out; "released", moved to the
                 crop's ends. None takes "grid", or "released" with mode="released"
    newline    : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions  : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    pool = "view"
    compares = False

    keep: Keep = 0.111
    mode: str = "corrected"
    alpha: Part = 0.1
    middle: int | float = 0.375
    neighbours: str | None = None
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self)
        self.neighbours = self.neighbours or {"corrected": "grid", "released": "released"}[self.mode]
        check_choices(self, neighbours=("grid", "paper", "released"))
        if self.middle <= 0 or (isinstance(self.middle, float) and self.middle >= 1):
            raise ValueError(f"middle={self.middle}: give a tower layer from 1 on, or a share of the depth in (0, 1)")

    def setup(self, model: Any) -> None:
        """Find the middle layer of this tower."""
        super().setup(model)
        depth = len(encoder_layers(model.model))
        layer = max(1, round(self.middle * depth)) if isinstance(self.middle, float) else self.middle
        if layer > depth:
            raise ValueError(f"middle={self.middle}: the vision tower has {depth} layers; give one of them")
        self.tower_layers = (layer - 1, -2)
        self.cls = int(has_cls(model.model))

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return attention received in both layers, and where tokens stand among those of their crop."""
        middle, late = (image.at_tokens(received_attention(*image.qk(i))[:, self.cls :]) for i in self.tower_layers)
        return middle, late, *to_device(middle.device, dense(image.grid_on_host))

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Rank anchors first, then buffers, then registers."""
        middle, late, grid = read
        anchors = middle.argsort(dim=1, descending=True, stable=True)[:, : round(k * self.alpha / 5)]
        if self.neighbours == "grid":
            near = buffers_on_grid(anchors, grid)
        else:
            near = buffers_by_index(anchors, grid, clamp=self.neighbours == "released")
        first = torch.zeros_like(near).scatter_(1, anchors, True)
        return ranked(first, near & ~first, middle, late)[:, :k]


def buffers_on_grid(anchors: Tensor, grid: Tensor) -> Tensor:
    """Find the neighbours of anchors (b, a) among tokens at places (b, m, 3), up, down, left and right: (b, m) bool."""
    at = grid.gather(1, anchors[..., None].expand(-1, -1, 3))
    step = (grid[:, None] - at[:, :, None]).abs()  # (b, a, m, 3)
    return ((step[..., 0] == 0) & (step[..., 1:].sum(-1) == 1)).any(1)


def buffers_by_index(anchors: Tensor, grid: Tensor, clamp: bool) -> Tensor:
    """Find the tokens one place and one row before and after anchors (b, a) in a crop of m tokens: (b, m) bool.

    With `clamp`, a place outside the crop is moved to the crop's first or last; otherwise it is left out.
    """
    m = grid.shape[1]
    width = grid[..., 2].amax(1)[:, None, None] + 1
    one = torch.ones_like(width)
    index = anchors[..., None] + torch.cat([-width, -one, one, width], dim=2)  # (b, a, 4)
    inside = index.flatten(1).clamp(0, m - 1) if clamp else torch.where((index < 0) | (index >= m), m, index).flatten(1)
    return grid.new_zeros(len(grid), m + 1).scatter_(1, inside, 1)[:, :m].bool()


@full_precision
def ranked(first: Tensor, second: Tensor, middle: Tensor, late: Tensor) -> Tensor:
    """Rank tokens: those of `first` and `second` (b, m) by `middle`, and then the others by `late`: (b, m)."""
    named = first.bool() | second.bool()
    order = torch.where(named, middle, late).argsort(dim=1, descending=True, stable=True)
    kind = 2 - 2 * first.long() - second.long()
    return order.gather(1, kind.gather(1, order).argsort(dim=1, stable=True))
