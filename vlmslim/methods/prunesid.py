"""PruneSID: "Prune Redundancy, Preserve Essence" (ICLR 2026, arXiv 2603.09480)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressed, ImageTokens, Keep, resolve_keep
from vlmslim.engine.families import has_cls
from vlmslim.methods._selection import Pool, ScoredSelection, Selection, check_selection, one_hot, with_padding
from vlmslim.ops.ranking import full_precision


@dataclass
class PruneSID(ScoredSelection):
    """Group patches by principal components; suppress near-copies within a group; share the budget by what is left.

    In each crop or frame with a budget T, of n patches:

    1. Each patch joins the one of T / 4 components on which its loading is largest. Patches are the variables of the
       analysis, and its samples are the channels of their sigmoids.
    2. In each group the patches are taken by falling score. A patch with a cosine above T / 32 x (mean cosine of all
       pairs) to one taken before is suppressed.
    3. A group keeps one patch at least, and up to 5 ceil(T / 64); the rest goes by the numbers of patches that were
       not suppressed. Groups whose budget exceeds those get suppressed patches back.

    The score is attention from CLS, as in the release; on towers without CLS it is the loading, as in the paper.

    mode="released" follows the release (commit 4ef17d9), for LLaVA-1.5 and LLaVA-NeXT, with these faults: components
    are approximated from a random start, so that the kept tokens change from run to run (here the start depends on
    `seed` and pixels); CLS counts as one of the T and comes first; patches come group by group, and those of a tile
    are shuffled over each other's places; padded patches compete; every view has the same budget, rounded down.
    mode="corrected", the default, has exact components, no CLS, reading order, true places, and meets `keep` exactly.
    In both modes the shares are whole numbers rounded half to even, and ties go to the lower index or group.

    keep      : visual tokens to keep per image, a count or a share
    mode      : "corrected" or "released"
    score     : attention from CLS ("cls"), "loading", or "auto": "cls" if the tower has CLS
    seed      : of the random start of mode="released"
    newline   : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    reads_back = "patches are suppressed one after the other on the host"

    pool = "view"
    compares = False  # its threshold is a multiple of the mean cosine, which centring takes away

    keep: Keep = 0.111
    mode: str = "corrected"
    score: str = "auto"
    seed: int = 0
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self, score=("auto", "cls", "loading"))

    def setup(self, model: Any) -> None:
        """Choose the score for this tower.

        Raises:
            ValueError: the tower has no CLS token and the score or the mode needs one.
        """
        Selection.setup(self, model)
        if not (cls := has_cls(model.model)) and (self.score == "cls" or self.mode == "released"):
            raise ValueError(
                "score='cls' and mode='released' need a CLS token, and this tower has none; use score='loading'"
            )
        if self.score == "auto":
            self.score = "cls" if cls else "loading"
            self.substitutes = () if cls else ("loading",)
        self.tower_layers = (-2,) * (self.score == "cls") + (-1,) * (self.mode == "released")

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int | None:
        """Return the budget; the release sends CLS and at least one patch of every view."""
        k = super().count(n, tiles, size)
        return k if k is None or self.mode != "released" or k == n else max(k, 2 * (1 + math.prod(tiles)))

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return the tower's features, and attention."""
        return (image.tower_tokens, self.scores(image)) if self.score == "cls" else (image.tower_tokens,)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Keep what the groups are given; the highest scores first, because newlines may take the last places."""
        orders = []
        for each in zip(*read, strict=True):
            weight = loadings(each[0], max(1, k // 4))
            score = each[1] if self.score == "cls" else weight.amax(1)
            order = choose(each[0], weight, score, k, k)
            orders.append(order[score[order].argsort(descending=True, stable=True)])
        return torch.stack(orders)

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress the images of a forward."""
        return super().select_images(images) if self.mode == "corrected" else [self._released(x) for x in images]

    def _released(self, image: ImageTokens) -> Compressed:
        n = len(image.features)
        if (k := resolve_keep(self.keep, n)) == n:
            return image.pick(torch.arange(n, device=image.features.device))
        given = with_padding(image) if image.tiles[1] else image
        pools = self.pools(given, k)
        generator, orders = image.generator(self.seed), []
        for pool in pools:
            x, q = pool.read[0], max(1, pool.k // 4)
            weight = loadings(x, q, torch.randn(min(x.shape), q, generator=generator).to(x.device))
            score = pool.read[1] if self.score == "cls" else weight.amax(1)
            orders.append(choose(x, weight, score, pool.k, pool.k - 1))
        x = released_sequence(image.cls, [pool.read[0] for pool in pools], [pool.slots for pool in pools], orders)

        def made_of() -> Tensor:
            names = one_hot(image, given)
            own = [names[pool.slots.cpu()] for pool in pools]
            chosen = [order.cpu() for order in orders]
            none = names.new_zeros(len(pools), n)  # the CLS tokens
            return released_sequence(none, own, [pool.slots.cpu() for pool in pools], chosen)

        return Compressed(image.project(x).to(image.features), made_of=made_of)


@full_precision
def loadings(x: Tensor, q: int, start: Tensor | None = None) -> Tensor:
    """Compute how strongly each patch loads on each of the first q principal components.

    Args:
        x: (n, d) patches.
        q: number of components; at most n count.
        start: (min(n, d), q) of two subspace iterations, as released; None for exact components.

    Returns:
        (n, q) not negative.
    """
    sample = torch.sigmoid(x)
    sample = sample - sample.mean(1, keepdim=True)
    if start is None:
        vectors = torch.linalg.eigh(sample.double() @ sample.double().T)[1].flip(1)  # the largest first
        return vectors[:, :q].abs().to(x)
    wide = sample.T if x.shape[1] >= len(x) else sample  # (d, n), or (n, d) if that is taller
    basis = torch.linalg.qr(wide @ start)[0]
    for _ in range(2):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    left, _, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    return (right.T if wide.shape[1] == len(x) else basis @ left).abs()


@full_precision
def choose(x: Tensor, weight: Tensor, score: Tensor, k: int, budget: int, threshold: float | None = None) -> Tensor:
    """Choose patches group by group.

    Args:
        x: (n, d) patches, compared by cosine.
        weight: (n, q) their loadings.
        score: (n,) what decides within a group.
        k: T, on which threshold and limits depend.
        budget: number of patches to choose.
        threshold: cosine above which a patch is suppressed; None for T / 32 times the mean of all pairs.

    Returns:
        (budget,) indices: the groups in order, of each those not suppressed first, by score.
    """
    n, unit, group = len(x), F.normalize(x, dim=-1, eps=1e-12), weight.argmax(1)
    similarity = unit @ unit.T
    if threshold is None:
        threshold = k / 32 * similarity.triu(1).sum().item() / max(1, n * (n - 1) // 2)
    alive = unsuppressed((similarity > threshold) & (group[:, None] == group), score)
    count, survivors = (group[kept].bincount(minlength=weight.shape[1]) for kept in (alive | True, alive))
    quota = quotas(count.tolist(), survivors.tolist(), k, budget)
    order = score.argsort(descending=True, stable=True)
    order = order[(2 * group + ~alive)[order].argsort(stable=True)]
    place = torch.arange(n, device=x.device) - (count.cumsum(0) - count)[group[order]]  # within the group
    return order[place < torch.tensor(quota, device=x.device)[group[order]]]


def unsuppressed(conflict: Tensor, score: Tensor) -> Tensor:
    """Take tokens by falling score (n,), unless they conflict (n, n) with one taken before: (n,) bool."""
    order = score.argsort(descending=True, stable=True).cpu()
    table, alive = conflict.cpu().numpy(), torch.ones(len(order), dtype=torch.bool).numpy()
    for i in order.tolist():
        if alive[i]:
            alive &= ~table[i]
            alive[i] = True
    return torch.from_numpy(alive).to(score.device)


def quotas(count: list[int], survivors: list[int], k: int, budget: int) -> list[int]:
    """Share a budget out over groups of `count` patches, of which `survivors` were not suppressed."""
    lower = [min(1, size) for size in count]
    upper = [min(5 * -(-k // 64), size, alive) for size, alive in zip(count, survivors, strict=True)]
    while sum(upper) < min(k, sum(count)):
        upper = [min(limit + 1, size) for limit, size in zip(upper, count, strict=True)]
    other = max(0, budget - sum(lower))
    ends = [round(Fraction(other * done, sum(survivors))) for done in accumulate(survivors)]
    parts = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    quota = [min(least + part, limit) for least, part, limit in zip(lower, parts, upper, strict=True)]
    for i in sorted(range(len(quota)), key=lambda i: -survivors[i]):
        quota[i] += max(0, min(upper[i] - quota[i], budget - sum(quota)))
    return quota


def released_sequence(cls: Tensor, x: list[Tensor], slots: list[Tensor], orders: list[Tensor]) -> Tensor:
    """Put the views of an image into the order in which the release sends them.

    Args:
        cls: (c, v) the CLS tokens of the views.
        x: of each view, (n, v) its patches.
        slots: of each view, (n,) their places in the image.
        orders: of each view, (k,) the chosen patches, group by group.

    Returns:
        (m, v). The j-th chosen patch of a tile stands at the j-th chosen place: the release mixes both up.
    """
    place = torch.cat([at[order.sort().values] for at, order in zip(slots, orders, strict=True)][1:] or [slots[0][:0]])
    kept = [own[order] for own, order in zip(x, orders, strict=True)]
    return torch.cat([cls[:1], kept[0], torch.cat([kept[0][:0], *kept[1:]])[place.argsort()], cls[1:]])
