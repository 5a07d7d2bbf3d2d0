"""TokenCorr: "Token-level Correlation-guided Compression for ... Document Understanding" (arXiv 2407.14439)."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_choices, check_keep, resolve_keep
from vlmslim.engine.families import encoder_layers, has_cls
from vlmslim.ops.attention import cls_attention, received_attention
from vlmslim.ops.newlines import NEWLINES, closing_newline, spend
from vlmslim.ops.outliers import beyond_quartiles
from vlmslim.ops.selection import full_precision


@dataclass
class View:
    """What decides about one crop (or frame) of m tokens.

    at     : (m,) its tokens among the image's
    keys   : (m, v) its patches' keys at the low layer, all heads side by side
    repeat : (m,) similarity that a patch's look-alikes must exceed for it not to be redundant; see `repetition`
    low    : (m,) attention of the low layer
    deep   : (m,) attention of the deep layer
    draw   : (m,) score by which patches are sampled
    iqr    : factor of the outlier rule

    All but `keys` lie on the CPU.
    """

    at: Tensor
    keys: Tensor
    repeat: Tensor
    low: Tensor
    deep: Tensor
    draw: Tensor
    iqr: float

    @cached_property
    def ranked(self) -> Tensor:
        """(m,) positions in this view, in the order in which they are sampled."""
        return self.draw.argsort(descending=True, stable=True)

    @cached_property
    def outlier(self) -> Tensor:
        """(m,) bool: the deep layer's outliers."""
        return beyond_quartiles(self.deep, self.iqr)

    def samples(self, alpha: float) -> int:
        """How many patches are sampled: those that are not redundant, but never none."""
        return max(1, int((self.repeat <= alpha).sum()))

    def keep(self, alpha: float) -> Tensor:
        """(m,) bool: samples and outliers."""
        kept = self.outlier.clone()
        kept[self.ranked[: self.samples(alpha)]] = True
        return kept


