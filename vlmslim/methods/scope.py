"""SCOPE: "Saliency-Coverage Oriented Token Pruning for Efficient Multimodel LLMs" (NeurIPS 2025, arXiv 2510.24214)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from vlmslim.compressor import ImageTokens, Keep, check_choices
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection
from vlmslim.ops.greedy import Coverage, cosine_matrix, greedy
from vlmslim.ops.ranking import full_precision


@dataclass
class SCOPE(ScoredSelection):
    """Add, again and again, the patch whose gain in coverage times saliency is largest.

    A set covers each patch by the cosine to its most similar member, and by 0 at least. Coverage of the set is the sum
    over all patches of the crop or frame. Saliency is the attention from CLS, summed over heads.

    mode="released" follows the release (commit 6bf7306), for LLaVA-1.5 and LLaVA-NeXT, with these faults: padded
    patches of anyres images compete and are to be covered; every view gets the same count, rounded down; newlines are
    gone. mode="corrected", the default, chooses among the image's own tokens, shares `keep` out over the views by
    their sizes, and meets it exactly. In both modes scores are in fp32, a zero token is no longer NaN (the release
    then keeps the first tokens), ties go to the lower index, and an image's budget does not depend on other images of
    the batch.

    keep      : visual tokens to keep per image, a count or a share
    mode      : "corrected" or "released"
    alpha     : exponent of saliency; 1 as released, 0 is coverage alone
    combine   : "multiply" the gain with saliency (as released), or "add" it
    features  : compare what the vision "tower" returns (as released), or "projected" tokens
    pool      : cover each "view" by itself (as released), or the "image" as a whole
    score     : saliency, "cls" or mean attention "received"; "auto" is "cls" on a tower that has CLS
    newline   : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    keep: Keep = 0.111
    mode: str = "corrected"
    alpha: float = 1.0
    combine: str = "multiply"
    features: str = "tower"
    pool: str = "view"
    score: str = "auto"
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self)
        check_choices(self, combine=("multiply", "add"), features=("tower", "projected"), pool=("view", "image"))
        if self.alpha < 0:
            raise ValueError(f"alpha={self.alpha}: give 0 for coverage alone, or a positive number; the paper uses 1")

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return what is compared, and saliency."""
        heads = image.qk(self.score_layer)[0].shape[1] if self.combine == "add" else 1
        return image.tower_tokens if self.features == "tower" else image.features, heads * self.scores(image)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Search by saliency and coverage."""
        return salient_coverage(self.compared(read[0])[0], read[1], k, self.alpha, self.combine)


@full_precision
def salient_coverage(x: Tensor, saliency: Tensor, k: int, alpha: float = 1.0, combine: str = "multiply") -> Tensor:
    """Select tokens greedily by the gain in coverage and by saliency.

    Args:
        x: (b, n, d) tokens, compared by cosine.
        saliency: (b, n), not negative.
        k: number of picks, 1 <= k <= n.
        alpha: exponent of saliency.
        combine: "multiply" or "add".

    Returns:
        (b, k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    raised = saliency.float() ** alpha
    given = {"weight": raised} if combine == "multiply" else {"bonus": raised}
    return greedy(Coverage(cosine_matrix(x), **given), k)
