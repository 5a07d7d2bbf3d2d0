"""Reference vectors `prunesid_*`: loadings, groups, suppression, quotas and orders of the release."""

import numpy as np
import torch

from vlmslim.methods.prunesid import choose, quotas, released_sequence
from vlmslim.ops.components import loadings
from vlmslim.ops.suppression import unsuppressed


def check(arrays: dict[str, np.ndarray]) -> None:
    if "tiles" in arrays:
        check_mosaic(arrays)
        return
    qwen = "features" in arrays
    x = torch.from_numpy(arrays["features"] if qwen else arrays["hidden"][1:])
    weight, k = torch.from_numpy(arrays["loadings"]), int(arrays["keep"])
    got = loadings(x.sigmoid(), weight.shape[1], torch.from_numpy(arrays["start"]))
    clear = arrays["group_margin"] > 1e-4
    torch.testing.assert_close(got, weight, rtol=0, atol=1e-4)
    np.testing.assert_array_equal(got.argmax(1).numpy()[clear], arrays["group"][clear])
    attention = None if qwen else torch.from_numpy(arrays["cls_attention"]).sum(0)
    check_groups(arrays, x, weight, weight.amax(1) if qwen else attention, k, qwen)
    if not qwen:
        check_corrected(arrays, x, attention, k)


def check_groups(arrays, x, weight, score, k: int, qwen: bool) -> None:
    n, unit = len(x), torch.nn.functional.normalize(x, dim=-1)
    similarity = unit @ unit.T
    if qwen:  # with the diagonal, over all pairs
        mean = similarity.triu().sum().item() / n**2
        threshold = max(k / (n / 18), 1) * mean
    else:
        mean = similarity.triu(1).sum().item() / (n * (n - 1) / 2)
        threshold = k / 32 * mean
    np.testing.assert_allclose([mean, threshold], [arrays["mean_similarity"], arrays["threshold"]], rtol=1e-4)
    group, q = torch.from_numpy(arrays["group"]).long(), weight.shape[1]
    alive = unsuppressed((similarity > threshold) & (group[:, None] == group), score) & (score > 0)
    assert group.bincount(minlength=q).tolist() == arrays["count"].tolist()
    assert group[alive].bincount(minlength=q).tolist() == arrays["survivors"].tolist()
    if arrays["half_margin"] < 1e-4:
        return  # a share at an exact half: fp32 sums decide it
    assert quotas(arrays["count"].tolist(), arrays["survivors"].tolist(), k, k - (not qwen)) == arrays["quota"].tolist()
    order = choose(x, weight, score, k, not qwen, threshold if qwen else None)
    first = [] if qwen else [0]  # CLS
    got = first + (order + len(first)).tolist()
    assert got == arrays["order"].tolist() and sorted(got) == arrays["raster"].tolist()


def check_corrected(arrays, x, attention, k: int) -> None:
    weight = loadings(x.sigmoid(), max(1, k // 4))
    clear = arrays["fixed_group_margin"] > 1e-4
    np.testing.assert_array_equal(weight.argmax(1).numpy()[clear], arrays["fixed_group"][clear])
    if clear.all() and arrays["fixed_threshold_margin"] > 1e-5:
        order = choose(x, weight, attention, k)
        group = weight.argmax(1)[order]
        assert group.bincount(minlength=weight.shape[1]).tolist() == arrays["fixed_quota"].tolist()
        assert order.tolist() == arrays["fixed_order"].tolist()
        assert order.sort().values.tolist() == arrays["fixed"].tolist()


def check_mosaic(arrays: dict[str, np.ndarray]) -> None:
    """Tokens that say where they come from travel through the order of a whole image."""
    rows, columns = arrays["tiles"].tolist()
    side, kept = 24, arrays["keep_index"]
    place = torch.arange(rows * side * columns * side).view(rows, side, columns, side).transpose(1, 2).flatten(2)
    slots = [torch.arange(side**2), *(side**2 + place.flatten(0, 1)).unbind(0)]
    orders = [torch.from_numpy(own[own > 0] - 1).long() for own in [kept[0], *kept]]  # the thumbnail is not in the file
    n = len(slots) * side**2
    names = torch.empty(n + len(slots), 2, dtype=torch.long)  # tile and patch of each place, 0 for CLS
    for i, at in enumerate(slots):
        names[at] = torch.stack([torch.full_like(at, i - 1), torch.arange(1, side**2 + 1)], dim=1)
        names[n + i] = torch.tensor([i - 1, 0])
    chosen = [at[order] for at, order in zip(slots, orders, strict=True)]
    sequence = names[released_sequence(chosen, n)][1 + len(orders[0]) :]
    np.testing.assert_array_equal(sequence[:, 0].numpy(), arrays["released_crop"])
    np.testing.assert_array_equal(sequence[:, 1].numpy(), arrays["released_index"])
    true = torch.cat([torch.stack([at[o], torch.full_like(o, i - 1), o]).T for i, (at, o) in enumerate(
        zip(slots, orders, strict=True)) if i])  # fmt: skip
    true = true[true[:, 0].argsort()]
    np.testing.assert_array_equal(true[:, 1].numpy(), arrays["fixed_crop"])
    np.testing.assert_array_equal(true[:, 2].numpy(), arrays["fixed_patch"])
