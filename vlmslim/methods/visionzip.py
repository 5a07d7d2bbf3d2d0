"""VisionZip: "Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025, arXiv 2412.04467)."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressed, ImageTokens, Keep
from vlmslim.engine.families import projects_patches
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection, one_hot, with_padding
from vlmslim.ops.ranking import full_precision, membership


@dataclass
class VisionZip(ScoredSelection):
    """Keep the patches that CLS attends to most, and merge the others into a few.

    Of the T tokens of a crop or frame, C = round(T x contextual) are contextual and the others dominant. Dominant are
    the patches of most attention from CLS. Of the others in reading order, C evenly spaced ones are targets. Every
    further patch joins the target whose key, averaged over heads, has the largest cosine to its own. Merging comes
    before the projector, except on OneVision, which resizes tokens after it, and where a token is made of several
    patches (our extension).

    mode="released" follows the release (commit 3151f6d), for LLaVA-1.5 and LLaVA-NeXT: CLS itself is one of the
    dominant tokens; a contextual token is the target plus the mean of its members, which doubles its norm; padded
    patches compete; every view has the same budget, rounded down; a view sends CLS, dominant and contextual tokens,
    and tiles send dominant ones in the order of the mosaic, then their CLS, then contextual ones. mode="corrected",
    the default, sends no CLS, because projector and language model never saw one; a contextual token is the mean of
    target and members; all tokens come in reading order, at the places of dominant patches and targets. The budget is
    met exactly. In both modes newlines of tiles are gone, and ties go to the lower index.

    keep       : visual tokens to send per image, a count or a share; the paper uses 192, 128 and 64 of 576
    mode       : "corrected" or "released"
    contextual : part of the budget for merged tokens; the paper uses 10 of 64
    score      : attention from CLS ("cls"), mean attention received ("received", as in the paper for towers without
                 CLS), or "auto": "cls" if the tower has CLS
    positions  : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    pool = "view"
    newline = "drop"
    merges = True

    keep: Keep = 0.111
    mode: str = "corrected"
    contextual: float = 10 / 64
    score: str = "auto"

    def __post_init__(self) -> None:
        check_selection(self)
        if not 0 <= self.contextual < 1:
            raise ValueError(f"contextual={self.contextual}: give a part of the budget in [0, 1); the paper's is 10/64")

    def setup(self, model: Any) -> None:
        """Find out whether merging comes before the projector, and the layer whose input has CLS.

        Raises:
            ValueError: mode="released" and the tower has no CLS token.
        """
        super().setup(model)
        if self.mode == "released" and not self.cls:
            raise ValueError("mode='released' sends the CLS token, and this tower has none; use mode='corrected'")
        self.before_projector = model.config.model_type != "llava_onevision" and projects_patches(model.model)
        if not self.before_projector:
            self.substitutes = (*self.substitutes, "late merge")
        self.tower_layers = (*self.tower_layers, -1) if self.mode == "released" else self.tower_layers

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return what merges, keys averaged over heads, and attention."""
        keys = image.at_tokens(image.qk(self.score_layer)[1].float().mean(1)[:, int(self.cls) :])
        return image.tower_tokens if self.before_projector else image.features, keys, self.scores(image)

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress the images one by one."""
        return super().select_images(images) if self.mode == "released" else [self.compress(x) for x in images]

    def compress(self, image: ImageTokens) -> Compressed:
        """Merge within every view, then project."""
        n, k = len(image.features), self.budget(image)
        if k == n:
            return image.pick_all()
        pools = self.pools(image, k)
        parts = [self._zipped(pool, pool.read[0]) for pool in pools]
        features = self._project(torch.cat([x for part in parts for x in part[:2]]), image)
        index = torch.cat([pool.slots[at] for pool, part in zip(pools, parts, strict=True) for at in part[2:]])
        sent = torch.zeros(n, dtype=torch.uint8, device=index.device).index_fill(0, index, 1)
        spare = sent.argsort(stable=True)[: k - len(index)]  # newlines, once all patches are sent
        index, order = torch.cat([index, spare]).sort()
        return Compressed(
            torch.cat([features, image.features[spare]])[order], index, partial(joined, index, pools, parts, n)
        )

    def released(self, image: ImageTokens, k: int) -> Compressed:
        """Merge within every view, padding included, and send CLS tokens too."""
        given = with_padding(image)
        pools = self.pools(given, k)
        parts = [self._zipped(pool, pool.read[0]) for pool in pools]

        def made_of() -> Tensor:
            names = one_hot(image, given).to(image.features.device)
            own = [self._zipped(pool, names[pool.slots]) for pool in pools]
            return released_sequence(names.new_zeros(len(pools), names.shape[1]), pools, own)  # CLS has no patch

        return Compressed(self._project(released_sequence(image.cls, pools, parts), image), made_of=made_of)

    def _zipped(self, pool: Pool, x: Tensor) -> tuple[Tensor, ...]:
        """Compress one view, of whose tokens x (m, v) is merged."""
        _, keys, attention = pool.read
        merged, released = round(pool.k * self.contextual), int(self.mode == "released")
        return zipped(x, self.compared(keys[None])[0][0], attention, pool.k, merged, released)

    def _project(self, x: Tensor, image: ImageTokens) -> Tensor:
        return image.project(x).to(image.features) if self.before_projector else x.to(image.features)


