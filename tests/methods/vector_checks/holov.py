"""Reference vectors `holov_*`: quotas and orders of the release, and those of the corrected rule."""

import numpy as np
import torch

from vlmslim.methods.holov import HoloV, chunk_means, chunks_of, holistic_score, quotas, released_order

CLEAR = 1e-5


def check(arrays: dict[str, np.ndarray]) -> None:
    x, attention = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["attn"])
    chunks, weight = int(arrays["chunks"]), float(arrays["weight"])
    chunk = chunks_of(len(x), chunks)
    sizes = chunk.bincount().tolist()
    assert sizes == [size for size in arrays["sizes"].tolist() if size]
    total = holistic_score(x, attention, chunk, weight)[1]
    np.testing.assert_allclose(total.numpy(), arrays["chunk_score"][: len(total)], rtol=1e-4)
    share = (total / (total.sum() + 1e-6)).numpy()
    np.testing.assert_allclose(share, arrays["share"][: len(total)], rtol=1e-4)
    ties = len(attention.unique()) < len(attention)
    checked = 0
    for k in arrays["keeps"].tolist():
        if min(arrays[f"floor_margin_k{k}"], arrays[f"extra_margin_k{k}"]) >= CLEAR:
            want = arrays[f"quota_k{k}"].tolist()
            assert quotas(total, sizes, k, overflow=True) == want[: len(sizes)]
            order = released_order(x, attention, k, chunks, weight).numpy()
            same(order, arrays[f"order_k{k}"], attention, ties)
            assert (order < 0).sum() == arrays[f"zeros_k{k}"]
            checked += 1
        if arrays[f"fixed_margin_k{k}"] >= CLEAR:
            quota = quotas(chunk_means(attention, chunk), sizes, k)
            assert quota == arrays[f"fixed_quota_k{k}"].tolist()[: len(sizes)]
            checked += 1
        for name, within in (("fixed", "attention"), ("holistic", "holistic")):
            if arrays[f"{name}_margin_k{k}"] >= CLEAR:
                method = HoloV(keep=k, chunks=chunks, within=within)
                got = method.search(min(k, len(x)), (), x[None], attention[None])[0].sort().values
                same(got.numpy(), arrays[f"{name}_k{k}"], attention, ties)
    assert checked, "no budget of this file is clear"


def same(got: np.ndarray, want: np.ndarray, attention: torch.Tensor, ties: bool) -> None:
    """Equal tokens, or equal attention where tokens tie."""
    if ties:
        got, want = (np.sort(np.where(order < 0, -1, attention.numpy()[order])) for order in (got, want))
    np.testing.assert_array_equal(got, want)
