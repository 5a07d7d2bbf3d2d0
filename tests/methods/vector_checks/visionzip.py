"""Reference vectors `visionzip_*`: dominant patches, merged ones, and the sequence of the release."""

import re

import numpy as np
import torch

from vlmslim.methods.visionzip import View, merged, released_order, zipped
from vlmslim.ops.attention import cls_attention
from vlmslim.ops.merging import nearest


def check(arrays: dict[str, np.ndarray]) -> None:
    if "emitted" in arrays:
        check_mosaic(arrays)
        return
    q, k, hidden = (torch.from_numpy(arrays[name]) for name in ("q", "k", "hidden"))
    attention, keys = cls_attention(q, k), k.mean(1)
    np.testing.assert_allclose(q.shape[1] * attention.numpy(), arrays["cls_attention"], atol=1e-5)
    np.testing.assert_allclose(keys.numpy(), arrays["metric"], atol=1e-5)
    names = [name for name in arrays if name.startswith("out_d")]
    assert len(names) == len(arrays["budgets"])
    for name in names:
        suffix = name.removeprefix("out")
        dominant, contextual = map(int, re.fullmatch(r"_d(\d+)_c(\d+)", suffix).groups())
        for crop in range(len(hidden)):
            if arrays[f"margin_cut{suffix}"][crop] > 0:
                own = {key.removesuffix(suffix): value[crop] for key, value in arrays.items() if key.endswith(suffix)}
                check_crop(own, keys[crop, 1:], attention[crop], hidden[crop], dominant, contextual)


def check_crop(own: dict[str, np.ndarray], keys, attention, hidden, dominant: int, contextual: int) -> None:
    x, cls = hidden[1:], hidden[:1]
    view = zipped(keys, attention, dominant - 1 + contextual, contextual)
    assert view.dominant.tolist() == sorted(own["dominant"].tolist())
    targets, others = torch.from_numpy(own["target"]), torch.from_numpy(own["merged"])
    assert view.targets.tolist() == targets.tolist() and view.others.tolist() == others.tolist()
    if len(others):
        joined, clear = nearest(keys, others, targets), own["margin_assign"] > 1e-6
        np.testing.assert_array_equal(joined.numpy()[clear], own["target"][own["assign"]][clear])
    sequence = torch.cat([merged(x, [view], True), cls])[released_order([view], len(x))]
    np.testing.assert_allclose(sequence.numpy(), own["out"], rtol=1e-5, atol=1e-5)
    means = merged(x, [view], False)[view.targets]
    np.testing.assert_allclose(means.numpy(), own["mean"], rtol=1e-5, atol=1e-5)


def check_mosaic(arrays: dict[str, np.ndarray]) -> None:
    """Tokens that say where they come from travel through the order of a whole image."""
    columns, rows = arrays["grid_wh"].tolist()
    contextual, side = int(arrays["contextual"]), 24
    slot = torch.arange(rows * side * columns * side).view(rows, side, columns, side).transpose(1, 2).flatten(2)
    slots = [torch.arange(side**2), *(side**2 + slot.flatten(0, 1))]
    names = torch.empty(len(slots) * side**2, 2, dtype=torch.long)
    views, none = [], torch.arange(0)
    for i, kept in enumerate([arrays["kept"][0], *arrays["kept"]]):  # the thumbnail is not in the file
        targets = np.setdiff1d(np.arange(side**2), kept)[:contextual]
        names[slots[i]] = torch.tensor([[i - 1, j] for j in range(side**2)])
        names[slots[i][targets]] = torch.tensor([[i - 1, side**2 + 1 + j] for j in range(contextual)])
        views.append(View(slots[i][np.sort(kept)], slots[i][targets], none, none))
    cls = torch.tensor([[i - 1, side**2] for i in range(len(slots))])
    sequence = torch.cat([names, cls])[released_order(views, len(names))]
    first = 1 + len(views[0].dominant) + contextual
    assert (sequence[:first, 0] == -1).all()
    np.testing.assert_array_equal(sequence[first:].numpy(), arrays["emitted"])
