"""PruneSID: "Prune Redundancy, Preserve Essence" (ICLR 2026, arXiv 2603.09480)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmslim.compressor import Compressed, ImageTokens, Keep
from vlmslim.engine.families import has_cls
from vlmslim.methods._selection import Pool, ScoredSelection, Selection, check_selection, one_hot, with_padding
from vlmslim.methods.prunesid.groups import choose, loadings


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

    def released(self, image: ImageTokens, k: int) -> Compressed:
        """Choose in every view, and send CLS tokens and patches in the release's order."""
        given = with_padding(image)
        pools = self.pools(given, k)
        orders = []
        for pool in pools:
            x, q = pool.read[0], max(1, pool.k // 4)
            start = image.uniform(self.seed, min(x.shape) * q).view(-1, q) - 0.5
            weight = loadings(x, q, start)
            score = pool.read[1] if self.score == "cls" else weight.amax(1)
            orders.append(choose(x, weight, score, pool.k, pool.k - 1, released=True))
        x = released_sequence(image.cls, [pool.read[0] for pool in pools], [pool.slots for pool in pools], orders)

        def made_of() -> Tensor:
            names = one_hot(image, given)
            own = [names[pool.slots.cpu()] for pool in pools]
            chosen = [order.cpu() for order in orders]
            none = names.new_zeros(len(pools), names.shape[1])  # the CLS tokens
            return released_sequence(none, own, [pool.slots.cpu() for pool in pools], chosen)

        return Compressed(image.project(x).to(image.features), made_of=made_of)


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
