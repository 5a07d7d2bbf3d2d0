"""Split a budget of tokens into whole numbers."""

from collections.abc import Sequence


def share_out(k: int, sizes: Sequence[int]) -> list[int]:
    """Split a budget of k over components in proportion to their sizes, by largest remainder.

    Ties go to the earlier component. The parts sum to k, and no part exceeds its component.

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
