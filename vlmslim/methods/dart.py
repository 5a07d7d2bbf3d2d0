"""DART: "Stop Looking for Important Tokens: Duplication Matters More" (EMNLP 2025, arXiv 2502.11494)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressor, LayerInput, check_choices, check_keep, check_layer, resolve_keep
from vlmslim.engine.families import final_norm
from vlmslim.methods._layers import placed_images
from vlmslim.ops.ranking import full_precision


@dataclass
class DART(Compressor):
    """Before decoder layer K, keep a few pivots, and the visual tokens that resemble the pivots least.

    Pivots are the visual tokens, and the text tokens after the image, whose rotated keys in layer K - 1 have the
    largest L1 norms. Each pivot in turn adds the visual tokens left that have the smallest cosine to it, between
    outputs of layer K - 1 under the model's final norm. Visual pivots stay, and kept tokens keep their rotary
    positions.

    mode="released" follows the release (its copy in VTC-Bench, commit 983e443) with these faults: each pivot adds
    floor(T / 8) tokens, and the visual pivots come on top, so that 128 are 132 and 0.111 of 576 are 60; the order of
    the pivots is that of a set of Python, which depends on where the image stands in the prompt. mode="corrected", the
    default, keeps exactly T tokens, and takes visual pivots first, then those of text, by falling norm. In both modes
    images are found wherever they stand, each has pivots and a budget of its own, too little text gives fewer pivots,
    norms and cosines are in fp32 (in fp16, as released, norms tie), and ties go to the lower index. As in the release,
    newline tokens compete like others.

    The L1 norm of a turned key changes with its position, so that a row which is padded on the left may get other
    pivots. mode="corrected" therefore takes the L2 norm of each head, which turning does not change.

    keep   : T, visual tokens to keep per image from layer K on, a count or a share
    mode   : "corrected" or "released"
    norm   : of keys, "l2" of each head, summed over heads, or "l1" over all channels (as released). None is "l2", or
             "l1" with mode="released"
    layer  : K, a number from 1 or a share of the depth, rounded down; the paper uses 2
    pivots : visual and text pivots; the paper uses 4 of each
    """

    budget_options: ClassVar = ("keep", "layer")

    keep: int | float
    mode: str = "corrected"
    norm: str | None = None
    layer: int | float = 2
    pivots: Sequence[int] = (4, 4)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer)
        check_choices(self, mode=("corrected", "released"))
        self.norm = self.norm or ("l2" if self.mode == "corrected" else "l1")
        check_choices(self, norm=("l1", "l2"))
        self.layers, self.pivots = (self.layer,), tuple(self.pivots)
        if self.mode == "released":
            self.reads_back = "the places of the pivots in the prompt decide their order"
        if len(self.pivots) != 2 or min(self.pivots) < 0 or self.pivots[0] < 1:
            raise ValueError(
                f"pivots={self.pivots}: give one visual pivot at least and a number of text pivots: (4, 4)"
            )

    def setup(self, model: Any) -> None:
        """Find the norm before the LM head."""
        self.final_norm = final_norm(model.model)

    def requested(self, n: int) -> int:
        """Return the budget, or what the release makes of it."""
        k = resolve_keep(self.keep, n)
        if self.mode == "corrected" or k == n:
            return k
        return min(n, self.pivots[0] + sum(self.pivots) * int(self._share(n) // sum(self.pivots)))

    def _share(self, n: int) -> float:
        """Return T, which the release does not round where it is a share."""
        return self.keep * n if isinstance(self.keep, float) else self.keep

    def retain(self, tokens: LayerInput) -> Tensor:
        """Keep the pivots of every image, and what they add."""
        keep, norms = tokens.mask.clone(), key_norms(tokens.keys, self.norm)
        x = self.final_norm(tokens.hidden).to(tokens.hidden.device)
        for image in placed_images(tokens):
            row, place, k = image.row, image.place, resolve_keep(self.keep, image.entered)
            if k >= len(place):
                continue
            ranked = norms[row, place].argsort(descending=True, stable=True)
            count = self.pivots[0] if self.mode == "released" else min(k, self.pivots[0])
            visual, others = place[ranked].tensor_split([count])
            words = image.text[norms[row, image.text].argsort(descending=True, stable=True)[: self.pivots[1]]]
            pivots, pool = torch.cat([visual, words]), others.sort().values
            if self.mode == "released":
                numbers = (tokens.mask[row].cumsum(0) - 1)[pivots].tolist()  # padding does not count
                pivots = pivots[[numbers.index(i) for i in set(numbers)]]
                shares = [int(self._share(image.entered) // sum(self.pivots))] * len(pivots)
            else:
                each, more = divmod(k - len(visual), len(pivots))
                shares = [each + (i < more) for i in range(len(pivots))]
            taken = torch.cat(unlike(x[row, pool], x[row, pivots], shares))
            keep[row, place] = False
            keep[row, torch.cat([visual, pool[taken]])] = True
        return keep

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return the budgets; the release keeps another number."""
        return tokens.count_of_top(self.keep) if self.mode == "corrected" else None


@full_precision
def key_norms(keys: Tensor, norm: str | None = "l2") -> Tensor:
    """Compute the norms of keys (B, heads, S, head_dim), "l1" or "l2" of each head, summed over heads: (B, S)."""
    return (keys.abs().sum(3) if norm == "l1" else torch.linalg.vector_norm(keys, dim=3)).sum(1)


@full_precision
def unlike(pool: Tensor, pivots: Tensor, counts: Sequence[int]) -> tuple[Tensor, ...]:
    """Let each pivot in turn take the tokens left in a pool that have the smallest cosine to it.

    Args:
        pool: (n, d).
        pivots: (p, d).
        counts: of each pivot.

    Returns:
        Of each pivot, the indices that it takes, the least similar first.
    """
    cosine = F.normalize(pivots.float(), dim=-1) @ F.normalize(pool, dim=-1).T
    picks = [cosine.new_empty(0, dtype=torch.long)]
    for row, count in zip(cosine, counts, strict=True):
        taken = torch.cat(picks)
        order = row.index_fill(0, taken, float("inf")).argsort(stable=True)
        picks.append(order[: min(count, len(row) - len(taken))])
    return tuple(picks[1:])
