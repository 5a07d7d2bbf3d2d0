"""The losses that train ATP's modules for a budget of visual tokens, equations 12 and 13 of arXiv 2412.00447."""

from collections.abc import Sequence

from torch import Tensor


def depth_loss(counts: Tensor, layers: Sequence[int], full: float) -> Tensor:
    """Compute equation 12: tokens left by each module, as a share of the image, weighted by the module's layer.

    Args:
        counts: (N, modules) tokens of N images after each module.
        layers: the decoder layer, from 0, that each module follows.
        full: tokens of an image before the first module.
    """
    return (counts.mean(0) / full * counts.new_tensor(layers)).sum()


def mean_tokens(counts: Tensor, layers: Sequence[int], full: float, depth: int | None = None) -> Tensor:
    """Average the tokens of each image over the modules; or, given the `depth`, over all decoder layers.

    Args:
        counts: (N, modules) tokens of N images after each module.
        layers: the decoder layer, from 0, that each module follows.
        full: tokens of an image before the first module.
        depth: number of decoder layers.

    Returns:
        (N,).
    """
    if depth is None:
        return counts.mean(1)
    starts = [0, *(layer + 1 for layer in layers), depth]
    spans = counts.new_tensor([b - a for a, b in zip(starts, starts[1:], strict=False)])
    return (full * spans[0] + (counts * spans[1:]).sum(1)) / depth


def target_loss(average: Tensor, target: float) -> Tensor:
    """Compute equation 13: how far the mean of token counts (N,) is from the target. Images may differ freely."""
    return (average.mean() - target).abs()