def zipped(x: Tensor, keys: Tensor, attention: Tensor, k: int, merged: int, cls: int) -> tuple[Tensor, ...]:
    """Compress one view to k tokens, or to k - 1 if CLS is one of them.

    Args:
        x: (n, v) patches.
        keys: (n, w) what similarity is measured on.
        attention: (n,).
        k: number of tokens, at most n (+ 1 with CLS).
        merged: number of contextual ones, as far as patches are left.
        cls: 1 if CLS is one of the k. Contextual tokens then are the released sums, otherwise means.

    Returns:
        Dominant tokens (d, v) and contextual ones (c, v), and the patches that they stand at, (d,) and (c,), ascending.
    """
    merged = min(merged, k - cls, len(x) - (k - merged - cls))
    order = attention.argsort(descending=True, stable=True)
    dominant = order[: k - merged - cls].sort().values
    left = order[k - merged - cls :].sort().values
    if not merged:
        return x[dominant], x[:0], dominant, left[:0]
    at = np.arange(len(left))[:: max(1, len(left) // merged)][:merged]
    rest = np.delete(np.arange(len(left)), at)
    target, others = (left[torch.from_numpy(x).to(left.device, non_blocking=True)] for x in (at, rest))
    joins = membership(assigned(keys, others, target), merged).float()
    size = joins.sum(1, keepdim=True)
    with torch.autocast(x.device.type, enabled=False):
        total, own = joins @ x[others].float(), x[target].float()
    contextual = own + total / size.clamp(min=1) if cls else (own + total) / (1 + size)
    return x[dominant], contextual.to(x), dominant, target


def joined(index: Tensor, pools: list[Pool], parts: list[tuple[Tensor, ...]], n: int) -> Tensor:
    """Return the token into which each of an image's n tokens went, as `Compressed.into`.

    Args:
        index: (k,) the places of the tokens that are sent, ascending.
        pools: the views.
        parts: what `zipped` returned for each.
        n: number of tokens of the image.
    """
    place = torch.full((n,), -1, device=index.device)
    place[index] = index
    for pool, (*_, dominant, target) in zip(pools, parts, strict=True):
        if len(target):
            others = torch.ones(len(pool.slots), dtype=torch.bool, device=index.device)
            others = others.index_fill(0, torch.cat([dominant, target]), False).nonzero()[:, 0]
            place[pool.slots[others]] = pool.slots[target[assigned(pool.read[1], others, target)]]
    return torch.where(place < 0, -1, torch.searchsorted(index, place))


@full_precision
def assigned(keys: Tensor, others: Tensor, target: Tensor) -> Tensor:
    """Find the target (c,) of largest cosine, the first on ties, for each of the others (m,): (m,) in 0 .. c-1."""
    unit = F.normalize(keys, dim=-1)
    return (unit[others] @ unit[target].T).argmax(1)


def released_sequence(cls: Tensor, pools: list[Pool], parts: list[tuple[Tensor, ...]]) -> Tensor:
    """Put the views of an image and their CLS tokens (c, v) into the order in which the release sends them: (m, v)."""
    dominant, contextual, at, _ = zip(*parts, strict=True)
    sequence = [cls[:1], dominant[0], contextual[0]]
    if len(pools) > 1:
        slots = torch.cat([pool.slots[own] for pool, own in zip(pools[1:], at[1:], strict=True)])
        sequence += [torch.cat(dominant[1:])[slots.argsort()], cls[1:], *contextual[1:]]
    return torch.cat(sequence)
