"""Reference vectors `mmr_*`: selection orders of IDPruner's released selector with a given importance."""

import numpy as np
import torch

from vlmslim.methods.mmr import marginal_relevance, scaled

CLEAR = 2e-6


def check(arrays: dict[str, np.ndarray]) -> None:
    x, raw = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["importance"])
    importance = scaled(raw, torch.zeros(len(raw), dtype=torch.long))
    checked = 0
    for i, ratio in enumerate(arrays["ratios"].tolist()):
        for j, weight in enumerate(arrays["lams"].tolist()):
            for q, at_once in enumerate(arrays["parallel"].tolist()):
                if f"order_{i}_{j}_{q}" not in arrays:
                    continue
                want = arrays[f"order_{i}_{j}_{q}"]
                k = len(want)
                assert k == (round((1 - ratio) * len(x)) or 1)
                got = marginal_relevance(x[None], importance[None], k, weight, at_once)[0].numpy()
                assert len(set(got)) == k
                close = arrays[f"margin_{i}_{j}_{q}"] <= CLEAR
                safe = int(close.argmax()) // at_once * at_once if close.any() else k
                np.testing.assert_array_equal(got[:safe], want[:safe])
                if safe == k:
                    np.testing.assert_array_equal(np.sort(got), arrays[f"keep_{i}_{j}_{q}"])
                    checked += 1
    assert checked, "no order of this file is clear to its end"