@dataclass
class TokenCorr(Compressor):
    """Sample as many patches of each crop as are not repeated in it, and add those that stand out in a deep layer.

    A patch is redundant when more than a share `beta` of its crop's other patches have keys, at a low layer of the
    tower, that are more similar to its own than `alpha`. As many patches as are not redundant are sampled by the low
    layer's CLS attention; outliers of a deep layer's CLS attention join them; kept patches take in similar dropped
    ones before the projector. The count follows from the page, unless `keep` sets it.

    There is no release. Where the paper's public material leaves things open this follows the project's reading:
    `beta` is a share, keys are compared with all heads side by side, redundant patches may still be sampled, and
    what is dropped is merged by normalised weights. Padding is left out before anything is counted. A dropped patch is
    merged once (`merge="assign"`): with "knn" the same few patches are mixed into many kept ones, which a model that
    was not fine-tuned for it cannot read (docs/methods.md has figures).

    `alpha` depends on the tower; `vlmslim.methods.tokencorr.calibration.calibrate` finds it, and so does
    `scripts/calibrate_tokencorr.py`. With the wanted `keep` of an image instead, the sampling goes on from the least
    repeated patches to the most repeated ones over all crops, until outliers, samples and newlines make exactly
    `keep`: crops still share it by their density, and `alpha` is not used.

    Towers without CLS (SigLIP) use the attention that a patch receives, on average over all queries. The frames of a
    video are treated as crops, their keys and attention pooled as the model pools the frame. Tokens which are pooled
    or resized after the projector (videos, very large OneVision images) merge after it too.

    keep       : None, or visual tokens to keep per image, a count or a share, newlines included
    alpha      : key similarity beyond which two patches are alike
    beta       : share of look-alikes beyond which a patch is redundant
    low, deep  : tower layers, a number or a share of the depth; deep=None is the layer whose output is used
    iqr        : a deep outlier lies more than this many interquartile ranges above the third quartile
    sampling   : "topk" (deterministic) or "multinomial", the paper's draw: without replacement, from `seed` and pixels
    merge      : "assign": a dropped patch goes to its most similar kept one; "knn": a kept patch takes in its
                 `neighbours` most similar dropped ones; "none"
    thumbnail  : "keep" it whole as the paper does, "compress" it like a crop, or "auto": keep it, unless it is the
                 only view or `keep` is set
    newline    : as for GlobalCom2
    positions  : "renumbered" or "original" rotary positions
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
    positions: str = "renumbered"

    def __post_init__(self):
        if self.keep is not None:
            check_keep(self.keep)
        check_choices(
            self,
            sampling=("topk", "multinomial"),
            merge=("knn", "assign", "none"),
            thumbnail=("auto", "keep", "compress"),
            newline=NEWLINES,
        )
        if not -1 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: a cosine similarity lies in [-1, 1]")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta={self.beta}: a share of a crop's patches lies in [0, 1)")
        for name in ("low", "deep"):
            layer = getattr(self, name)
            if isinstance(layer, bool) or isinstance(layer, float) and not 0 <= layer <= 1:
                raise ValueError(f"{name}={layer}: give a tower layer (2) or a share of the tower's depth (0.08)")
        if self.iqr < 0:
            raise ValueError(f"iqr={self.iqr}: it cannot be negative; the usual factor is 1.5")
        if self.neighbours < 1:
            raise ValueError(f"neighbours={self.neighbours}: use at least 1, or merge='none'")

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """The low and the deep layer, once `setup` knows the tower."""
        return tuple({x for x in (self.low, self.deep) if isinstance(x, int)})

    def setup(self, model: nn.Module) -> None:
        """Find the layers and the projector."""
        depth = len(encoder_layers(model.model))
        if self.deep is None:
            used = model.config.vision_feature_layer
            used = used if isinstance(used, int) else used[-1]
            self.deep = used if used < 0 else max(0, used - 1)  # hidden state i is the output of layer i - 1
        self.low, self.deep = (
            min(depth - 1, round(x * depth)) if isinstance(x, float) else x for x in (self.low, self.deep)
        )
        self._cls = has_cls(model.model)
        self._project = model.model.multi_modal_projector

    def compress(self, image: ImageTokens) -> Compressed:
        """Score on the device, decide on the CPU, merge on the device."""
        n, device = len(image.features), image.features.device
        if self.keep is not None and resolve_keep(self.keep, n) == n:
            return image.pick(torch.arange(n, device=device))
        grid, views = image.grid.cpu(), self.views(image)
        if self.keep is None:
            index = self._decided(grid, views, image.tiles)
        else:
            index = self._ranked(grid, views, image.tiles, resolve_keep(self.keep, n))
        features = image.features
        if self.merge != "none":
            features = self._merged(image, views, index)
        index = index.to(device)
        return Compressed(features[index], index)

    def views(self, image: ImageTokens) -> list[View]:
        """What decides about each crop that is to be compressed."""
        grid, grid_cpu = image.grid, image.grid.cpu()
        low_keys, *attention = _maps(image, self.low, self.deep, self._cls)
        noise = None
        if self.sampling == "multinomial":
            noise = torch.rand(len(grid), generator=image.generator(self.seed), dtype=torch.float64)
        beside_crops = self.thumbnail == "auto" and self.keep is None and image.tiles[1] > 0
        spared = not image.video and (self.thumbnail == "keep" or beside_crops)
        views = []
        for crop in range(1 if spared else 0, int(grid_cpu[:, 0].max()) + 1):
            at = ((grid_cpu[:, 0] == crop) & (grid_cpu[:, 1] >= 0)).nonzero()[:, 0]
            if not len(at):
                continue  # padding altogether
            row, column = grid[at.to(grid.device), 1:].unbind(1)
            keys = low_keys[crop][row, column]
            low, deep = (x[crop][row, column].cpu() for x in attention)
            repeat = repetition(keys, int(self.beta * len(at))).cpu()
            draw = low if noise is None else gumbel(low, noise[at])
            views.append(View(at, keys, repeat, low, deep, draw, self.iqr))
        return views

    def _decided(self, grid: Tensor, views: list[View], tiles: tuple[int, int]) -> Tensor:
        """The tokens that the page's density asks for, ascending."""
        keep = torch.ones(len(grid), dtype=torch.bool)
        for view in views:
            keep[view.at] = view.keep(self.alpha)
        newline = grid[:, 0] < 0
        if self.newline != "all":
            keep &= ~newline
        if self.newline == "rows":
            closing = closing_newline(grid, tiles)
            keep[closing[keep & (closing >= 0)]] = True
        return keep.nonzero()[:, 0]

    def _ranked(self, grid: Tensor, views: list[View], tiles: tuple[int, int], k: int) -> Tensor:
        """The k tokens that are kept when the sampling stops at k, ascending."""
        rest = grid[:, 1] >= 0  # patches that no view decides about come first: a thumbnail to be kept whole
        for view in views:
            rest[view.at] = False
        first = rest.nonzero()[:, 0]
        if k <= len(first):
            raise ValueError(
                f"keep={k} leaves no room for crops beside the thumbnail's {len(first)} tokens; "
                "keep more, or use thumbnail='compress'"
            )
        order = torch.cat([first, by_novelty(views)])
        return spend(order, grid, tiles, k, self.newline).sort().values

    def _merged(self, image: ImageTokens, views: list[View], index: Tensor) -> Tensor:
        """The image's features (n, d) with those of the kept patches replaced."""
        device = image.features.device
        kept = torch.zeros(len(image.features), dtype=torch.bool)
        kept[index] = True
        grid = image.grid
        before = _one_patch_each(image)
        places, merged = [], []
        for view in views:
            keep = kept[view.at]
            if keep.all() or not keep.any():
                continue
            at = view.at.to(device)
            if before:
                crop, row, column = grid[at].unbind(1)
                offset = image.tower.shape[1] - image.side**2  # a CLS token among the features
                x = image.tower[crop, offset + row * image.side + column]
            else:
                x = image.features[at]
            merged.append(absorb(x, view.keys, view.low.to(device), keep.to(device), self.merge, self.neighbours))
            places.append(at[keep.to(device)])
        if not merged:
            return image.features
        y = torch.cat(merged)
        if before:
            y = self._project(y.to(image.tower.dtype))
        return image.features.index_copy(0, torch.cat(places), y.to(image.features))


