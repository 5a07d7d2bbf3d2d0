"""HoloV: "Revisiting Visual Holistic Context Retention" (NeurIPS 2025, arXiv 2510.02912)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vlmslim.compressor import Compressed, ImageTokens, Keep, check_choices
from vlmslim.engine.layout import to_device
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection
from vlmslim.ops.ranking import full_precision, membership, rank_within_groups


@dataclass
class HoloV(ScoredSelection):
    """Cut the tokens into chunks; share the budget by the chunks' attention; keep the best tokens of each chunk.

    Chunks are contiguous in reading order, over all views of an image. A chunk's quota is the budget times its part of
    the mean attention, rounded down; the rest goes one each to the chunks of most attention (sections 3.2 and 3.3).
    The paper adds the variance of similarities to the attention (equation 5). Its scaling makes that term cancel out of
    the quotas, so that only the choice within a chunk can use it: `within="holistic"`.

    mode="released" follows the release (commit 1d2e65e) with its faults: a chunk whose quota exceeds its size leaves
    zero vectors at the end of the sequence, to which the language model attends; a chunk of one token counts for a
    thousandth of its attention; tokens enter chunk by chunk in order of attention; newlines are gone.
    mode="corrected", the default, gives what a full chunk cannot take to the others, one each, and keeps reading
    order. In both modes ties go to the lower index, and an image is compressed by itself.

    keep      : visual tokens to keep per image, a count or a share
    mode      : "corrected" or "released"
    chunks    : number of chunks; the paper uses 16
    within    : rank within a chunk by "attention" (as released), or "holistic" (as in the paper)
    score     : attention from CLS ("cls"), mean attention received ("received"), or "auto": "cls" if the tower has CLS
    newline   : newline tokens, within the budget: "rows" keeps that of each row that keeps a token, "drop" none
    positions : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    keep: Keep = 0.111
    mode: str = "corrected"
    chunks: int = 16
    within: str = "attention"
    score: str = "auto"
    newline: str = "rows"

    def __post_init__(self) -> None:
        check_selection(self)
        check_choices(self, within=("attention", "holistic"))
        if self.centre and self.within == "attention":
            raise ValueError("centre=True changes cosines, and within='attention' takes none; use within='holistic'")
        if self.chunks < 1:
            raise ValueError(f"chunks={self.chunks}: cut into at least one chunk; the paper uses 16")

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return features and attention."""
        return image.features, self.scores(image)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Fill each chunk's quota with its best tokens."""
        orders = []
        for x, attention in zip(*read, strict=True):
            sizes, rank = chunk_sizes(len(x), self.chunks), attention
            if self.within == "holistic":
                rank = 1000 * attention + scaled_variance(self.compared(x[None])[0][0], attention, sizes)
            kept = best_of_chunks(rank, chunk_means(attention, sizes), sizes, k)
            orders.append(torch.where(kept, rank, -torch.inf).argsort(descending=True, stable=True)[:k])
        return torch.stack(orders)

    def released(self, image: ImageTokens, k: int) -> Compressed:
        """Send chunks in the release's order, and zeros where it chooses too few tokens."""
        features = image.features
        (slots,) = to_device(features.device, np.flatnonzero(image.grid_on_host[:, 0] >= 0))
        order = released_order(features[slots], self.scores(image)[slots], min(k, len(slots)), self.chunks)

        def chosen(x: Tensor) -> Tensor:
            return torch.where(order[:, None] < 0, 0, x[slots[order.clamp(min=0)]])

        return Compressed(chosen(features), made_of=lambda: chosen(torch.eye(len(features), device=features.device)))


