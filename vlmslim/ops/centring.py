"""Centring ("Centering before Pruning"): cosines around the mean token, and the weight that goes with them."""

import torch
from torch import Tensor

from vlmslim.ops.greedy import cosine_matrix
from vlmslim.ops.ranking import full_precision


@full_precision
def centred(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Subtract the mean token of each image, and weigh tokens by how little they resemble the others.

    Raw cosines crowd near 1. Without the mean they tell tokens apart, but lose which token is distinctive; the weight
    gives that back. It is minus the mean raw cosine to the other tokens, scaled to [0, 1].

    Args:
        x: (b, n, d).
        eps: keeps equal tokens from a division by zero.

    Returns:
        (b, n, d) without the mean, and (b, n) the weights.
    """
    distinctive = distinctiveness(x)
    low, high = distinctive.amin(1, keepdim=True), distinctive.amax(1, keepdim=True)
    return x - x.mean(1, keepdim=True), (distinctive - low) / (high - low + eps)


@full_precision
def standardised(x: Tensor, eps: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Do what `centred` does for towers whose variance sits in a few coordinates.

    Each coordinate is divided by its standard deviation over the image, and weights are a sigmoid of the standardised
    distinctiveness. The arguments are those of `centred`.
    """
    x = x / (x.var(1, keepdim=True, unbiased=False) + eps).sqrt()
    distinctive = distinctiveness(x)
    spread = distinctive.std(1, keepdim=True, unbiased=False)
    return x - x.mean(1, keepdim=True), torch.sigmoid(
        (distinctive - distinctive.mean(1, keepdim=True)) / (spread + eps)
    )


def distinctiveness(x: Tensor) -> Tensor:
    """Compute minus the mean cosine of each token to the others of its image: (b, n, d) -> (b, n)."""
    cosine = cosine_matrix(x)
    own = (cosine.diagonal(dim1=1, dim2=2) > 0).float()  # 1, and 0 of a zero token
    return (own - cosine.sum(2)) / max(1, x.shape[1] - 1)
