"""DART: "Stop Looking for Important Tokens: Duplication Matters More" (EMNLP 2025, arXiv 2502.11494)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressor, LayerInput, check_choices, check_keep, check_layer, resolve_keep
from vlmslim.engine.families import final_norm
from vlmslim.ops.ranking import full_precision


@dataclass
class DART(Compressor):
    """Before decoder layer K, keep a few pivots, and the visual tokens that resemble the pivots least.

    Pivots are the visual tokens, and the text tokens after the image, whose rotated keys in layer K - 1 have the
    largest L1 norms. Each pivot in turn adds the visual tokens left that have the smallest cosine to it, between
    outputs of layer K - 1 under the model's final norm. Visual pivots stay, and kept tokens keep their rotary
    positions.

    mode="released" follows the release with these faults: each pivot adds floor(T / 8) tokens, and the visual pivots
    come on top, so that 128 are 132 and 0.111 of 576 are 60; the order of the pivots is that of a set of Python, which
    depends on where the image stands in the prompt. mode="corrected", the default, keeps exactly T tokens, and takes
    visual pivots first, then those of text, by falling norm. In both modes images are found wherever they stand, each
    has pivots and a budget of its own, too little text gives fewer pivots, norms and cosines are in fp32 (in fp16, as
    released, norms tie), and ties go to the lower index. As in the release, newline tokens compete like others.

    The L1 norm of a turned key changes with its position, so that a row which is padded on the left may get other
    pivots. mode="corrected" therefore takes the L2 norm of each head, which turning does not change.

    keep   : T, visual tokens to keep per image from layer K on, a count or a share
    mode   : "corrected" or "released"
    norm   : of keys, "l2" of each head, summed over heads, or "l1" over all channels (as released). None is "l2", or
             "l1" with mode="released"
    layer  : K, a number from 1 or a share of the depth, rounded down; the paper uses 2
    pivots : visual and text pivots; the paper uses 4 of each
    """

    reads_back = "pivots find their tokens image by image"

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
        text = tokens.mask & (tokens.image == 0)
        for row, entered in enumerate(tokens.entered):
            for number, n in enumerate(entered, 1):
                place = (tokens.image[row] == number).nonzero()[:, 0]
                k = resolve_keep(self.keep, n)
                if not len(place) or k >= len(place):
                    continue
                after = text[row].nonzero()[:, 0]
                after = after[after > place[-1]]
                visual, words = (
                    at[largest(norms[row, at], m)] for at, m in zip((place, after), self.pivots, strict=True)
                )
                visual = visual[:k]
                pivots = torch.cat([visual, words])
                if self.mode == "released":
                    numbers = (tokens.mask[row].cumsum(0) - 1)[pivots].tolist()  # padding does not count
                    pivots = pivots[[numbers.index(i) for i in set(numbers)]]
                    shares = [int(self._share(n) // sum(self.pivots))] * len(pivots)
                else:
                    each, more = divmod(k - len(visual), len(pivots))
                    shares = [each + (i < more) for i in range(len(pivots))]
                pool = place[~torch.isin(place, visual)]
                keep[row, place] = False
                keep[row, visual] = True
                keep[row, pool[torch.cat(unlike(x[row, pool], x[row, pivots], shares))]] = True
        return keep


def largest(x: Tensor, k: int) -> Tensor:
    """Return the indices of the k largest numbers of x (n,), falling, the lower index first on ties."""
    return x.argsort(descending=True, stable=True)[:k]


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
    taken, picks = torch.zeros(len(pool), dtype=torch.bool, device=pool.device), []
    for row, count in zip(cosine, counts, strict=True):
        pick = row.masked_fill(taken, float("inf")).argsort(stable=True)[: min(count, int((~taken).sum()))]
        taken[pick] = True
        picks.append(pick)
    return tuple(picks)
