"""The sums into which `Recoverable` merges the tokens that it does not keep: around centres, and one of the others."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.ops.ranking import full_precision


@dataclass(frozen=True)
class Groups:
    """The work of `Recoverable` on the n tokens of one crop: it keeps some, and sums the rest in groups.

    kept    : (m,) tokens that stay as they are, ascending
    rest    : (r,) the others, ascending
    centres : (j,) places in `rest`
    taken   : (j, r) weights by which each centre takes in the rest
    others  : (o,) places in `rest` that the extra token sums; None without such a token
    weight  : (o,) their weights
    """

    kept: Tensor
    rest: Tensor
    centres: Tensor
    taken: Tensor
    others: Tensor | None = None
    weight: Tensor | None = None

    @classmethod
    def of_all(cls, weight: Tensor) -> "Groups":
        """Sum all n tokens with these weights (n,) into the extra token."""
        none, every = (torch.arange(n, device=weight.device) for n in (0, len(weight)))
        return cls(none, every, none, weight.new_zeros(0, len(weight)), every, at_least_tiny(weight))

    def sums(self, x: Tensor) -> Tensor:
        """Sum tokens x (n, v) group by group, the extra token last. The sums of an identity matrix are the weights."""
        rest = x[self.rest]
        merged = [rest[self.centres] + self.taken @ rest]
        if self.others is not None and self.weight is not None:
            merged.append(weighted_sum(rest[self.others], self.weight))
        return torch.cat(merged)


def parts_of(n: int, kept: Tensor, crops: list[Tensor], groups: list[Groups]) -> Tensor:
    """Return how much of each of an image's n tokens is in each token that is sent, as `Compressed.made_of`.

    Args:
        n: number of tokens of the image.
        kept: (m,) those that stay as they are; they come first.
        crops: of each crop, the places of its tokens in the image.
        groups: of each crop.
    """
    rows = [torch.eye(n)[kept.cpu()]]
    for slots, group in zip(crops, groups, strict=True):
        weights = group.sums(torch.eye(len(slots), device=group.taken.device)).cpu()
        rows.append(torch.zeros(len(weights), n).index_copy(1, slots, weights))
    return torch.cat(rows)


def top(score: Tensor, k: int) -> Tensor:
    """Return the indices of the k highest scores (n,), highest first, lower index first on ties."""
    return score.argsort(descending=True, stable=True)[:k]


@full_precision
def clusters(
    attention: Tensor, similarity: Tensor, keys: Tensor, centres: Tensor, size: int, text_weight: float
) -> Tensor:
    """Compute the weights by which each centre takes in tokens: their attention if they are near, else 0.

    A token is near a centre if its key is similar and if it resembles the text. Other centres may be near too.

    Args:
        attention: (n,) what CLS pays to each token.
        similarity: (n,) to the text.
        keys: (n, v).
        centres: (j,) indices.
        size: how many tokens a centre takes in, if there are that many.
        text_weight: weight of `similarity` against the cosine of keys.

    Returns:
        (j, n) weights.
    """
    n = len(attention)
    keys = F.normalize(keys.float(), dim=-1)
    affinity = keys[centres] @ keys.T + text_weight * similarity.float()
    affinity.scatter_(1, centres[:, None], float("-inf"))
    place = torch.full((n,), len(centres), device=keys.device)
    place[centres] = torch.arange(len(centres), device=keys.device)
    order = place.argsort(stable=True)  # ties: other centres first, in their order, then by index
    members = order[affinity[:, order].argsort(dim=1, descending=True, stable=True)[:, : min(size, max(n - 1, 0))]]
    return torch.zeros_like(affinity).scatter_(1, members, at_least_tiny(attention[members]))


def at_least_tiny(attention: Tensor) -> Tensor:
    """Replace zeros, to which a softmax may underflow, so that every weight above 0 marks a part of a sum."""
    return attention.clamp(min=torch.finfo(attention.dtype).tiny)


def weighted_sum(x: Tensor, weight: Tensor) -> Tensor:
    """Sum tokens x (n, v) times weight (n,): (1, v)."""
    return weight[None].to(x) @ x
