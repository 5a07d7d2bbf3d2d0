"""Padding in pictures, found by its colour."""

import torch
from torch import Tensor


def in_padding(pixels: Tensor, side: int) -> Tensor:
    """Find the patches of the padding that made pictures square, from normalised pixels (c, 3, h, h).

    Padding has the processor's mean colour, which is 0. It fills whole lines of pixels on two opposite sides, of which
    the second has one more if their number is odd. Resizing blurs the edge of the picture.

    Args:
        pixels: of each picture.
        side: rows of patches.

    Returns:
        (c, side x side) bool, True at rows and at columns of patches that are padding.
    """
    size = pixels.shape[-1] // side
    strength = pixels[..., : side * size, : side * size].float().abs().amax(1)
    place, found = torch.arange(side, device=pixels.device), []
    for axis in (2, 1):
        lines = strength.mean(axis)
        first, second = margin(lines), margin(lines.flip(1))
        total = (first + second).round()
        before = torch.minimum(total // 2, first.ceil())[:, None] // size
        after = torch.minimum(total - total // 2, second.ceil())[:, None] // size
        found.append((place < before) | (place >= side - after))
    return (found[0][:, :, None] | found[1][:, None]).flatten(1)


def margin(lines: Tensor) -> Tensor:
    """Measure the padding before the picture in lines and fractions of a line, from what is in each, (c, h): (c,).

    A blurred line at the edge is picture by the part that it has of the line two farther in.
    """
    part = (lines / lines.roll(-2, 1).clamp(min=1e-6)).clamp(max=1)
    part = part.masked_fill((lines < 0.02) | (part < 0.05), 0)
    return ((1 - part) * (part < 0.9).long().cumprod(1)).sum(1)
