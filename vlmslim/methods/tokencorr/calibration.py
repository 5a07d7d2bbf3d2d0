"""Find the alpha at which TokenCorr keeps a wanted share of the patches, on your own pictures."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from vlmslim.compressor import Compressed, ImageTokens
from vlmslim.methods.tokencorr import TokenCorr, View
from vlmslim.patching import patch


@dataclass(frozen=True)
class Calibration:
    """The result of `calibrate`.

    alpha    : for `TokenCorr(alpha=...)`
    kept     : mean share of a crop's patches that this alpha keeps, outliers included
    spread   : standard deviation of that share over crops; the method is meant to adapt, so it should not be zero
    outliers : mean share of deep outliers
    crops    : number of crops seen
    """

    alpha: float
    kept: float
    spread: float
    outliers: float
    crops: int


def calibrate(model: nn.Module, prompts: Iterable[Mapping], share: float, **options) -> Calibration:
    """Find the alpha at which TokenCorr keeps a share of the patches of a crop, averaged over some images.

    Key similarities have an offset that differs between towers, so no alpha serves all of them. About a hundred crops
    of the kind in question are enough. The mean kept share grows with alpha in steps; the nearest step is taken.

    Args:
        model: a loaded, unpatched model.
        prompts: model inputs with images, as the processor makes them, on the model's device.
        share: of the patches of a crop to keep, on average.
        **options: of `TokenCorr`.

    Raises:
        ValueError: the share is outside (0, 1], no crop was seen, or no patch is redundant.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: give a share of the patches in (0, 1]")
    views: list[View] = []

    class Probe(TokenCorr):
        def compress(self, image: ImageTokens) -> Compressed:
            views.extend(replace(view, keys=view.keys[:0]) for view in self.views(image))  # because keys are large
            return image.pick_all()

    with patch(model, Probe(**options)), torch.no_grad():
        for inputs in prompts:
            model(**inputs, logits_to_keep=1)
    if not views:
        raise ValueError("the prompts brought no crop that TokenCorr would compress; use thumbnail='compress'")

    steps = torch.cat([view.repeat for view in views]).unique()
    steps = steps[steps.isfinite()].clamp(-1, 1)
    if not len(steps):
        raise ValueError(f"beta={options.get('beta', TokenCorr.beta)} makes no patch redundant; use a smaller share")
    low, high = 0, len(steps) - 1
    while low < high:  # bisect for the first step that keeps enough
        middle = (low + high) // 2
        if _kept_shares(views, float(steps[middle])).mean() >= share:
            high = middle
        else:
            low = middle + 1
    near = [float(steps[i]) for i in (max(low - 1, 0), low)]
    alpha = min(near, key=lambda a: abs(float(_kept_shares(views, a).mean()) - share))
    above = steps[steps > alpha]
    if len(above):
        alpha = (alpha + float(above[0])) / 2  # between two steps, where rounding does not matter
    kept = _kept_shares(views, alpha)
    outliers = torch.tensor([float(view.outlier.float().mean()) for view in views])
    return Calibration(alpha, float(kept.mean()), float(kept.std(correction=0)), float(outliers.mean()), len(views))


def _kept_shares(views: list[View], alpha: float) -> Tensor:
    return torch.stack([view.keep(alpha).double().mean() for view in views])