def chunk_sizes(n: int, chunks: int) -> list[int]:
    """Cut n tokens into chunks: sizes differ by one at most, larger ones first, none is empty."""
    return [n // chunks + (i < n % chunks) for i in range(min(chunks, n))]


def chunks_of(sizes: list[int], device: torch.device | str = "cpu") -> Tensor:
    """Return the chunk of each token, (n,)."""
    return torch.from_numpy(np.repeat(np.arange(len(sizes)), sizes)).to(device, non_blocking=True)


@full_precision
def chunk_means(score: Tensor, sizes: list[int]) -> Tensor:
    """Average scores (n,) within chunks of these sizes: (c,)."""
    member = membership(chunks_of(sizes, score.device), len(sizes)).to(score)
    return member @ score / member.sum(1)


@full_precision
def scaled_variance(x: Tensor, attention: Tensor, sizes: list[int]) -> Tensor:
    """Compute the variance of each token's cosines within its chunk, scaled to 1000 times the chunk's mean attention.

    Args:
        x: (n, d) tokens.
        attention: (n,).
        sizes: of the chunks.

    Returns:
        (n,), 0 for a token that is alone in its chunk.
    """
    scaled = []
    for own, a in zip(x.split(sizes), attention.split(sizes), strict=True):
        unit, others = own / (torch.linalg.vector_norm(own, dim=1, keepdim=True) + 1e-6), max(1, len(own) - 1)
        similarity = (unit @ unit.T).fill_diagonal_(0)
        mean = similarity.sum(1, keepdim=True) / others
        variance = (similarity - mean).square().sum(1) / others  # the zero of the diagonal counts
        scaled.append(variance * ((1000 * a).mean() / (variance.mean() + 1e-6)))
    return torch.cat(scaled)


def quotas(weight: Tensor, k: int, released: bool = False) -> Tensor:
    """Share k tokens out over chunks by their weights (c,), whatever their sizes: (c,) integers whose sum is k."""
    share = (weight / (weight.sum() + 1e-6 * released)).double()
    quota = (share * k).long()
    return quota + (standing(share) < k - quota.sum())


def standing(x: Tensor) -> Tensor:
    """Rank x (n,): 0 for the largest, ties to the lower index."""
    return x.argsort(descending=True, stable=True).argsort()


def best_of_chunks(rank: Tensor, weight: Tensor, sizes: list[int], k: int) -> Tensor:
    """Choose the best tokens of each chunk, as many as its quota.

    What a full chunk cannot take goes to the others, one each in turns, those of most weight first.

    Args:
        rank: (n,) by which tokens are chosen within a chunk.
        weight: (c,) of the chunks.
        sizes: of the chunks.
        k: tokens to choose, at most n.

    Returns:
        (n,) bool.
    """
    chunk = chunks_of(sizes, rank.device)
    beyond = rank_within_groups(rank[None], chunk[None])[0] - quotas(weight, k)[chunk]
    turn = torch.where(beyond < 0, -1, beyond * len(sizes) + standing(weight)[chunk])
    return torch.zeros_like(rank, dtype=torch.bool).index_fill(0, turn.argsort(stable=True)[:k], True)


def released_weights(x: Tensor, attention: Tensor, sizes: list[int], weight: float = 0.09) -> Tensor:
    """Compute by what the release shares the budget out, (c,); `weight` is that of the scaled variance."""
    score = 1000 * attention + weight * scaled_variance(x, attention, sizes)
    parts = zip(score.split(sizes), attention.split(sizes), strict=True)
    return torch.stack([own.mean() if len(own) > 1 else a[0] for own, a in parts])


def released_order(x: Tensor, attention: Tensor, k: int, chunks: int = 16, weight: float = 0.09) -> Tensor:
    """Return the sequence that the release sends, (k,): indices of the tokens, and -1 for zero vectors at the end."""
    n, sizes = len(x), chunk_sizes(len(x), chunks)
    chunk, (size,) = chunks_of(sizes, x.device), to_device(x.device, np.repeat(sizes, sizes))
    quota = quotas(released_weights(x, attention, sizes, weight), k, released=True)[chunk]
    rank = rank_within_groups(attention[None], chunk[None])[0]
    place = torch.where(quota < size, rank, torch.arange(n, device=x.device))  # a full chunk keeps its reading order
    turn = torch.where(rank < quota, chunk * n + place, n * len(sizes))
    order = turn.argsort(stable=True)[:k]
    return torch.where(turn[order] < n * len(sizes), order, -1)
