"""Random numbers on any device from what is in a tensor: the same bits everywhere, and no waiting for the device."""

import torch
from torch import Tensor
from torch.nn import functional as F

# Odd constants of 64 bits. Integers wrap around, and sums of integers do not depend on their order.
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
BLOCK = 4096  # numbers that share one set of weights, because making weights takes most of the time


def digest(x: Tensor) -> Tensor:
    """Hash the numbers of a tensor, read as fp32, and their order: an integer of 64 bits, ()."""
    bits = x.detach().float().contiguous().view(torch.int32).flatten()
    rows = F.pad(bits, (0, -len(bits) % BLOCK)).view(-1, BLOCK).long()
    return _mixed(_weighted_sum(_mixed(_weighted_sum(rows))) + len(bits))


def _weighted_sum(x: Tensor) -> Tensor:
    """Sum integers (..., n) with weights that differ from place to place: (...)."""
    weight = torch.arange(1, x.shape[-1] + 1, device=x.device) * _signed(GOLDEN)
    weight = (weight ^ _shifted(weight, 32)) * _signed(FIRST) | 1  # odd, so that no bit of a number gets lost
    return (x * weight).sum(-1)


def uniform(digest: Tensor, seed: int, count: int) -> Tensor:
    """Draw independent random numbers in [0, 1) by SplitMix64: (count,) fp64.

    Args:
        digest: () integer from which, with the seed, all numbers follow.
        seed: any integer.
        count: number of numbers.
    """
    start = _mixed(digest ^ _mixed(torch.full_like(digest, _signed(seed * GOLDEN))))
    steps = torch.arange(1, count + 1, device=digest.device) * _signed(GOLDEN)
    return _shifted(_mixed(start + steps), 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    """Turn integers into others, one to one, so that all bits of each depend on all of its bits before."""
    x = (x ^ _shifted(x, 30)) * _signed(FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(SECOND)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift integers to the right, and fill up with zeros."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """Return the integer with the same 64 bits that PyTorch can hold."""
    return (x + 2**63) % 2**64 - 2**63
