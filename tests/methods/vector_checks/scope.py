"""Reference vectors `scope_*`: orders of the release's selection, and the sequence that it sends for whole views."""

import numpy as np
import torch
from torch import nn

from vlmslim.compressor import ImageTokens
from vlmslim.methods.scope import SCOPE, salient_coverage

COMBINE = {"multi": "multiply", "add": "add"}


def check(arrays: dict[str, np.ndarray]) -> None:
    kind = str(arrays["kind"])
    if kind == "views":
        check_views(arrays)
    elif kind == "options":
        given = zip(arrays["alphas"].tolist(), arrays["combine_names"].tolist(), arrays["orders"], strict=True)
        for i, (alpha, combine, order) in enumerate(given):
            clear = arrays["margins"][i] >= 1e-5 * arrays["bests"][i]
            safe = len(order) if clear.all() else int((~clear).argmax())
            check_order(arrays["x"], arrays["saliency"], alpha, combine, order, safe)
    else:
        alpha, combine, order = float(arrays["alpha"]), str(arrays["combine"]), arrays["order"]
        exact = kind == "ties"
        got = check_order(arrays["x"], arrays["saliency"], alpha, combine, order, len(order) if exact else None, arrays)
        for k in arrays["keeps"].tolist():
            if k <= int(arrays["safe_k"]):
                np.testing.assert_array_equal(np.sort(got[:k]), arrays[f"sorted_k{k}"])
        if exact:  # once all is covered, the rest follows by index
            check_order(arrays["x_dup"], arrays["saliency_dup"], alpha, combine, arrays["order_dup"])


def check_order(x, saliency, alpha, combine, want, safe=None, arrays=None) -> np.ndarray:
    if safe is None:
        safe = len(want) if arrays is None else int(arrays["safe_k"])
    given = torch.from_numpy(x)[None], torch.from_numpy(saliency)[None]
    got = salient_coverage(*given, len(want), alpha, COMBINE[combine])[0].numpy()
    assert len(set(got)) == len(got)
    np.testing.assert_array_equal(got[:safe], want[:safe])
    near_best(x.astype(np.float64), saliency.astype(np.float64), alpha, combine, got, safe)
    return got


def near_best(x, saliency, alpha, combine, got, start) -> None:
    """Picks that hang on less than fp32 can tell are as good as the best."""
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    cosine, covered = x @ x.T, np.zeros(len(x))
    for i, pick in enumerate(got):
        gain = np.maximum(cosine - covered[:, None], 0).sum(0)
        score = gain * saliency**alpha if combine == "multi" else gain + saliency**alpha
        score[got[:i]] = -np.inf
        if i >= start:
            assert score[pick] >= score.max() - 1e-5 * abs(score.max())
        covered = np.maximum(covered, cosine[:, pick])


def check_views(arrays: dict[str, np.ndarray]) -> None:
    """The whole sequence: thumbnail, then the mosaic row by row, with padding and without newlines."""
    hidden = torch.from_numpy(arrays["hidden"])
    saliency = torch.from_numpy(arrays["cls_attention"])[:, :, 1:].sum(1)

    class Given(SCOPE):
        def scores(self, image):
            return image.at_tokens(saliency)

    views, rows, columns = hidden[:, 1:], *arrays["tiles"].tolist()
    method = Given(keep=int(arrays["token_num"]), mode="released")
    pixels = torch.zeros(len(views), 3, 1, 1)
    image = ImageTokens(views.flatten(0, 1), views, pixels, tiles=(rows, columns), projector=nn.Identity())
    (result,) = method.compress_images([image])
    view, patch = torch.from_numpy(arrays["sequence"]).long().unbind(1)
    assert int(arrays["per_view"]) * len(views) == len(result)
    assert min(arrays["safe_k"]) >= int(arrays["per_view"]), "the file's own order is not clear"
    torch.testing.assert_close(result.features, views[view, patch], rtol=0, atol=0)
