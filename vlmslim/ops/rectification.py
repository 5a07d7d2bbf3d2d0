"""Rectification of a selection: "Improving Visual Token Reduction via Rectifying Distortions" (arXiv 2606.01711).

Half of a budget is selected; the other half are anchors among the rest, each the mean of the tokens nearest to it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.ops.ranking import full_precision, membership


@full_precision
def anchor_scores(x: Tensor, superior: str = "released", patch: Tensor | None = None) -> Tensor:
    """Score how well each token represents the others without being represented itself.

    A token's representativeness is the sum of its cosines to all; its redundancy the largest cosine to a token of
    lower representativeness, as the release has it, or of higher, as the paper says; 0 if there is none.

    Args:
        x: (n, d) tokens that were not selected.
        superior: "released" or "paper".
        patch: (n,) False at newlines, which represent nothing and score -inf; None if there are none.

    Returns:
        (n,).
    """
    unit = F.normalize(x, dim=-1)
    patch = torch.ones(len(x), dtype=torch.bool, device=x.device) if patch is None else patch
    cosine = (unit @ unit.T).masked_fill(~patch, 0)
    total = cosine.sum(1)
    counts = (total < total[:, None] if superior == "released" else total > total[:, None]) & patch
    redundancy = torch.where(counts.any(1), cosine.masked_fill(~counts, float("-inf")).amax(1), 0)
    return (total * (1 - redundancy)).masked_fill(~patch, float("-inf"))


@full_precision
def merge_rest(
    x: Tensor, kept: Tensor, k: int, superior: str = "released", patch: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Add merged tokens to a selection: each patch that was not selected joins the anchor of largest cosine.

    If there are fewer patches than anchors, newlines fill up. A newline stands for itself alone. All counts follow from
    the arguments' shapes, so nothing waits for the device.

    Args:
        x: (n, d) tokens.
        kept: (j,) the selected ones.
        k: number of tokens in all, j < k <= n.
        superior: see `anchor_scores`.
        patch: (n,) False at newlines; None if there are none.

    Returns:
        (k, d) kept tokens and means, (k,) their places, ascending, (k,) how many tokens each stands for, and (n,) which
        of the k each token went into, -1 for none. A mean stands at the lower median of the places of its tokens.
    """
    n, made = len(x), k - len(kept)
    selected = torch.zeros(n, dtype=torch.bool, device=x.device).index_fill(0, kept, True)
    free = selected.byte().argsort(stable=True)[: n - len(kept)]
    unit = F.normalize(x[free], dim=-1)
    joining = torch.ones_like(selected)[free] if patch is None else patch[free]
    anchors = anchor_scores(x[free], superior, joining).argsort(descending=True, stable=True)[:made]
    nearest = (unit @ unit[anchors].T).masked_fill(~joining[anchors], float("-inf")).argmax(1)
    own = torch.arange(made, device=x.device)
    group = torch.where(joining, nearest, made).index_copy(0, anchors, own)  # `made` is no group
    joins = membership(group, made).to(x)
    size = joins.sum(1).long()
    order = group.argsort(stable=True)  # group by group, places ascending
    median = free[order[size.cumsum(0) - size + (size - 1) // 2]]
    place, rank = torch.cat([kept, median]).sort()
    features = torch.cat([x[kept], joins @ x[free] / size[:, None]])
    where = F.pad(rank.argsort(), (0, 1), value=-1)
    into = where.new_empty(n)
    into[kept], into[free] = where[: len(kept)], where[len(kept) + group]
    return features[rank], place, torch.cat([torch.ones_like(kept), size])[rank], into


def distance_decay(distance: Tensor, frequencies: Tensor) -> Tensor:
    """Compute the mean cosine by which rotary positions turn a query and a key away from each other.

    Args:
        distance: (...,) of the positions, or (..., f) one for each frequency.
        frequencies: (f,).

    Returns:
        (...,).
    """
    angle = distance if distance.ndim and distance.shape[-1:] == frequencies.shape else distance[..., None]
    return (angle * frequencies).cos().mean(-1)


def merged_key_bias(query: Tensor, key: Tensor, size: Tensor, frequencies: Tensor, c: float = 2.0) -> Tensor:
    """Compute what the paper adds to attention logits, so that a merged key counts for its tokens (equation 4).

    Args:
        query: (q,) positions.
        key: (m,) positions.
        size: (m,) how many tokens each key stands for.
        frequencies: (f,) of the rotary embedding.
        c: above 1.

    Returns:
        (q, m).
    """
    return size.log() + (c - distance_decay((query[:, None] - key).abs(), frequencies)).log()
