"""Recoverable Compression in plain loops, float64: outliers, and one step of the specification after the other."""

from hypothesis import assume, currently_in_test_context
from strategies import cosine

from vlmslim.methods.recoverable import Recoverable
from vlmslim.ops.budgets import largest_remainder


def factor_by_hand(x: list[float], k: int) -> list[float]:
    n = len(x)
    k = min(k, n - 1)
    if k < 1:
        return [1.0] * n
    near = [sorted((j for j in range(n) if j != i), key=lambda j: (abs(x[i] - x[j]), x[j], j))[:k] for i in range(n)]
    far = [abs(x[i] - x[near[i][-1]]) for i in range(n)]
    density = [1 / (sum(max(far[j], abs(x[i] - x[j])) for j in near[i]) / k + 1e-10) for i in range(n)]
    return [sum(density[j] for j in near[i]) / k / density[i] for i in range(n)]


def sure(clear: bool) -> None:
    """A decision that the last bits of a float would take is no test."""
    if currently_in_test_context():
        assume(clear)
    assert clear


def outliers_by_hand(x: list[float], k: int) -> int:
    factors = factor_by_hand(x, k)
    sure(all(abs(f - 1.5) > 1e-9 for f in factors))
    return sum(f > 1.5 for f in factors)


def best(score: list[float], k: int, among=None) -> list[int]:
    return sorted(range(len(score)) if among is None else among, key=lambda i: (-score[i], i))[:k]


def recover_by_hand(x, a, t, keys, method: Recoverable, budget: int | None):
    """Return the kept tokens and the merged vectors."""
    n, width = len(x), len(x[0])
    parts = largest_remainder(budget, method.shares) if budget else None
    first, second, third = method.neighbours
    seen = best(a, parts[0] if parts else outliers_by_hand(a, first))
    unseen = [i for i in range(n) if i not in seen]
    if parts:
        found = best(t, parts[1], unseen)
    elif method.recovery == "all":
        found = best(t, outliers_by_hand(t, second))
    else:
        if method.recovery == "minimum":
            count = int(len(unseen) * (outliers_by_hand([min(t) if i in seen else t[i] for i in range(n)], second) / n))
        else:
            count = outliers_by_hand([t[i] for i in unseen], second)
        found = best(t, count, unseen)
    kept = sorted({*seen, *found})
    rest = [i for i in range(n) if i not in kept]
    if parts:
        count = max(parts[2] - 1, 0)
    else:
        number = outliers_by_hand([a[i] for i in rest], third)
        base = {"rest": len(rest), "selected": len(kept), "image": n, "width": width}[method.centres]
        count = number if method.centres == "rest" else int(base * (number / len(rest)))
        count = min(count, len(rest))
    centres = best(a, count, rest)
    others = [i for i in rest if i not in centres]
    key = {i: keys[i] if method.keys == "own" else keys[place] for place, i in enumerate(rest)}
    merged = []
    for c in centres:
        pool = [i for i in centres if i != c] + others
        affinity = {i: cosine(key[c], key[i]) + method.text_weight * t[i] for i in pool}
        ranked = sorted(pool, key=lambda i: -affinity[i])
        members = ranked[: method.cluster]
        if len(ranked) > len(members) and members:
            sure(affinity[members[-1]] - affinity[ranked[len(members)]] > 1e-4)
        merged.append([x[c][d] + sum(a[i] * x[i][d] for i in members) for d in range(width)])
    if others and (parts[2] > 0 if parts else centres or method.extra == "keep"):
        merged.append([sum(a[i] * x[i][d] for i in others) for d in range(width)])
    return kept, merged
