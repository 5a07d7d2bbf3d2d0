"""Reference vectors `atp_*`: scores, sampling grids, thresholds and masks from a full attention map; the losses."""

import numpy as np
import torch
from torch import Tensor

from vlmslim.methods import atp
from vlmslim.methods.atp import losses, score_maps
from vlmslim.methods.atp.score_maps import attention_from_image_and_text, normalise

TOLERANCE = 1e-5


def check(arrays: dict[str, np.ndarray]) -> None:
    """Check whatever the file holds."""
    (_forward if "P" in arrays else _losses)(arrays)


def _close(got, want) -> None:
    got = got.detach().numpy() if isinstance(got, Tensor) else got
    np.testing.assert_allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE)


def _forward(arrays) -> None:
    full = torch.from_numpy(arrays["P"]).float()
    before, n, after = arrays["spans"].tolist()
    alive = torch.from_numpy(arrays["alive"]).bool()
    visual = slice(before, before + n)
    image = torch.zeros(full.shape[0], full.shape[-1], dtype=torch.long)
    image[:, visual] = alive.long()
    text = torch.zeros_like(image, dtype=torch.bool)
    text[:, before + n :] = True
    assert before + n + after == full.shape[-1]

    def attend(rows: Tensor) -> Tensor:
        return full.gather(2, rows[:, None, :, None].expand(-1, full.shape[1], -1, full.shape[-1]))

    for chunk in (5, 128):
        from_image, from_text = (x[:, visual] for x in attention_from_image_and_text(attend, image, text, chunk))
        from_image = from_image / alive.sum(1, keepdim=True)
        from_text = from_text / after
        _close(from_image[alive], arrays["s_self"][alive])
        _close(from_text[alive], arrays["s_cross"][alive])
    if not np.array_equal(arrays["s_self"][alive], arrays["s_self_n"][alive]):
        from_image, from_text = normalise(from_image, alive), normalise(from_text, alive)
    _close(from_image[alive], arrays["s_self_n"][alive])
    _close(from_text[alive], arrays["s_cross_n"][alive])
    redundancy = score_maps.redundancy(from_image, from_text, "literal")
    _close(redundancy[alive], arrays["s_red"][alive])
    spatial = atp.spatial_score(int(arrays["grid"]), arrays["strides"].tolist(), float(arrays["lam"]))
    _close(spatial, arrays["s_spatial"])
    thresholds = atp.ThresholdModule(n, len(arrays["W"]))
    thresholds.load_state_dict(
        {
            "mix.weight": torch.from_numpy(arrays["W"]),
            "mix.bias": torch.from_numpy(arrays["bz"]),
            "heads.weight": torch.from_numpy(np.stack([arrays["w_r"], arrays["w_s"]])),
            "heads.bias": torch.from_numpy(np.stack([arrays["b_r"], arrays["b_s"]])),
        }
    )
    theta_r, theta_s = thresholds(from_image, from_text)
    _close(theta_r, arrays["theta_r"])
    _close(theta_s, arrays["theta_s"])
    soft = atp.soft_mask(redundancy, spatial, theta_r, theta_s, float(arrays["temperature"])) * alive
    _close(soft, arrays["soft"])
    hard = atp.hard_mask(redundancy, spatial, theta_r, theta_s) & alive
    np.testing.assert_array_equal(hard.numpy(), arrays["hard"])


def _losses(arrays) -> None:
    counts, layers, full = torch.from_numpy(arrays["N"]), arrays["layers"].tolist(), float(arrays["N0"])
    depth = losses.depth_loss(counts, layers, full)
    _close(depth, arrays["L_atp"])
    modules = losses.target_loss(losses.mean_tokens(counts, layers, full), float(arrays["target"]))
    _close(modules, arrays["L_target_modules"])
    everywhere = losses.mean_tokens(counts, layers, full, 32)  # the paper's decoder
    _close(everywhere, arrays["avg_all_layers"])
    _close(losses.target_loss(everywhere, float(arrays["target"])), arrays["L_target_all_layers"])
    total = float(arrays["lambda_atp"]) * depth + float(arrays["lambda_target"]) * modules
    _close(total, arrays["total_minus_ntp"])
