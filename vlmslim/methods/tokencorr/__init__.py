"""TokenCorr: "Token-level Correlation-guided Compression for Efficient Multimodal Document Understanding".

arXiv 2407.14439.
"""

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import (
    Compressed,
    Compressor,
    ImageTokens,
    Keep,
    check_choices,
    check_keep,
    resolve_keep,
    settle_positions,
)
from vlmslim.engine.families import encoder_layers, feature_layers, has_cls
from vlmslim.engine.layout import to_device
from vlmslim.ops.attention import cls_attention, received_attention
from vlmslim.ops.newlines import NEWLINES, fill_budget, row_end_newline
from vlmslim.ops.ranking import full_precision


@dataclass
class View:
    """The scores of one crop (or frame) of m patches.

    slots  : (m,) where its patches are among the image's tokens
    keys   : (m, v) keys of the low layer, all heads side by side
    repeat : (m,) see `repetition`: a patch is redundant at every alpha below this similarity
    low    : (m,) attention of the low layer
    deep   : (m,) attention of the deep layer
    draw   : (m,) score by which patches are sampled
    iqr    : factor of the outlier rule
    """

    slots: Tensor
    keys: Tensor
    repeat: Tensor
    low: Tensor
    deep: Tensor
    draw: Tensor
    iqr: float

    @cached_property
    def ranked(self) -> Tensor:
        """(m,) patches of this view in the order in which they are sampled."""
        return self.draw.argsort(descending=True, stable=True)

    @cached_property
    def outlier(self) -> Tensor:
        """(m,) bool, True at the deep layer's outliers."""
        return beyond_quartiles(self.deep, self.iqr)

    def samples(self, alpha: float) -> int:
        """Count the patches to sample: those that are not redundant, but at least one."""
        return max(1, int((self.repeat <= alpha).sum()))

    def keep(self, alpha: float) -> Tensor:
        """Mark the samples and the outliers, (m,) bool."""
        kept = self.outlier.clone()
        kept[self.ranked[: self.samples(alpha)]] = True
        return kept


