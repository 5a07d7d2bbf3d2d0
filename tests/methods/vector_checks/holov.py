"""Reference vectors `holov_*`: quotas and orders of the release, and those of the corrected rule."""

import numpy as np
import torch

from vlmslim.methods.holov import (
    HoloV,
    best_of_chunks,
    chunk_means,
    chunk_sizes,
    chunks_of,
    quotas,
    released_order,
    released_weights,
)
from vlmslim.ops.rectification import anchor_scores, distance_decay, merge_rest, merged_key_bias

CLEAR = 1e-5


def check(arrays: dict[str, np.ndarray]) -> None:
    if "gamma" in arrays:
        check_rectification(arrays)
    else:
        check_selection(arrays)


def check_rectification(arrays: dict[str, np.ndarray]) -> None:
    x, kept, k = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["kept"]).long(), int(arrays["keep"])
    chunks, attention = int(arrays["chunks"]), torch.from_numpy(arrays["attn"])
    assert len(kept) == int(arrays["gamma"] * k)
    got = HoloV(keep=k, chunks=chunks).search(len(kept), (), x[None], attention[None])[0]
    assert got.sort().values.tolist() == kept.tolist()
    free = torch.from_numpy(arrays["candidates"]).long()
    for superior, prefix in (("released", ""), ("paper", "paper_")):
        score = anchor_scores(x[free], superior)
        np.testing.assert_allclose(score.numpy(), arrays[f"{prefix}score"], rtol=1e-3, atol=1e-4)
        if min(arrays[f"{prefix}anchor_margin"], arrays[f"{prefix}assign_margin"]) < 1e-5:
            continue  # a token hangs between two anchors
        features, place, size, into = merge_rest(x, kept, k, superior)
        assert into.bincount().tolist() == size.tolist()
        assert place.tolist() == arrays[f"{prefix}position"].tolist()
        assert size.tolist() == arrays[f"{prefix}size"].tolist()
        np.testing.assert_allclose(features.numpy(), arrays[f"{prefix}features"], rtol=1e-5, atol=1e-5)
    check_bias(arrays)


def check_bias(arrays: dict[str, np.ndarray]) -> None:
    t = {name: torch.from_numpy(np.atleast_1d(value)) for name, value in arrays.items()}
    half = int(arrays["head_dim"]) // 2
    frequencies = float(arrays["base"]) ** -(torch.arange(half, dtype=torch.float64) / half)
    np.testing.assert_allclose(distance_decay(t["distance"], frequencies).numpy(), arrays["decay"], atol=1e-5)
    bias = None
    for prefix in ("first_layer_", ""):
        size = t[f"{prefix}size" if prefix else "key_size"].double()
        bias = merged_key_bias(t["query_position"], t["key_position"], size, frequencies, float(arrays["c"]))
        np.testing.assert_allclose(bias.numpy(), arrays[f"{prefix}bias"], atol=1e-5)
    hidden = t["key_position"] > t["query_position"][:, None]
    paid = (t["logits"] + bias).masked_fill(hidden, float("-inf")).softmax(-1)
    np.testing.assert_allclose(paid.numpy(), arrays["probabilities"], atol=1e-5)
    axis = torch.arange(3).repeat_interleave(t["mrope_sections"].long())
    frequencies = float(arrays["mrope_base"]) ** -(torch.arange(half, dtype=torch.float64) / half)
    decay = distance_decay(t["mrope_distance"][:, axis], frequencies)
    np.testing.assert_allclose(decay.numpy(), arrays["mrope_decay"], atol=1e-5)


def check_selection(arrays: dict[str, np.ndarray]) -> None:
    x, attention = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["attn"])
    chunks, weight = int(arrays["chunks"]), float(arrays["weight"])
    sizes = chunk_sizes(len(x), chunks)
    assert sizes == [size for size in arrays["sizes"].tolist() if size]
    total = released_weights(x, attention, sizes, weight)
    np.testing.assert_allclose(total.numpy(), arrays["chunk_score"][: len(total)], rtol=1e-4)
    share = (total / (total.sum() + 1e-6)).numpy()
    np.testing.assert_allclose(share, arrays["share"][: len(total)], rtol=1e-4)
    ties = len(attention.unique()) < len(attention)
    checked = 0
    for k in arrays["keeps"].tolist():
        if min(arrays[f"floor_margin_k{k}"], arrays[f"extra_margin_k{k}"]) >= CLEAR:
            want = arrays[f"quota_k{k}"].tolist()
            assert quotas(total, k, released=True).tolist() == want[: len(sizes)]
            order = released_order(x, attention, k, chunks, weight).numpy()
            same(order, arrays[f"order_k{k}"], attention, ties)
            assert (order < 0).sum() == arrays[f"zeros_k{k}"]
            checked += 1
        if arrays[f"fixed_margin_k{k}"] >= CLEAR:
            kept = best_of_chunks(attention, chunk_means(attention, sizes), sizes, k)
            quota = chunks_of(sizes)[kept].bincount(minlength=len(sizes)).tolist()
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
