"""Reference vectors `dart_*`: what the release keeps at its budgets, and own references at exact ones."""

from types import SimpleNamespace

import numpy as np
import torch
from layer_inputs import one_image

from vlmslim.compressor import LayerInput
from vlmslim.methods.dart import DART
from vlmslim.ops.attention import DecoderAttention

CLEAR = 1e-5


def check(arrays: dict[str, np.ndarray]) -> None:
    start, n = int(arrays["image_start"]), int(arrays["n"])
    pivots, image = tuple(arrays["pivots"].tolist()), np.arange(n)
    if min(arrays["margin_pivots"]) < CLEAR:
        return  # pivots tie
    for j, (count, ratio, anyres) in enumerate(arrays["runs"].tolist()):
        if min(arrays[f"margin_cuts_{j}"]) < CLEAR:
            continue
        keep = 1 - ratio  # a count wins over it, and the budget of anyres images over both
        if max(count, anyres) >= 0:
            keep = int(min(anyres, n - 4) if anyres >= 0 else count)
        got = kept(arrays, DART(keep=min(keep, n), mode="released", pivots=pivots), start, n)
        np.testing.assert_array_equal(image[got], arrays[f"kept_{j}"], err_msg=str((count, ratio, anyres)))
        assert DART(keep=min(keep, n), mode="released", pivots=pivots).requested(n) == len(arrays[f"kept_{j}"])
    for keep in arrays["exact"].tolist():
        if min(arrays[f"margin_exact_{keep}"]) >= CLEAR:
            got = kept(arrays, DART(keep=keep, pivots=pivots, norm="l1"), start, n)
            np.testing.assert_array_equal(image[got], arrays[f"exact_kept_{keep}"])


def kept(arrays: dict[str, np.ndarray], method: DART, start: int, n: int) -> np.ndarray:
    """(n,) bool of what a method keeps."""
    keys = torch.from_numpy(arrays["keys"])[None]
    weight, eps = torch.from_numpy(arrays["norm_weight"]), float(arrays["eps"])
    method.final_norm = lambda x: weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    tokens = LayerInput(
        layer=2,
        **one_image(torch.from_numpy(arrays["hidden"]), start, n),
        images=[[None]],
        previous=SimpleNamespace(attend=lambda mask, keys, blocks=None: DecoderAttention(None, mask, keys)),
        in_cache=keys,
    )
    return method.retain(tokens)[0, start : start + n].numpy()
