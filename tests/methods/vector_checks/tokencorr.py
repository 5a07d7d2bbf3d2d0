"""TokenCorr: vectors of the project's own float64 reading of the paper; there is no official code."""

import numpy as np
import torch

from vlmslim.methods.tokencorr import View, absorb, gumbel, repetition


def check(arrays: dict[str, np.ndarray]) -> None:
    t = {k: torch.from_numpy(v) for k, v in arrays.items() if v.ndim}
    n = len(t["keys"])
    alpha, beta, neighbours = (float(arrays[k]) for k in ("alpha", "beta_frac", "knn"))
    at = torch.arange(n)
    # beta travelled as fp32: a count on the boundary must fall as the decimal number says
    limit = int(float(f"{beta:.6g}") * n)
    repeat = repetition(t["keys"], limit)
    for mode, draw in (("topk", t["a_low"]), ("gumbel", gumbel(t["a_low"], t["u"]))):
        want = {k.split(".", 1)[1]: v for k, v in arrays.items() if k.startswith(mode + ".")}
        view = View(at, t["keys"], repeat, t["a_low"], t["a_deep"], draw, 1.5)
        redundant = repeat > alpha
        assert redundant.tolist() == want["redundant"].tolist()
        assert redundant.tolist() == (want["count"] > limit).tolist()
        assert view.samples(alpha) == int(want["m"])
        np.testing.assert_allclose(1 - redundant.double().mean(), want["density"], atol=1e-6)
        local = view.ranked[: view.samples(alpha)]
        assert local.sort().values.tolist() == np.sort(want["local"]).tolist()
        assert view.outlier.nonzero()[:, 0].tolist() == np.sort(want["glob"]).tolist()
        keep = view.keep(alpha)
        assert keep.nonzero()[:, 0].tolist() == want["keep"].tolist()
        np.testing.assert_array_equal(t["x"][keep].numpy(), want["y_none"])
        for merge in ("knn", "assign"):
            y = t["x"][keep]
            if not keep.all():
                y = absorb(t["x"], t["keys"], t["a_low"], keep, merge, int(neighbours))[keep]
            np.testing.assert_allclose(y.numpy(), want[f"y_{merge}"], rtol=1e-4, atol=1e-5)
