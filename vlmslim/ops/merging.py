"""Merge tokens into those that they resemble most."""

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.ops.ranking import full_precision


@full_precision
def nearest(x: Tensor, others: Tensor, targets: Tensor, group: Tensor | None = None) -> Tensor:
    """Find the target of largest cosine for each of some tokens, the first one on ties.

    Args:
        x: (n, d) what similarity is measured on.
        others: (m,) the tokens that look for a target.
        targets: (c,) the tokens that take others in.
        group: (n,) tokens join targets of their own group, and those of group -1 join none; None if any may join.

    Returns:
        (m,) the target that each joins, -1 for none.
    """
    unit = F.normalize(x, dim=-1)
    cosine = unit[others] @ unit[targets].T
    if group is None:
        return targets[cosine.argmax(1)]
    allowed = (group[others][:, None] == group[targets]) & (group[others] >= 0)[:, None]
    return targets[cosine.masked_fill(~allowed, float("-inf")).argmax(1)].where(allowed.any(1), -1)


def sum_joined(x: Tensor, others: Tensor, joined: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Sum the tokens that joined each target, in fp32.

    Args:
        x: (n, d) tokens.
        others: (m,) tokens that may have joined a target.
        joined: (m,) the target that each joined, -1 for none.
        targets: (c,) the targets.

    Returns:
        (c, d) sums, and (c, 1) how many tokens are in each.
    """
    joins = (joined == targets[:, None]).float()  # a product, because a scatter on a GPU sums in no fixed order
    with torch.autocast(x.device.type, enabled=False):
        return joins @ x[others].float(), joins.sum(1, keepdim=True)


def ended(n: int, index: Tensor, others: Tensor, joined: Tensor) -> Tensor:
    """Return where each token of an image ended up, as `Compressed.into`.

    Args:
        n: number of tokens of the image.
        index: (k,) those that are sent.
        others: (m,) tokens that may have joined one of these.
        joined: (m,) the token that each joined, -1 for none.
    """
    into = torch.full((n,), -1, device=index.device)
    into[index] = torch.arange(len(index), device=index.device)
    into[others] = into[joined].where(joined >= 0, -1)
    return into
