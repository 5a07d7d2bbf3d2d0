"""Reference vectors of TokenFLEX: what the released projector makes of random features at many counts."""

import math

import numpy as np
import torch

from vlmslim.methods.tokenflex import Projector, pool_square

NAMES = {"norm": "layernorm", "gate": "f1", "value": "f2", "out": "g"}  # ours: theirs
TOLERANCE = dict(rtol=1e-4, atol=2e-5)


def check(arrays: dict[str, np.ndarray]) -> None:
    x = torch.from_numpy(arrays["x"])
    assert x.shape[1] == int(arrays["grid"]) ** 2
    projector = loaded(arrays)
    counts = [int(key.removeprefix("y.")) for key in arrays if key.startswith("y.") and key != "y.default"]
    assert counts and sorted(counts) == sorted(arrays["counts"].tolist())
    for count in counts:
        compare(arrays, projector, x, count, f"pooled.{count}", f"y.{count}")
    if "y.default" in arrays:
        compare(arrays, projector, x, int(arrays["default_num_image_token"]), None, "y.default")


@torch.no_grad()
def compare(arrays, projector: Projector, x: torch.Tensor, count: int, pooled: str | None, y: str) -> None:
    """The released code rounds a count that is no square down to one; here a method's `keep` refuses it."""
    own = pool_square(x, math.isqrt(count))
    if pooled:
        np.testing.assert_allclose(own.numpy(), arrays[pooled], **TOLERANCE)
    np.testing.assert_allclose(projector(own).numpy(), arrays[y], **TOLERANCE)


def loaded(arrays: dict[str, np.ndarray]) -> Projector:
    """Our projector with the file's weights, all of them."""
    theirs = {key.removeprefix("w.mlp."): torch.from_numpy(arrays[key]) for key in arrays if key.startswith("w.")}
    inner, width = theirs["f1.weight"].shape
    projector = Projector(width, len(theirs["g.weight"]), expansion=inner // width)
    ours = {f"{own}.{kind}": theirs.pop(f"{name}.{kind}") for own, name in NAMES.items() for kind in ("weight", "bias")}
    assert not theirs, f"weights that the projector has no place for: {sorted(theirs)}"
    projector.load_state_dict(ours)
    return projector.eval()
