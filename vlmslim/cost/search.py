"""Search for the value of an option whose cost is nearest to a target, with few measurements."""

import math
from collections.abc import Callable


def search_nearest(
    cost: Callable[[int], float],
    size: int,
    target: float,
    start: int | None = None,
    max_calls: int | None = None,
    tolerance: float = 0.0,
) -> tuple[int, float]:
    """Find the index whose cost is nearest to a target, by interpolation and then bisection.

    Args:
        cost: the cost of an index 0 .. size - 1; it never falls as the index grows.
        size: number of indices.
        target: the cost wanted.
        start: first guess; by default the middle.
        max_calls: largest number of calls of `cost`.
        tolerance: relative error at which the search ends early.

    Returns:
        The index and its cost. Without `max_calls` and `tolerance` no index is nearer; of equals, the lowest one tried.
    """
    low, high = 0, size - 1
    guess = (low + high) // 2 if start is None else start
    seen: dict[int, float] = {}
    while low <= high and (max_calls is None or len(seen) < max_calls):
        seen[guess] = found = cost(guess)
        if abs(found - target) <= tolerance * target:
            break
        low, high = (guess + 1, high) if found < target else (low, guess - 1)
        below, above = low - 1, high + 1
        guess = (low + high) // 2
        if len(seen) < 6 and -math.inf < seen.get(below, math.inf) < seen.get(above, -math.inf):
            slope = (above - below) / (seen[above] - seen[below])
            guess = min(max(round(below + (target - seen[below]) * slope), low), high)
    best = min(sorted(seen), key=lambda i: abs(seen[i] - target))
    return best, seen[best]
