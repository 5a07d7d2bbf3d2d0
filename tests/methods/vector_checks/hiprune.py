"""Reference vectors `hiprune_*`: attention received, anchors, and what the release keeps."""

import numpy as np
import torch

from vlmslim.methods.hiprune import HiPrune, buffers_by_index
from vlmslim.ops.attention import received_attention

CLEAR = 1e-6


def check(arrays: dict[str, np.ndarray]) -> None:
    t = {name: torch.from_numpy(arrays[name]) for name in ("q_object", "k_object", "q_deep", "k_deep")}
    middle = received_attention(t["q_object"], t["k_object"])[:, 1:]
    late = received_attention(t["q_deep"], t["k_deep"])[:, 1:]
    np.testing.assert_allclose(middle.numpy(), arrays["received_object"], atol=1e-6)
    np.testing.assert_allclose(late.numpy(), arrays["received_deep"], atol=1e-6)
    # Decide on the file's own scores, because a cut may hang on the last bits of a softmax.
    middle, late = (torch.from_numpy(arrays[f"received_{name}"]) for name in ("object", "deep"))
    crops, n = middle.shape
    side = int(n**0.5)
    grid = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(side), torch.arange(side))
    grid = grid.expand(crops, -1, -1)
    for j, (total, alpha) in enumerate(arrays["options"].tolist()):
        k = int(total) // crops  # the release shares the budget of a call
        anchors = middle.argsort(dim=1, descending=True, stable=True)[:, : round(k * alpha / 5)]
        clear = arrays[f"margin_anchor_{j}"] >= CLEAR
        np.testing.assert_array_equal(anchors[clear].numpy(), arrays[f"anchors_{j}"][clear])
        spread = buffers_by_index(anchors, grid, clamp=True).scatter(1, anchors, True)
        for i in np.flatnonzero(clear):
            assert spread[i].nonzero()[:, 0].tolist() == sorted(arrays[f"spread_{j}_{i}"].tolist())
        for name, suffix in (("released", ""), ("paper", "_paper"), ("grid", "_grid")):
            method = HiPrune(keep=k, alpha=alpha, neighbours=name)
            got = method.search(k, (), middle, late, grid).sort(dim=1).values.numpy()
            want, margin = arrays[f"kept{suffix}_{j}"], arrays[f"margin_register{suffix}_{j}"]
            for i in np.flatnonzero(clear):
                allowed = 0 if margin[i] >= CLEAR else 1
                assert len(set(want[i]) - set(got[i])) <= allowed, (name, j, i)
