"""Groups of tokens, ranks within them, and a decorator that keeps scores in full precision."""

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

Options = ParamSpec("Options")
Result = TypeVar("Result", bound=Tensor | tuple[Tensor, ...])
Score = Callable[Concatenate[Tensor, Options], Result]


def full_precision(function: Score[Options, Result]) -> Score[Options, Result]:
    """Run a scoring function in fp32 and without gradients, whatever the model runs in.

    The decorator casts the first argument, and switches autocast off. It is needed because the distances between
    similar tokens drown in the rounding of half precision, so that other tokens would be picked.
    """

    @wraps(function)
    def scored(x: Tensor, /, *args: Options.args, **kwargs: Options.kwargs) -> Result:
        with torch.autocast(x.device.type, enabled=False), torch.no_grad():
            return function(x.float(), *args, **kwargs)

    return scored


def membership(group: Tensor, groups: int) -> Tensor:
    """Tell which tokens are in each group: (groups, n) bool of the groups (n,), where -1 is none.

    A product with it sums within groups. Unlike scattered sums, products on a GPU repeat to the last bit.
    """
    return group == torch.arange(groups, device=group.device)[:, None]


def rank_within_groups(score: Tensor, group: Tensor) -> Tensor:
    """Rank each element among those of its row and group: 0 for the highest score, ties to the lower index.

    Args:
        score: (B, S).
        group: (B, S) non-negative integers.

    Returns:
        (B, S) long.
    """
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, group.gather(1, order).argsort(dim=1, stable=True))  # by group, then by score
    grouped = group.gather(1, order)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    first = torch.searchsorted(grouped, grouped)  # where the group of each element begins
    return torch.empty_like(order).scatter_(1, order, place - first)
