"""The greedy rule of TOPS: relevance, diversity and coverage."""

import torch
from torch import Tensor

from vlmslim.ops.greedy import Rows, cosine_matrix, greedy
from vlmslim.ops.ranking import full_precision


class _Preservation:
    """The rule: relevance, diversity and coverage, each made comparable over the tokens that are left."""

    def __init__(self, relevance: Tensor, similarity: Tensor, alpha: float, coverage: float, normalise: str):
        self.relevance, self.similarity, self.row = relevance, similarity, Rows(similarity)
        self.alpha, self.coverage, self.normalise = alpha, coverage, normalise
        self.left = torch.ones_like(relevance)
        self.gain = torch.empty_like(similarity)  # every step writes into it, because new memory takes most of its time
        self.nearest: Tensor | None = None

    def score(self) -> Tensor:
        if self.nearest is None:
            return self.relevance
        # symmetric: by kept token, then by candidate
        gain = torch.sub(self.similarity, self.nearest[:, None], out=self.gain).clamp_(min=0)
        covered = gain.mul_(self.left[:, None]).sum(2)
        distance, fixed = 1 - self.nearest, torch.ones_like(self.left)
        relevance = self.comparable(self.relevance, fixed if self.normalise == "fixed" else self.left)
        return relevance + sum(
            weight * self.comparable(x, self.left)
            for weight, x in ((self.alpha, distance), (self.coverage, covered))
            if weight
        )

    def comparable(self, x: Tensor, left: Tensor) -> Tensor:
        if self.normalise == "minmax":
            low = x.masked_fill(left == 0, float("inf")).amin(1, keepdim=True)
            x, unit = x - low, x.masked_fill(left == 0, float("-inf")).amax(1, keepdim=True) - low
        else:
            unit = (x * left).sum(1, keepdim=True) / left.sum(1, keepdim=True)
        return torch.where(unit > 1e-12, x / unit.clamp(min=1e-12), 0)

    def add(self, pick: Tensor) -> None:
        new = self.row(pick)
        self.nearest = new if self.nearest is None else torch.maximum(self.nearest, new)
        self.left = self.left.scatter(1, pick[:, None], 0)


@full_precision
def preserve(
    x: Tensor, relevance: Tensor, k: int, alpha: float = 0.5, coverage: float = 0.5, normalise: str = "mean"
) -> Tensor:
    """Select tokens greedily by relevance, diversity and coverage.

    Args:
        x: (b, n, d) tokens, compared by cosine.
        relevance: (b, n), not negative.
        k: number of picks, 1 <= k <= n.
        alpha: weight of diversity.
        coverage: weight of coverage.
        normalise: "mean", "fixed" or "minmax".

    Returns:
        (b, k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    return greedy(_Preservation(relevance.float(), cosine_matrix(x), alpha, coverage, normalise), k)
