"""Split a budget of tokens into whole numbers."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise


def share_out(k: int, sizes: Sequence[int], to_all: bool = False) -> list[int]:
    """Split a budget of k over components in proportion to their sizes, by largest remainder.

    Ties go to the earlier component. The parts sum to k, and no part exceeds its component. With `to_all`, if k
    suffices, components without a part get 1 each from the largest parts, those of smaller components on ties.

    Raises:
        ValueError: k exceeds the sum of the sizes.
    """
    total = sum(sizes)
    if k > total:
        raise ValueError(f"cannot keep {k} of {total} tokens; use at most {total}")
    parts = [k * size // total for size in sizes]
    remainders = sorted(range(len(sizes)), key=lambda i: -(k * sizes[i] % total))
    for i in remainders[: k - sum(parts)]:
        parts[i] += 1
    while to_all and 0 in parts and k >= len(parts):
        parts[max(range(len(parts)), key=lambda i: (parts[i], -sizes[i]))] -= 1
        parts[parts.index(0)] += 1
    return parts


def largest_remainder(k: int, shares: Sequence[float]) -> list[int]:
    """Split k by shares that sum to 1.

    Each part is rounded down. The rest goes to the parts with the largest remainders, to earlier ones on ties.
    """
    exact = [round(k * share, 9) for share in shares]
    parts = [int(part) for part in exact]
    for i in sorted(range(len(parts)), key=lambda i: parts[i] - exact[i])[: k - sum(parts)]:
        parts[i] += 1
    return parts


def share_within_limits(k: int, weights: Sequence[int], lower: Sequence[int], upper: Sequence[int]) -> list[int]:
    """Split k over components: to each its lower limit, and of the rest a part in proportion to its weight.

    Cumulative sums are rounded half to even. What upper limits cut off goes to components with room, those of larger
    weight first, then earlier ones.
    """
    rest, total = max(0, k - sum(lower)), max(1, sum(weights))
    ends = [round(Fraction(rest * done, total)) for done in accumulate(weights)]
    parts = [end - start for start, end in pairwise([0, *ends])]
    shares = [min(least + part, limit) for least, part, limit in zip(lower, parts, upper, strict=True)]
    for i in sorted(range(len(shares)), key=lambda i: -weights[i]):
        shares[i] += max(0, min(upper[i] - shares[i], k - sum(shares)))
    return shares
