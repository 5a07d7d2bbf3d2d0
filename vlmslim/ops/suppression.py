"""Greedy suppression (NMS): of tokens that are in conflict, the one of highest score stays."""

import torch
from torch import Tensor


def unsuppressed(conflict: Tensor, score: Tensor) -> Tensor:
    """Take tokens by falling score, unless they are in conflict with one taken before; ties go to the lower index.

    Each token waits for those before it, so the loop runs on the host: there, a step takes a microsecond.

    Args:
        conflict: (n, n) bool, symmetric.
        score: (n,).

    Returns:
        (n,) bool, True at the tokens taken.
    """
    order = score.argsort(descending=True, stable=True).tolist()
    table, alive = conflict.cpu().numpy(), torch.ones(len(order), dtype=torch.bool).numpy()
    for i in order:
        if alive[i]:
            alive &= ~table[i]
            alive[i] = True
    return torch.from_numpy(alive).to(score.device)
