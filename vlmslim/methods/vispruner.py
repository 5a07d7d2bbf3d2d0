"""VisPruner: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs".

ICCV 2025, arXiv 2412.01818; its first version, "[CLS] Attention is All You Need" (FasterVLM), had step 1 alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmslim.compressor import ImageTokens, Keep, Part, Positive, check_choices
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection
from vlmslim.ops.greedy import cosine_matrix
from vlmslim.ops.ranking import full_precision


@dataclass
class VisPruner(ScoredSelection):
    """Keep the patches that CLS attends to most; of the others, throw out near-duplicates until the budget is met.

    1. The first `important` part of the budget goes to the patches of highest attention.
    2. The others form a list, in order of attention. In each round, the patches at even places are compared with those
       at odd places. The `step` patches of highest cosine to any of the odd ones go. The list of the next round has
       the even ones first, most similar first, and then the odd ones.

    mode="released" follows the release (commit aefa01a), for LLaVA-1.5 and LLaVA-NeXT, with these faults: padded
    patches compete; every view keeps the same count, rounded down; newlines are gone. mode="corrected", the default,
    chooses among the image's own tokens, shares `keep` out over the views by their sizes and meets it exactly. In both
    modes lists of odd length and budgets of a few tokens work, where the release fails or keeps too few; sorting is
    stable, ties go to the earlier place, and cosines are in fp32. Cosines in fp16, which the release computes, keep
    other tokens: the diverse half cannot be reproduced token by token.

    keep      : visual tokens to keep per image, a count or a share
    mode      : "corrected" or "released"
    important : part of the budget for step 1, rounded down; 1 is FasterVLM
    step      : patches that a round drops
    rest      : list of step 2 in order of "attention" (as released), or in reading order before each round ("raster")
    features  : compare what the vision "tower" returns (as released), or "projected" tokens
    score     : attention from CLS ("cls"), mean attention received in the last layer ("received", the release's
                substitute on SigLIP), or "auto": "cls" if the tower has CLS
    newline   : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    pool = "view"
    received_layer = -1

    keep: Keep = 0.111
    mode: str = "corrected"
    important: Part = 0.5
    step: Positive = 8
    rest: str = "attention"
    features: str = "tower"
    score: str = "auto"
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self)
        check_choices(self, rest=("attention", "raster"), features=("tower", "projected"))

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return what is compared, and attention."""
        return image.tower_tokens if self.features == "tower" else image.features, self.scores(image)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Keep the important patches, and then what is left of the list."""
        x, attention = read
        order = attention.argsort(dim=1, descending=True, stable=True)
        important = int(k * self.important)
        kept, left = order[:, :important], order[:, important:]
        similarity, diverse = cosine_matrix(self.compared(x)[0]), k - important
        while diverse and left.shape[1] > diverse:
            drop = min(self.step, left.shape[1] - diverse, -(-left.shape[1] // 2))
            left = without_duplicates(similarity, left.sort(dim=1).values if self.rest == "raster" else left, drop)
        return torch.cat([kept, left[:, :diverse]], dim=1)


@full_precision
def without_duplicates(similarity: Tensor, left: Tensor, drop: int) -> Tensor:
    """Drop the patches at even places of a list that are most similar to one at an odd place.

    Args:
        similarity: (b, n, n).
        left: (b, r) the lists.
        drop: number of patches that go.

    Returns:
        (b, r - drop) the even ones that stay, most similar first, and then the odd ones.
    """
    even, odd = left[:, ::2], left[:, 1::2]
    image = torch.arange(len(left), device=left.device)[:, None, None]
    likeness = similarity[image, even[:, :, None], odd[:, None]].amax(2)
    order = likeness.argsort(dim=1, descending=True, stable=True)
    return torch.cat([even.gather(1, order[:, drop:]), odd], dim=1)