@dataclass
class TokenCorr(Compressor):
    """Sample as many patches of each crop as are not redundant in it, and add those that stand out in a deep layer.

    A patch is redundant if more than a share `beta` of its crop's other patches have keys, at a low layer of the
    tower, that are more similar to its own than `alpha`. As many patches as are not redundant are sampled, by the low
    layer's CLS attention. Outliers of a deep layer's CLS attention are added. Before the projector, kept patches take
    in similar dropped ones. How many are kept follows from the page, unless `keep` sets it.

    There is no release. Where the paper's public material leaves things open, this is our reading: `beta` is a share;
    keys are compared with all heads side by side; redundant patches may still be sampled; dropped patches are merged
    by normalised weights; padding is left out before anything is counted. A dropped patch is merged once
    (`merge="assign"`), because with "knn" the same few patches are mixed into many kept ones, which a model that was
    not fine-tuned for it cannot read (docs/methods.md has figures).

    `alpha` depends on the tower. `scripts/calibrate_tokencorr.py` finds it, and in Python
    `vlmslim.methods.tokencorr.calibration.calibrate` does. With `keep`, `alpha` is not used: sampling continues from
    the least repeated to the most repeated patches of all crops, until outliers, samples and newlines make exactly
    `keep`. So crops still share the budget by their density.

    Towers without CLS (SigLIP) use the attention that a patch receives, averaged over all queries. The frames of a
    video are treated as crops; their keys and attention are pooled as the model pools the frames. Tokens that the
    model pools or resizes after the projector (videos, very large OneVision images) are merged after it too.

    keep       : None, or visual tokens to keep per image, a count or a share, newlines included
    alpha      : key similarity above which two patches are alike
    beta       : share of alike patches above which a patch is redundant
    low, deep  : tower layers, a number or a share of the depth; deep=None is the layer whose output the model uses
    iqr        : a deep outlier lies more than this many interquartile ranges above the third quartile
    sampling   : "topk" (deterministic), or "multinomial", the paper's draw without replacement, from seed and pixels
    merge      : "assign": a dropped patch goes to its most similar kept patch; "knn": a kept patch takes in its
                 `neighbours` most similar dropped patches; "none"
    neighbours : of each kept patch, for merge="knn"
    thumbnail  : "keep" it whole as the paper does, "compress" it like a crop, or "auto": keep it, unless it is the
                 only view or `keep` is set
    newline    : "rows" keeps the newline of each row that keeps a token, "all" keeps every newline, "drop" none
    seed       : seed of the draw
    positions  : rotary positions: "auto", "original" or "renumbered"
    """

    keep: Keep | None = None
    alpha: float = 0.8
    beta: float = 0.05
    low: int | float = 0.08
    deep: int | float | None = None
    iqr: float = 1.5
    sampling: str = "topk"
    merge: str = "assign"
    neighbours: int = 32
    thumbnail: str = "auto"
    newline: str = "rows"
    seed: int = 0
    positions: str = "auto"

    needs_patches: ClassVar = True

    def __post_init__(self) -> None:
        if self.keep is not None:
            check_keep(self.keep)
        settle_positions(self)
        check_choices(
            self,
            sampling=("topk", "multinomial"),
            merge=("knn", "assign", "none"),
            thumbnail=("auto", "keep", "compress"),
            newline=NEWLINES,
        )
        if not -1 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: give a cosine similarity in [-1, 1]")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta}: give a share of a crop's patches in [0, 1)")
        for name in ("low", "deep"):
            layer = getattr(self, name)
            if isinstance(layer, float) and not 0 <= layer <= 1:
                raise ValueError(f"{name}={layer}: give a tower layer (2) or a share of the tower's depth (0.08)")
        if self.iqr < 0:
            raise ValueError(f"iqr={self.iqr}: give a number from 0 on; the usual factor is 1.5")
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours}: give at least 1, or use merge='none'")
        if self.keep is None:
            self.reads_back = "repetition decides how many patches stay"

    def setup(self, model: Any) -> None:
        """Find the tower's layers."""
        deep = self.deep
        if deep is None:
            used = (feature_layers(model.config) or (-1,))[-1]
            deep = used if used < 0 else max(0, used - 1)  # hidden state i is the output of layer i - 1
        depth = len(encoder_layers(model.model))
        self.low_layer, self.deep_layer = _tower_layer(self.low, depth), _tower_layer(deep, depth)
        self.tower_layers = tuple({self.low_layer, self.deep_layer})
        self.cls = has_cls(model.model)
        self.substitutes = () if self.cls else ("received",)

    def compress(self, image: ImageTokens) -> Compressed:
        """Score, sample and merge on the device."""
        n = len(image.features)
        k = None if self.keep is None else resolve_keep(self.keep, n)
        if k == n:
            return image.pick_all()
        views = self.views(image)
        index = self._by_density(image, views) if k is None else self._by_rank(image, views, k)
        if self.merge == "none" or not views:
            return image.pick(index)
        made_of = partial(self._made_of, n, views, index)
        return Compressed(self._merged(image, views, index), index, made_of=made_of)

    def views(self, image: ImageTokens) -> list[View]:
        """Score each crop that is to be compressed."""
        grid, device = image.grid_on_host, image.features.device
        low_keys, *attention = self._maps(image)
        noise = None
        if self.sampling == "multinomial":
            noise = image.uniform(self.seed, len(grid))
        views = []
        for crop in range(self._spares_thumbnail(image), int(grid[:, 0].max()) + 1):
            places = np.flatnonzero((grid[:, 0] == crop) & (grid[:, 1] >= 0))
            if not len(places):
                continue  # the crop consists of padding
            slots, row, column = to_device(device, places, *grid[places, 1:].T)
            keys = low_keys[crop][row, column]
            low, deep = (x[crop][row, column] for x in attention)
            repeat = repetition(keys, int(self.beta * len(places)))
            draw = low if noise is None else gumbel(low, noise[slots])
            views.append(View(slots, keys, repeat, low, deep, draw, self.iqr))
        return views

    def _spares_thumbnail(self, image: ImageTokens) -> bool:
        """Tell whether crop 0 is kept whole."""
        beside_crops = self.thumbnail == "auto" and self.keep is None and image.tiles[1] > 0
        return not image.video and (self.thumbnail == "keep" or beside_crops)

    def _maps(self, image: ImageTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return low keys (c, side, side, v), low and deep attention (c, side, side), on the grid of the tokens."""
        patch_grid = (image.side, image.side)
        attention_of = cls_attention if self.cls else received_attention
        q, k = image.qk(self.low_layer)
        keys = k[:, :, int(self.cls) :].transpose(1, 2).flatten(2).unflatten(1, patch_grid)
        low = deep = attention_of(q, k).unflatten(1, patch_grid)
        if self.deep_layer != self.low_layer:
            deep = attention_of(*image.qk(self.deep_layer)).unflatten(1, patch_grid)
        if image.video:  # the model pools frames
            side = int(image.grid_on_host[:, 1].max()) + 1
            keys = _resized(keys.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
            low, deep = (_resized(x[:, None], side)[:, 0] for x in (low, deep))
        return keys, low, deep

    def _by_density(self, image: ImageTokens, views: list[View]) -> Tensor:
        """Return the tokens that the page's density asks for, ascending."""
        newline = image.grid[:, 0] < 0
        keep = torch.ones_like(newline)
        for view in views:
            keep[view.slots] = view.keep(self.alpha)
        if self.newline != "all":
            keep &= ~newline
        if self.newline == "rows":
            (end,) = to_device(keep.device, row_end_newline(image.grid_on_host, image.tiles))
            keep[end[keep & (end >= 0)]] = True
        return keep.nonzero()[:, 0]

    def _by_rank(self, image: ImageTokens, views: list[View], k: int) -> Tensor:
        """Return the k tokens that are kept when sampling stops at k, ascending."""
        grid = image.grid_on_host
        whole = np.flatnonzero((grid[:, 0] == 0) & (grid[:, 1] >= 0) & self._spares_thumbnail(image))
        if k <= len(whole):
            raise ValueError(
                f"keep={k} leaves no room for crops beside the thumbnail's {len(whole)} tokens; "
                "keep more, or use thumbnail='compress'"
            )
        first = to_device(image.features.device, whole)
        order = torch.cat([*first, by_novelty(views)]) if views else first[0]
        return fill_budget(order, grid, image.tiles, k, self.newline).sort().values

    def _merged(self, image: ImageTokens, views: list[View], index: Tensor) -> Tensor:
        """Return the image's tokens at `index` (k,), which have taken in dropped ones: (k, d)."""
        features = image.features
        kept = torch.zeros(len(features), dtype=torch.bool, device=features.device).index_fill(0, index, True)
        before_projector = _one_patch_each(image)
        own = image.tower_tokens if before_projector else features
        slots = torch.cat([view.slots for view in views])
        how = (self.merge, self.neighbours, len(index))
        merged = [absorb(own[view.slots], view.keys, view.low, kept[view.slots], *how) for view in views]
        takes = [(~kept[v.slots]).any().expand(len(v.slots)) for v in views]  # else its tokens stay as they are
        y = own.float().index_copy(0, slots, torch.cat(merged))[index]
        changed = torch.zeros_like(kept).index_copy(0, slots, torch.cat(takes))[index]
        if before_projector:
            y = image.project(y)
        return torch.where(changed[:, None], y.to(features), features[index])

    def _made_of(self, n: int, views: list[View], index: Tensor) -> Tensor:
        """Return how much of each of the image's n tokens is in each kept one, as `Compressed.made_of`."""
        weights = torch.eye(n, device=index.device)
        kept = torch.zeros(n, dtype=torch.bool, device=index.device).index_fill(0, index, True)
        for view in views:
            own = torch.eye(len(view.slots), device=index.device)
            taken = absorb(own, view.keys, view.low, kept[view.slots], self.merge, self.neighbours, len(index))
            weights[view.slots] = weights.new_zeros(len(own), n).index_copy(1, view.slots, taken)
        return weights[index]


def _tower_layer(layer: int | float, depth: int) -> int:
    return min(depth - 1, round(layer * depth)) if isinstance(layer, float) else layer


def _resized(x: Tensor, side: int) -> Tensor:
    return x if x.shape[-1] == side else F.interpolate(x.float(), size=(side, side), mode="bilinear")


def _one_patch_each(image: ImageTokens) -> bool:
    """Tell whether every token is the projection of one patch, so that the model neither pooled nor resized.

    Resizing a mosaic to fewer tokens leaves gaps in its coordinates.
    """
    if image.video:
        return False
    component, row, column = image.mosaic_on_host.T
    tiled = component == 1
    if not image.tiles[1] or not tiled.any():
        return True
    row, column = row[tiled], column[tiled]
    return bool((row.max() - row.min() + 1) * (column.max() - column.min() + 1) == tiled.sum())


# --- scores ----------------------------------------------------------------------------------------------------------


@full_precision
def repetition(keys: Tensor, limit: int) -> Tensor:
    """Compute, for each patch, the similarity below which it has more than `limit` alike patches.

    A patch has more than `limit` others that are more similar to it than alpha exactly if the one in place
    `limit` + 1 is. So one number decides for every alpha: the patch is redundant if the number exceeds alpha.

    Args:
        keys: (m, v).
        limit: how many alike patches a patch may have.

    Returns:
        (m,) cosines; -inf where there are not that many others.
    """
    m = len(keys)
    if limit >= m - 1:
        return keys.new_full((m,), -torch.inf)
    keys = F.normalize(keys, dim=-1)
    similarity = (keys @ keys.T).clamp(max=1).fill_diagonal_(-torch.inf)
    return similarity.topk(limit + 1).values[:, -1]


def beyond_quartiles(x: Tensor, factor: float = 1.5) -> Tensor:
    """Mark the numbers x (m,) that lie more than `factor` interquartile ranges above the third quartile: (m,) bool."""
    low, high = (x.double().quantile(share) for share in (0.25, 0.75))
    return x > high + factor * (high - low)


def gumbel(p: Tensor, u: Tensor) -> Tensor:
    """Compute scores whose m largest are a draw of m without replacement from p (m,), by uniform noise u (m,)."""
    return p.double().log() - (-u.double().log()).log()


# --- selection -------------------------------------------------------------------------------------------------------


def by_novelty(views: list[View]) -> Tensor:
    """Rank the patches of all views: deep outliers first, then in the order in which they come in as alpha rises.

    When alpha reaches the r-th smallest `repeat` of a view, that view samples r patches. So this is when its r-th
    sample comes in.

    Returns:
        (t,) tokens of the image.
    """
    ranked = [(v.slots[v.ranked], v.repeat.sort().values, v.outlier[v.ranked], v.deep[v.ranked]) for v in views]
    slots, due, outlier, deep = map(torch.cat, zip(*ranked, strict=True))
    order = torch.where(outlier, -deep, due).argsort(stable=True)
    return slots[order[(~outlier[order]).byte().argsort(stable=True)]]


def absorb(
    x: Tensor,
    keys: Tensor,
    weight: Tensor,
    keep: Tensor,
    merge: str = "knn",
    neighbours: int = 32,
    most: int | None = None,
) -> Tensor:
    """Let kept patches take in similar dropped ones: weighted means, in fp32.

    Args:
        x: (m, v) features; gradients pass.
        keys: (m, w), by whose cosine patches are similar.
        weight: (m,) positive.
        keep: (m,) bool.
        merge: "knn" or "assign", as in `TokenCorr`.
        neighbours: of each kept patch for "knn"; several kept patches may take in the same dropped patch.
        most: no more patches than this are kept, which saves the work of the others; None if the number is unknown.

    Returns:
        (m, v) in fp32, of which the rows of kept patches count.
    """
    with torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            rows = keep.byte().argsort(descending=True, stable=True)[:most]  # those that are kept come first
            keys = F.normalize(keys.float(), dim=-1)
            pairs = keep[rows][:, None] & ~keep  # (r, m) a kept patch in the row, a dropped one in the column
            similarity = (keys[rows] @ keys.T).masked_fill(~pairs, -torch.inf)
            taken = torch.zeros_like(similarity)
            if merge == "knn":
                nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, :neighbours]
                taken.scatter_(1, nearest, 1)
            else:
                taken.scatter_(0, similarity.sort(dim=0, descending=True, stable=True).indices[:1], 1)
            weight = weight.float().clamp(min=torch.finfo(torch.float32).tiny)  # a softmax may underflow
            share = taken * pairs * weight
            own = weight[rows, None]
            total = own + share.sum(1, keepdim=True)
        x = x.float()
        return x.index_copy(0, rows, (own * x[rows] + share @ x) / total)
