"""Random numbers from pixels, against Python's own integers, and as fair as draws have to be."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import noise, seeds, some

from vlmslim.ops.noise import BLOCK, digest, uniform

MASK = 2**64 - 1


def mixed(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def split_mix(state: int, count: int) -> list[float]:
    """SplitMix64 with integers."""
    return [(mixed(state + 0x9E3779B97F4A7C15 * (j + 1) & MASK) >> 11) / 2**53 for j in range(count)]


def test_the_generator_is_split_mix():
    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first number from 0, as published
    for key, seed in ((0, 0), (-5, 3), (2**62, -1), (7, 2**70)):
        start = mixed(key & MASK ^ mixed(seed * 0x9E3779B97F4A7C15 & MASK))
        assert uniform(torch.tensor(key), seed, 9).tolist() == split_mix(start, 9)


@some
@given(seeds, st.integers(0, 59))
def test_each_number_and_its_place_count(seed, at):
    x = noise(seed, 3, 4, 5)
    other, swapped = x.clone(), x.flatten().clone()
    other.view(-1)[at] += 1e-6
    swapped[[at, (at + 1) % 60]] = swapped[[(at + 1) % 60, at]]
    found = {int(digest(y)) for y in (x, other, swapped, x[:2])}
    assert len(found) == 4
    zeros = torch.zeros(2 * BLOCK + at)  # numbers of several blocks
    far = [zeros.index_fill(0, torch.tensor(i), 1.0) for i in (at, BLOCK + at)]
    assert len({int(digest(y)) for y in (zeros, zeros[:-1], *far)}) == 4
    assert digest(x.bfloat16()) == digest(x.bfloat16().float()) and digest(x) == digest(x.double())
    assert digest(x.transpose(0, 2)) == digest(x.transpose(0, 2).contiguous())


def chi_square(counts: torch.Tensor, expected: float) -> float:
    """In standard deviations of its distribution, which many cells make nearly normal."""
    statistic, freedom = ((counts - expected) ** 2 / expected).sum(), counts.numel() - 1
    return float((statistic - freedom) / (2 * freedom) ** 0.5)


@pytest.mark.parametrize("by", ["seed", "pixels"])
def test_draws_are_uniform(by):
    """1,500 draws of 4 of 16: each token and each pair are kept equally often, and neighbouring seeds do not agree."""
    x, draws, n, k = torch.zeros(6), 1500, 16, 4
    kept, numbers = torch.zeros(draws, n), []
    for i in range(draws):
        x[0] = i if by == "pixels" else 0
        numbers.append(uniform(digest(x), i if by == "seed" else 0, n))
        kept[i, numbers[-1].argsort()[:k]] = 1
    together = kept.T @ kept
    # what is kept is drawn without replacement, which makes these sums smaller than those of independent counts
    assert -6 < chi_square(together.diagonal(), draws * k / n) < 4
    assert -6 < chi_square(together[torch.ones(n, n).triu(1).bool()], draws * k * (k - 1) / (n * (n - 1))) < 4
    agree = (kept[1:] * kept[:-1]).sum(1).mean()
    assert abs(agree - k * k / n) < 5 * 0.83 / draws**0.5  # the hypergeometric deviation is 0.775
    cells = (torch.stack(numbers) * 32).long().flatten().bincount(minlength=32)
    assert abs(chi_square(cells, draws * n / 32)) < 4
