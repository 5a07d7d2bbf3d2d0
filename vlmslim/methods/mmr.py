"""MMR: maximal marginal relevance (SIGIR 1998) over CLS attention: the selector of IDPruner (2026), no scorer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmslim.compressor import ImageTokens, Keep, check_choices
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection
from vlmslim.ops.greedy import MarginalRelevance, greedy, similarity_matrix
from vlmslim.ops.ranking import full_precision, rank_within_groups


@dataclass
class MMR(ScoredSelection):
    """Start from the most important token; then add the one that is important and unlike those kept, again and again.

    A token's score is weight x importance - (1 - weight) x the largest cosine to a kept token. Importance is the
    attention that a patch gets in the vision tower, scaled to [0, 1) within each crop or frame.

    This is a reading. IDPruner trains a scorer in the place of attention, and its published rows are not rows of this
    method. With a given importance the picks are those of its release (AngelSlim, commit 67394ce), except for ties,
    which go to the lower index here, and for several images, each of which has a budget of its own here.

    keep      : visual tokens to keep per image, a count or a share
    weight    : lambda, of importance against unlikeness. 1 keeps the most important tokens; 0 keeps the farthest ones
    scale     : "minmax" (as released); "rank", the same curve on every image; "log", the logarithm before "minmax".
                After "minmax" the few patches with very high attention leave little contrast among the others
    at_once   : tokens to add per step; those of one step do not see each other
    score     : attention from CLS ("cls"), mean attention received ("received"), or "auto": "cls" if the tower has CLS;
                or the "norm" of the tower's features, a weak baseline
    newline   : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions : rotary positions: "auto", "original" (as released) or "renumbered"
    """

    keep: Keep = 0.111
    weight: float = 0.5
    scale: str = "minmax"
    at_once: int = 1
    score: str = "auto"
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self, ("auto", "cls", "received", "norm"))
        check_choices(self, scale=("minmax", "rank", "log"))
        if not 0 <= self.weight <= 1:
            raise ValueError(f"weight={self.weight}: give a number from 0 to 1; 0.5 weighs both alike")
        if self.at_once < 1:
            raise ValueError(f"at_once={self.at_once}: add at least one token per step")

    def scores(self, image: ImageTokens, layer: int | None = None) -> Tensor:
        """Return the importance of each token: attention, or the norm of its features."""
        if self.score != "norm":
            return super().scores(image, layer)
        image.score = image.tower_tokens.float().norm(dim=-1)
        return image.score

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return features and scaled importance."""
        return image.features, scaled(self.scores(image), image.grid[:, 0] + 1, self.scale)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Search all tokens of an image together."""
        features, importance = read
        return marginal_relevance(self.compared(features)[0], importance, k, self.weight, self.at_once)


@full_precision
def scaled(score: Tensor, group: Tensor, scale: str = "minmax") -> Tensor:
    """Scale scores (n,) to [0, 1) within groups (n,) >= 0: (n,)."""
    if scale == "rank":
        size = group.bincount()[group]
        return (size - 1 - rank_within_groups(score[None], group[None])[0]) / size
    if scale == "log":
        score = score.clamp(min=1e-12).log()
    empty = score.new_full((len(score) + 1,), 0.0)  # there are fewer groups than tokens
    low, high = (empty.scatter_reduce(0, group, score, how, include_self=False)[group] for how in ("amin", "amax"))
    return (score - low) / (high - low + 1e-6)


@full_precision
def marginal_relevance(x: Tensor, importance: Tensor, k: int, weight: float = 0.5, at_once: int = 1) -> Tensor:
    """Select tokens by maximal marginal relevance.

    Args:
        x: (b, n, d) tokens, compared by cosine.
        importance: (b, n).
        k: number of picks, 1 <= k <= n.
        weight: of importance, against unlikeness.
        at_once: picks per step.

    Returns:
        (b, k) indices in the order of selection.
    """
    unit = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + 1e-8)
    return greedy(MarginalRelevance(importance.float(), similarity_matrix(unit), weight), k, at_once=at_once)
