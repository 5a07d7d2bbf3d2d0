"""HoloV: "Revisiting Visual Holistic Context Retention" (NeurIPS 2025, arXiv 2510.02912)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressed, ImageTokens, Keep, check_choices, resolve_keep
from vlmslim.methods._selection import Pool, ScoredSelection, check_selection
from vlmslim.ops.ranking import full_precision, rank_within_groups


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

    reads_back = "quotas of chunks are shared out on the host"

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

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress the images of a forward."""
        return super().select_images(images) if self.mode == "corrected" else [self._released(x) for x in images]

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Fill each chunk's quota with its best tokens."""
        orders = []
        for x, attention in zip(*read, strict=True):
            chunk = chunks_of(len(x), self.chunks, x.device)
            quota = quotas(chunk_means(attention, chunk), chunk.bincount().tolist(), k)
            rank = attention
            if self.within == "holistic":
                rank = holistic_score(self.compared(x[None])[0][0], attention, chunk)[0]
            kept = rank_within_groups(rank[None], chunk[None])[0] < torch.tensor(quota, device=x.device)[chunk]
            orders.append(torch.where(kept, rank, -torch.inf).argsort(descending=True, stable=True)[:k])
        return torch.stack(orders)

    def _released(self, image: ImageTokens) -> Compressed:
        n, features = len(image.features), image.features
        if (k := resolve_keep(self.keep, n)) == n:
            return image.pick(torch.arange(n, device=features.device))
        slots = (image.grid[:, 0] >= 0).nonzero()[:, 0]
        order = released_order(features[slots], self.scores(image)[slots], min(k, len(slots)), self.chunks)

        def chosen(x: Tensor) -> Tensor:
            """Take tokens of x (n, d); the release leaves zeros where it chose too few."""
            return torch.where(order[:, None] < 0, 0, x[slots[order.clamp(min=0)]])

        return Compressed(chosen(features), made_of=lambda: chosen(torch.eye(n, device=features.device)))


def chunks_of(n: int, chunks: int, device: torch.device | None = None) -> Tensor:
    """Return the chunk of each of n tokens, (n,): sizes differ by one at most, larger ones first, none is empty."""
    sizes = [n // chunks + (i < n % chunks) for i in range(min(chunks, n))]
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device), output_size=n)


@full_precision
def chunk_means(score: Tensor, chunk: Tensor) -> Tensor:
    """Average scores (n,) within chunks (n,): (c,)."""
    member = F.one_hot(chunk).T.to(score)  # a product, because scattered sums on a GPU do not repeat to the last bit
    return member @ score / member.sum(1)


@full_precision
def holistic_score(x: Tensor, attention: Tensor, chunk: Tensor, weight: float = 0.09) -> tuple[Tensor, Tensor]:
    """Compute what ranks the tokens of a chunk in the paper (equation 5), and each chunk's score in the release.

    Args:
        x: (n, d) tokens.
        attention: (n,).
        chunk: (n,) the chunk of each token, contiguous.
        weight: of the variance of similarities in the release's chunk score.

    Returns:
        (n,) the score of each token, and (c,) that of each chunk.
    """
    ranks, totals = [], []
    for own, a in zip(*(t.split(chunk.bincount().tolist()) for t in (x, attention.float())), strict=True):
        if len(own) == 1:
            ranks.append(a * 1000)
            totals.append(a[0])
            continue
        unit = own / (torch.linalg.vector_norm(own, dim=1, keepdim=True) + 1e-6)
        similarity = (unit @ unit.T).fill_diagonal_(0)
        mean = similarity.sum(1, keepdim=True) / (len(own) - 1)
        variance = (similarity - mean).square().sum(1) / (len(own) - 1)  # the zero of the diagonal counts
        scaled = variance * ((a * 1000).abs().mean() / (variance.abs().mean() + 1e-6))
        ranks.append(a * 1000 + scaled)
        totals.append((a * 1000 + weight * scaled).mean())
    return torch.cat(ranks), torch.stack(totals)


def quotas(weight: Tensor, sizes: list[int], k: int, overflow: bool = False) -> list[int]:
    """Share k tokens out over chunks.

    Args:
        weight: (c,) of the chunks.
        sizes: of the chunks.
        k: tokens to share out, at most their number.
        overflow: let a quota exceed the size of its chunk, as the release does.
    """
    share = (weight / (weight.sum() + 1e-6 * overflow)).tolist()
    quota, by_share = [int(part * k) for part in share], sorted(range(len(share)), key=lambda i: -share[i])
    for i in by_share[: k - sum(quota)]:
        quota[i] += 1
    if overflow:
        return quota
    quota = [min(q, size) for q, size in zip(quota, sizes, strict=True)]
    while missing := k - sum(quota):
        for i in [i for i in by_share if quota[i] < sizes[i]][:missing]:
            quota[i] += 1
    return quota


@full_precision
def released_order(x: Tensor, attention: Tensor, k: int, chunks: int = 16, weight: float = 0.09) -> Tensor:
    """Return the sequence that the release sends, (k,): indices of the tokens, and -1 for zero vectors at the end."""
    chunk = chunks_of(len(x), chunks, x.device)
    _, total = holistic_score(x, attention, chunk, weight)
    quota = torch.tensor(quotas(total, chunk.bincount().tolist(), k, overflow=True), device=x.device)
    rank = rank_within_groups(attention[None], chunk[None])[0]
    whole = quota >= chunk.bincount()  # such a chunk enters in reading order
    place = torch.where(whole[chunk], torch.arange(len(x), device=x.device), rank + chunk * len(x))
    key = (chunk * len(x) * (chunks + 1) + place).masked_fill(rank >= quota[chunk], torch.iinfo(torch.long).max)
    order = key.argsort(stable=True)[: int((rank < quota[chunk]).sum())]
    return F.pad(order, (0, k - len(order)), value=-1)