# -- scores -----------------------------------------------------------------------------------------------------------


def _maps(image: ImageTokens, low: int, deep: int, cls: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Low keys (c, side, side, v), low and deep attention (c, side, side), on the grid of the image's tokens."""
    found = []
    for layer in dict.fromkeys((low, deep)):
        q, k = image.qk(layer)
        if layer == low:
            found.append(k[:, :, int(cls) :].transpose(1, 2).flatten(2).unflatten(1, (image.side, image.side)))
        found.append((cls_attention if cls else received_attention)(q, k).unflatten(1, (image.side, image.side)))
    keys, *attention = found if low != deep else [*found, found[-1]]
    if image.video:
        side = int(image.grid[:, 1].max()) + 1  # frames are pooled
        keys = _pooled(keys.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1)
        attention = [_pooled(x[:, None], side)[:, 0] for x in attention]
    return keys, *attention


def _pooled(x: Tensor, side: int) -> Tensor:
    return x if x.shape[-1] == side else F.interpolate(x.float(), size=(side, side), mode="bilinear")


def _one_patch_each(image: ImageTokens) -> bool:
    """Whether every token is the projection of one patch: not after pooling or resizing, which leaves gaps."""
    if image.video:
        return False
    component, row, column = image.mosaic.unbind(1)
    tiled = component == 1
    if not image.tiles[1] or not tiled.any():
        return True
    row, column = row[tiled], column[tiled]
    return bool((row.max() - row.min() + 1) * (column.max() - column.min() + 1) == tiled.sum())


@full_precision
def repetition(keys: Tensor, limit: int) -> Tensor:
    """The similarity below which a patch has more than `limit` look-alikes.

    A patch has more than `limit` others more similar to it than alpha exactly when the one in place `limit` + 1 is.
    So this one number decides whether the patch is redundant, for every alpha: it is when the number exceeds alpha.

    Args:
        keys: (m, v).
        limit: how many look-alikes a patch may have.

    Returns:
        (m,) cosines; -inf where there are not that many others.
    """
    m = len(keys)
    if limit >= m - 1:
        return keys.new_full((m,), -torch.inf)
    keys = F.normalize(keys, dim=-1)
    similarity = (keys @ keys.T).clamp(max=1).fill_diagonal_(-torch.inf)
    return similarity.topk(limit + 1).values[:, -1]


def gumbel(p: Tensor, u: Tensor) -> Tensor:
    """Scores whose m largest are a draw of m without replacement from `p` (m,), given uniform noise `u` (m,)."""
    return p.double().log() - (-u.double().log()).log()


# -- selection --------------------------------------------------------------------------------------------------------


def by_novelty(views: list[View]) -> Tensor:
    """Tokens of all views in the order in which they come in as alpha rises; deep outliers first.

    Alpha at the r-th smallest `repeat` of a view makes room there for r samples, so that is where the r-th sample
    is due.
    """
    if not views:
        return torch.empty(0, dtype=torch.long)
    ranked = [(v.at[v.ranked], v.repeat.sort().values, v.outlier[v.ranked], v.deep[v.ranked]) for v in views]
    at, due, outlier, deep = map(torch.cat, zip(*ranked, strict=True))
    first = at[outlier][deep[outlier].argsort(descending=True, stable=True)]
    return torch.cat([first, at[~outlier][due[~outlier].argsort(stable=True)]])


def absorb(x: Tensor, keys: Tensor, weight: Tensor, keep: Tensor, merge: str = "knn", neighbours: int = 32) -> Tensor:
    """Let kept patches take in similar dropped ones: weighted means, in fp32.

    Args:
        x: (m, v) features; gradients pass.
        keys: (m, w) by whose cosine patches are similar.
        weight: (m,) positive.
        keep: (m,) bool, neither all nor none.
        merge: "knn" or "assign".
        neighbours: of each kept patch for "knn"; a dropped patch may go to several kept ones.

    Returns:
        (kept, v) in fp32.
    """
    with torch.autocast(x.device.type, enabled=False):
        with torch.no_grad():
            keys = F.normalize(keys.float(), dim=-1)
            similarity = keys[keep] @ keys[~keep].T  # (kept, dropped)
            taken = torch.zeros_like(similarity)
            if merge == "knn":
                nearest = similarity.sort(dim=1, descending=True, stable=True).indices[:, :neighbours]
                taken.scatter_(1, nearest, 1)
            else:
                taken.scatter_(0, similarity.sort(dim=0, descending=True, stable=True).indices[:1], 1)
            weight = weight.float().clamp(min=torch.finfo(torch.float32).tiny)  # a softmax may underflow
            own, share = weight[keep][:, None], taken * weight[~keep]
            total = own + share.sum(1, keepdim=True)
        return (own * x[keep].float() + share @ x[~keep].float()) / total
