"""AgilePruner: "An Empirical Study of Attention and Diversity for Adaptive Visual Token Pruning" (ICLR 2026).

arXiv 2603.01236.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmslim.compressor import ImageTokens, Keep, check_choices
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection
from vlmslim.ops.effective_rank import effective_rank
from vlmslim.ops.greedy import Rows, cosine_matrix, greedy
from vlmslim.ops.ranking import full_precision


@dataclass
class AgilePruner(ScoredSelection):
    """Walk the tokens by falling attention; each one kept strikes out those too near, the farther down the more.

    The token at place p of the ranking strikes out all tokens at a cosine distance below
    min(p x erank / average x slope, limit). erank, the effective rank of the features (exponential of the entropy of
    their singular values), is large for complex images, which are thinned harder. If the walk ends before the budget
    is met, struck-out tokens of highest attention fill it.

    This is a reading: the authors' repository has no code, and their paper could not be read. The formula is that of
    its project page. Places count struck-out tokens and start at 1; `average` and `limit` are those of two independent
    implementations; singular values are those of centred projected tokens of a crop or frame.

    keep      : visual tokens to keep per image, a count or a share
    average   : effective rank of an average image; 90 for the projected tokens of LLaVA-1.5
    slope     : growth of the distance with the place
    limit     : the largest distance that is struck out
    threshold : a distance for all places instead; None for the rule above
    pool      : walk each "view" by itself, or the whole "image"
    score     : attention from CLS ("cls"), mean attention received ("received"), or "auto": "cls" if the tower has CLS
    newline   : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions : rotary positions: "auto", "original" or "renumbered"
    """

    keep: Keep = 0.111
    average: float = 90.0
    slope: float = 0.01
    limit: float = 0.25
    threshold: float | None = None
    pool: str = "view"
    score: str = "auto"
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self)
        check_choices(self, pool=("view", "image"))
        if self.average <= 0:
            raise ValueError(f"average={self.average}: give the effective rank of an average image; 90 for LLaVA-1.5")
        for name in ("slope", "limit", "threshold"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name}={value}: a cosine distance is not negative")

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return features and attention."""
        return image.features, self.scores(image)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Walk by attention."""
        x, attention = self.compared(read[0])[0], read[1]
        if self.threshold is not None:
            fixed = torch.full((len(x),), self.threshold, device=x.device)
            return walk(x, attention, k, torch.full_like(fixed, float("inf")), fixed)
        slope = effective_rank(x) / self.average * self.slope
        return walk(x, attention, k, slope, torch.full_like(slope, self.limit))


class _Walk:
    """The rule of the walk: by place, and those struck out last."""

    def __init__(self, place: Tensor, distance: Tensor, reach: Tensor):
        self.place, self.reach, self.distance_to = place, reach, Rows(distance)
        self.struck = torch.zeros_like(place, dtype=torch.bool)

    def score(self) -> Tensor:
        return -(self.place + self.struck * self.place.shape[1]).float()

    def add(self, pick: Tensor) -> None:
        self.struck = self.struck | (self.distance_to(pick) < self.reach.gather(1, pick[:, None]))


@full_precision
def walk(x: Tensor, attention: Tensor, k: int, slope: Tensor, limit: Tensor) -> Tensor:
    """Select tokens by falling attention, without those too near to earlier ones as long as there are others.

    Args:
        x: (b, n, d) tokens, compared by cosine.
        attention: (b, n).
        k: number of picks.
        slope: (b,) how far a token strikes out others, per place.
        limit: (b,) the farthest.

    Returns:
        (b, k) indices in the order of selection, those that fill the budget last; a smaller k is a prefix.
    """
    order = attention.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(
        1, order, torch.arange(1, x.shape[1] + 1, device=x.device).expand_as(order)
    )
    reach = torch.minimum(place * slope[:, None], limit[:, None])
    return greedy(_Walk(place, 1 - cosine_matrix(x), reach), k)
