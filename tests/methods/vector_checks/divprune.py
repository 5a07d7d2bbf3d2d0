"""Reference vectors of DivPrune: what the release's selection returns, with its margins.

Two floating-point implementations may part where the best and the second-best score are closer than rounding. So a
pick must be as good as the best at its step, and must be the reference's own as long as every margin so far was clear.

Where the release misbehaves (a token picked twice, a zero row) the check asks for the documented departure instead.
"""

import numpy as np
import torch

from vlmslim.compressor import resolve_keep
from vlmslim.methods.divprune import DivPrune, farthest_points

CLEAR = 1e-5


def check(arrays: dict[str, np.ndarray]) -> None:
    if "ratio" in arrays:
        check_counts(arrays)
        return
    x = arrays["x"]
    budgets = sorted(int(key.removeprefix("order_k")) for key in arrays if key.startswith("order_k"))
    assert budgets, "the file has no picks"
    if "keeps" in arrays:
        assert budgets == sorted(arrays["keeps"].tolist())
    distance, before = distances(x), []
    for k in budgets:
        picks = farthest_points(torch.from_numpy(x), k).tolist()
        assert len(picks) == k == len(set(picks)), f"{k} distinct tokens were asked for: {picks}"
        assert all(0 <= i < len(x) for i in picks)
        assert picks[: len(before)] == before, "a larger budget does not extend a smaller one"
        check_order(arrays, k, picks, distance)
        before = picks
    check_greedy(picks, distance)
    batched = farthest_points(torch.from_numpy(np.stack([x[::-1].copy(), x])), budgets[0])
    assert batched[1].tolist() == farthest_points(torch.from_numpy(x), budgets[0]).tolist()


def distances(x: np.ndarray) -> np.ndarray:
    """(n, n) cosine distances in float64, infinite between a token and itself."""
    x = x.astype(np.float64)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    distance = 1 - x @ x.T
    np.fill_diagonal(distance, np.inf)
    return distance


def scores(distance: np.ndarray, picked: list[int]) -> np.ndarray:
    """(n,): each token's distance to the picked ones, to its nearest neighbour if none is picked yet."""
    nearest = distance[picked].min(0) if picked else distance.min(0)
    nearest[picked] = -np.inf
    return nearest


def check_greedy(picks: list[int], distance: np.ndarray) -> None:
    """Every pick is as far away as any, up to rounding."""
    for step, pick in enumerate(picks):
        score = scores(distance, picks[:step])
        assert score[pick] >= score.max() - CLEAR, f"step {step}: token {pick} is nearer than token {score.argmax()}"


def check_order(arrays: dict[str, np.ndarray], k: int, picks: list[int], distance: np.ndarray) -> None:
    """The picks are the reference's, up to the first step that rounding could decide otherwise."""
    x, want = arrays["x"], arrays[f"order_k{k}"].tolist()
    if np.linalg.norm(x, axis=1).min() == 0:
        return  # a zero row is NaN to the release
    # Rows of +-1 whose norm is a power of two have exact distances: ties are real, and the lowest index wins.
    exact = bool(np.isin(x, (-1, 1)).all()) and np.log2(x.shape[1]) % 2 == 0
    for step in range(k):
        if want[step] in want[:step]:
            return  # the release picks again what it has
        if picks[step] != want[step]:
            score = scores(distance, want[:step])
            rounding = not exact and score[want[step]] >= score.max() - CLEAR
            assert rounding, f"step {step} of {k}: picked {picks[step]}, not {want[step]}"
            return
    assert sorted(picks) == arrays[f"sorted_k{k}"].tolist()


def check_counts(arrays: dict[str, np.ndarray]) -> None:
    """Shares become counts by half-to-even rounding of the double product, at least one where the release has none."""
    for n, ratio, keep in zip(arrays["n"].tolist(), arrays["ratio"].tolist(), arrays["keep"].tolist(), strict=True):
        if n == 0 or not 0 < ratio <= 1:
            continue  # no image, or no share: the methods refuse these
        assert resolve_keep(ratio, n) == max(1, keep), f"{ratio} of {n}"
        if n <= 64:
            DivPrune(keep=ratio)
            picks = farthest_points(torch.randn(n, 4, generator=torch.Generator().manual_seed(n)), max(1, keep))
            assert len(set(picks.tolist())) == max(1, keep)
