"""Reference vectors `pyramiddrop_*`: counts, and whole decoders through several drops, by the release."""

from dataclasses import dataclass, field

import numpy as np
from released_decoders import run
from torch import Tensor

from vlmslim.methods.pyramiddrop import PyramidDrop


@dataclass
class Noted(PyramidDrop):
    """Notes scores and what stays."""

    first: int = 0
    seen: dict = field(default_factory=dict)

    def retain(self, tokens) -> Tensor:
        keep, visual = super().retain(tokens), tokens.image[0] > 0
        score = tokens.coming_attention(tokens.last[:, None]).mean(1)[0, 0]
        place = tokens.slot[0] if (tokens.slot[0][visual] >= 0).all() else tokens.origin[0] - self.first
        self.seen[tokens.layer] = score[visual].numpy(), place[visual & keep[0]].numpy()
        return keep


def check(arrays: dict[str, np.ndarray]) -> None:
    if "ns" in arrays:
        check_counts(arrays)
        return
    layers = tuple(arrays["layers"].tolist())
    for positions, prefix in (("renumbered", ""), ("original", "original_")):
        ratios, first = arrays["ratios"].tolist(), int(arrays["first"])
        method = Noted(layer=layers, ratio=ratios, layer_positions=positions, first=first)
        final = run(arrays, method, arrays[f"{prefix}kept_l{layers[-1]}"])
        for layer in layers:
            score, kept = method.seen[layer]
            np.testing.assert_array_equal(kept, arrays[f"{prefix}kept_l{layer}"], err_msg=f"{positions} {layer}")
            np.testing.assert_allclose(score, arrays[f"{prefix}score_l{layer}"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(final.numpy(), arrays[f"{prefix}final"], atol=1e-4)


def check_counts(arrays: dict[str, np.ndarray]) -> None:
    for j in range(sum(key.startswith("ratios_") for key in arrays)):
        ratios = arrays[f"ratios_{j}"].tolist()
        method = PyramidDrop(mode="released", ratio=ratios, layer=range(1, len(ratios) + 1))
        assert [method.counts(n) for n in arrays["ns"].tolist()] == arrays[f"counts_{j}"].tolist()
