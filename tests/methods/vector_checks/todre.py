"""Reference vectors `todre_*`: selection orders, pivots, and the attention shares of the second stage."""

import numpy as np
import torch

from vlmslim.methods.drop_visual import attention_mass
from vlmslim.methods.todre import at_tokens, diverse, similarity_to_mean

OBJECTIVES = {"maxsum": "max_sum", "kcenter": "k_center"}


def check(arrays: dict[str, np.ndarray]) -> None:
    """Check whatever the file holds."""
    if "Q" in arrays:
        _stage2(arrays)
    else:
        _pivots(arrays)
        _orders(arrays)


def _pivots(arrays) -> None:
    x = torch.from_numpy(arrays["X"])
    if "cls_attn" in arrays:
        frames = np.atleast_2d(arrays["cls_attn"])
        maps = torch.from_numpy(frames)[:, None]  # one row of patches a frame
        crop, column = np.indices(frames.shape).reshape(2, -1)
        grid = torch.from_numpy(np.stack([crop, np.zeros_like(crop), column], axis=1))
        for name in ("pivot", "pivot_video"):
            if name in arrays:
                assert at_tokens(maps, grid).argmax() == arrays[name]
        if "pivot_thumbnail" in arrays:
            assert at_tokens(maps[:1], grid).argmax() == arrays["pivot_thumbnail"]
    if "pivot_center" in arrays:
        assert similarity_to_mean(x).argmax() == arrays["pivot_center"]
        assert similarity_to_mean(x).argmin() == arrays["pivot_farthest"]


def _orders(arrays) -> None:
    x = torch.from_numpy(arrays["X"])
    unit = arrays["X"].astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    for name, objective in OBJECTIVES.items():
        for suffix, start in (("", "pivot" if "pivot" in arrays else "pivot_video"), ("_thumbnail", "pivot_thumbnail")):
            if f"{name}_order{suffix}" not in arrays:
                continue
            want = arrays[f"{name}_order{suffix}"]
            safe = len(want) if suffix else int(arrays.get(f"{name}_safe_k", len(want)))
            pivot = torch.tensor(int(arrays[start]))
            got = diverse(x, len(want), pivot, objective).numpy()
            np.testing.assert_array_equal(got[:safe], want[:safe])
            for k in (int(k) for k in arrays["budgets"] if k <= len(want)):
                np.testing.assert_array_equal(diverse(x, k, pivot, objective).numpy(), got[:k])
                if k <= safe:
                    assert set(got[:k]) == set(want[:k])
            _near_best(unit, got, safe, objective)


def _near_best(unit, got, start: int, objective: str) -> None:
    """Check decisions that hang on less than fp32 can tell: every pick must be as good as the best."""
    assert len(set(got)) == len(got)
    for i in range(start, len(got)):
        like = unit @ unit[got[:i]].T
        score = like.sum(1) if objective == "max_sum" else like.max(1)
        best = np.delete(score, got[:i]).min()
        assert score[got[i]] <= best + 1e-6 * (i if objective == "max_sum" else 1)


def _stage2(arrays) -> None:
    q, k = (torch.from_numpy(arrays[name])[None] for name in "QK")
    system, visual, text = (int(n) for n in arrays["spans"])
    span = torch.tensor([0] * system + [1] * visual + [2] * text)[None]

    def attend(rows):
        logits = q[:, :, rows[0]] @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        return logits.masked_fill(torch.arange(span.shape[1]) > rows[0][:, None], float("-inf")).softmax(-1)

    def share(source, target, chunk=128):
        return (attention_mass(attend, source, target, chunk) / source.sum(1)).item()

    tv, vt = share(span == 2, span == 1), share(span == 1, span == 2)
    np.testing.assert_allclose(tv, arrays["alpha_tv"], rtol=1e-5)
    np.testing.assert_allclose(share(span == 2, span == 1, chunk=2), tv, rtol=1e-6)
    np.testing.assert_allclose(vt, arrays["alpha_vt"], atol=1e-7)
    last = torch.arange(span.shape[1])[None] == span.shape[1] - 1
    np.testing.assert_allclose(share(last, span == 1), arrays["alpha_last_v"], rtol=1e-5)
    np.testing.assert_allclose(share(span == 1, span != 1), arrays["alpha_vt_textincl_sys"], rtol=1e-5)
    for tau, drop in zip(arrays["taus"], arrays["drop"], strict=True):
        assert (tv < tau and vt < tau) == drop
