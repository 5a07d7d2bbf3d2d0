"""PruneSID: "Prune Redundancy, Preserve Essence" (ICLR 2026, arXiv 2603.09480)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmslim.compressor import Compressed, ImageTokens, Keep
from vlmslim.engine.families import has_cls
from vlmslim.methods._selection import Pool, ScoredSelection, Selection, check_selection, one_hot, with_padding
from vlmslim.ops.budgets import share_within_limits
from vlmslim.ops.components import loadings
from vlmslim.ops.ranking import full_precision, membership
from vlmslim.ops.suppression import unsuppressed


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
    are shuffled over each other's places; padded patches compete; every view has the same budget, rounded down; a
    patch of attention 0 counts as suppressed.
    mode="corrected", the default, has exact components, no CLS, reading order, true places, and meets `keep` exactly.
    In both modes the shares are whole numbers rounded half to even, and ties go to the lower index or group.

    keep      : visual tokens to keep per image, a count or a share
    mode      : "corrected" or "released"
    score     : attention from CLS ("cls"), "loading", or "auto": "cls" if the tower has CLS
    seed      : of the random start of mode="released"
    newline   : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    reads_back = "eigenvectors make PyTorch wait, and patches are suppressed one after the other on the host"

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
            raise ValueError("score='cls' and mode='released' need CLS, and this tower has none; use score='loading'")
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
        for x, *attention in zip(*read, strict=True):
            weight = loadings(torch.sigmoid(x.float()), max(1, k // 4))
            score = attention[0] if attention else weight.amax(1)
            order = choose(x, weight, score, k)
            orders.append(order[score[order].argsort(descending=True, stable=True)])
        return torch.stack(orders)

    def released(self, image: ImageTokens, k: int) -> Compressed:
        """Choose in every view, and send CLS tokens and patches in the release's order."""
        given, chosen = with_padding(image), []
        for pool in self.pools(given, k):
            x, *attention = pool.read
            q = max(1, pool.k // 4)
            start = image.uniform(self.seed, min(x.shape) * q).view(-1, q) - 0.5
            weight = loadings(torch.sigmoid(x.float()), q, start)
            score = attention[0] if attention else weight.amax(1)
            chosen.append(pool.slots[choose(x, weight, score, pool.k, cls=True)])
        index = released_sequence(chosen, len(given.features))
        x = image.project(torch.cat([given.tower_tokens, image.cls])[index]).to(image.features)
        return Compressed(x, made_of=lambda: one_hot(image, given, len(chosen))[index.cpu()])


def released_sequence(chosen: list[Tensor], n: int) -> Tensor:
    """Put the chosen patches of an image into the order in which the release sends them.

    Args:
        chosen: of each view, (k,) the places of its patches in the image, group by group.
        n: number of patches of the image.

    Returns:
        (m,) places in the image; n + i is the CLS token of view i. The j-th chosen patch of a tile takes the place of
        the j-th of them in reading order: the release mixes both up.
    """
    thumbnail, *tiles = chosen
    cls = torch.arange(n, n + len(chosen), device=thumbnail.device)
    if tiles:
        places = torch.cat([own.sort().values for own in tiles])
        tiles = [torch.cat(tiles)[places.argsort()]]
    return torch.cat([cls[:1], thumbnail, *tiles, cls[1:]])


@full_precision
def choose(
    x: Tensor, weight: Tensor, score: Tensor, k: int, cls: bool = False, threshold: float | None = None
) -> Tensor:
    """Choose patches group by group.

    Args:
        x: (n, d) patches, compared by cosine.
        weight: (n, q) their loadings.
        score: (n,) what decides within a group.
        k: T, on which threshold and limits depend.
        cls: CLS counts as one of the k, and patches of score 0 count as suppressed, as released.
        threshold: cosine above which a patch is suppressed; None for T / 32 times the mean of all pairs.

    Returns:
        (k,) indices, or (k - 1,) with `cls`: the groups in order, of each those not suppressed first, by score.
    """
    n, unit, group = len(x), functional.normalize(x, dim=-1, eps=1e-12), weight.argmax(1)
    similarity = unit @ unit.T
    if threshold is None:
        threshold = k / 32 * similarity.triu(1).sum().item() / max(1, n * (n - 1) // 2)
    alive = unsuppressed((similarity > threshold) & (group[:, None] == group), score)
    alive = alive & (score > 0) if cls else alive
    member = membership(group, weight.shape[1])
    count, survivors = member.sum(1), (member & alive).sum(1)
    quota = quotas(count.tolist(), survivors.tolist(), k, k - cls)
    order = score.argsort(descending=True, stable=True)
    order = order[(2 * group + ~alive)[order].argsort(stable=True)]
    place = torch.arange(n, device=x.device) - (count.cumsum(0) - count)[group[order]]  # within the group
    return order[place < torch.tensor(quota, device=x.device)[group[order]]]


def quotas(count: list[int], survivors: list[int], k: int, budget: int) -> list[int]:
    """Share a budget out over groups of `count` patches, of which `survivors` were not suppressed."""
    upper = [min(5 * math.ceil(k / 64), alive) for alive in survivors]
    while sum(upper) < min(k, sum(count)):
        upper = [min(limit + 1, size) for limit, size in zip(upper, count, strict=True)]
    return share_within_limits(budget, survivors, [min(1, size) for size in count], upper)
