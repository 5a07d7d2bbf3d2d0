"""Reference vectors `tops_*`: selection orders, text raters and ties (own reference)."""

import numpy as np
import torch

from vlmslim.methods.tops import preserve, text_relevance


def check(arrays: dict[str, np.ndarray]) -> None:
    if "attention" in arrays:
        check_raters(arrays)
        return
    h, relevance = torch.from_numpy(arrays["h"])[None], torch.from_numpy(arrays["relevance"])[None]
    for j, weights in enumerate(zip(arrays["alpha"].tolist(), arrays["lam"].tolist(), strict=True)):
        for normalise in ("mean", "minmax", "fixed"):
            if f"order_{normalise}_{j}" in arrays:
                want, safe = arrays[f"order_{normalise}_{j}"], int(arrays[f"safe_{normalise}_{j}"])
                got = preserve(h, relevance, len(want), *weights, normalise)[0].numpy()
                assert len(set(got)) == len(got)
                np.testing.assert_array_equal(got[:safe], want[:safe], err_msg=f"{normalise} {weights}")
                for k in arrays["budgets"].tolist():
                    np.testing.assert_array_equal(preserve(h, relevance, k, *weights, normalise)[0].numpy(), got[:k])


def check_raters(arrays: dict[str, np.ndarray]) -> None:
    paid = torch.from_numpy(arrays["attention"]).mean(0)
    np.testing.assert_allclose(paid.sum(1).numpy(), arrays["mass"], rtol=1e-5)
    mass = paid.sum(1)
    assert (mass >= mass.mean()).nonzero()[:, 0].tolist() == arrays["raters"].tolist()
    for name, raters in (("", "above_mean"), ("_all", "all"), ("_last", "last")):
        np.testing.assert_allclose(text_relevance(paid, raters).numpy(), arrays[f"relevance{name}"], atol=1e-6)
    h, k = torch.from_numpy(arrays["h"])[None], int(arrays["budget"])
    order = preserve(h, text_relevance(paid)[None], k, float(arrays["alpha"]), float(arrays["lam"]))[0].numpy()
    close = arrays["margin"] < 1e-5
    safe = int(close.argmax()) if close.any() else k
    np.testing.assert_array_equal(order[:safe], arrays["order"][:safe])
    if safe == k:
        np.testing.assert_array_equal(np.sort(order), arrays["kept"])
