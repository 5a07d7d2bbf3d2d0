"""Reference vectors `agilepruner_*`: effective rank, walks, survivors and budgets of images (own reference)."""

import numpy as np
import torch

from vlmslim.methods.agilepruner import walk
from vlmslim.ops.effective_rank import adapted, effective_rank


def check(arrays: dict[str, np.ndarray]) -> None:
    x, attention = torch.from_numpy(arrays["x"])[None], torch.from_numpy(arrays["attention"])[None]
    rank, average, n = float(arrays["erank"]), float(arrays["erank_avg"]), len(arrays["x"])
    np.testing.assert_allclose(effective_rank(x).item(), rank, rtol=1e-4)
    slope = torch.tensor([rank / average * float(arrays["slope"])])
    limit = torch.tensor([float(arrays["tau_max"])])
    whole = walk(x, attention, n, slope, limit)[0].numpy()
    place = np.argsort(np.argsort(-arrays["attention"], kind="stable"))
    falls = np.flatnonzero(np.diff(place[whole]) < 0)  # where the walk ends and filling begins
    survivors = whole[: falls[0] + 1] if len(falls) else whole
    np.testing.assert_array_equal(np.sort(survivors), arrays["survivors"])
    for k in arrays["budgets"].tolist():
        assert arrays[f"margin_{k}"] > 2e-5
        got = walk(x, attention, k, slope, limit)[0].numpy()
        np.testing.assert_array_equal(got, arrays[f"order_{k}"])
        np.testing.assert_array_equal(np.sort(got), arrays[f"kept_{k}"])
        assert min(k, len(survivors)) == arrays[f"own_{k}"]
    assert adapted(int(arrays["auto_base"]), n, rank, average) == arrays["auto_keep"]
