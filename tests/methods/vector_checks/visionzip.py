"""Reference vectors `visionzip_*`: dominant patches, merged ones, and the sequence of the release."""

import re

import numpy as np
import torch
from torch import nn

from vlmslim.compressor import ImageTokens
from vlmslim.methods._selection import Pool
from vlmslim.methods.visionzip import assigned, released_sequence, zipped
from vlmslim.ops.attention import cls_attention


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
                given = hidden[crop, 1:], keys[crop, 1:], attention[crop]
                check_crop(arrays, suffix, crop, given, hidden[crop], dominant, contextual)


def check_crop(arrays, suffix, crop, given, hidden, dominant: int, contextual: int) -> None:
    parts = zipped(*given, dominant + contextual, contextual, 1)
    assert parts[2].tolist() == sorted(arrays[f"dominant{suffix}"][crop].tolist())
    target, others = (
        torch.from_numpy(arrays[f"target{suffix}"][crop]),
        torch.from_numpy(arrays[f"merged{suffix}"][crop]),
    )
    assert parts[3].tolist() == target.tolist()
    if len(others):
        want, clear = arrays[f"assign{suffix}"][crop], arrays[f"margin_assign{suffix}"][crop] > 1e-6
        np.testing.assert_array_equal(assigned(given[1], others, target).numpy()[clear], want[clear])
    view = ImageTokens(given[0], given[0][None], torch.zeros(1), recorded_layers={-1: (nn.Identity(), hidden[None])})
    pool = Pool(view, torch.arange(len(given[0])), dominant + contextual, (), np.arange(len(given[0])))
    sequence = released_sequence(view.cls, [pool], [parts])
    np.testing.assert_allclose(sequence.numpy(), arrays[f"out{suffix}"][crop], rtol=1e-5, atol=1e-5)
    _, means, at, also = zipped(*given, dominant - 1 + contextual, contextual, 0)
    assert at.tolist() == parts[2].tolist() and also.tolist() == target.tolist()
    np.testing.assert_allclose(means.numpy(), arrays[f"mean{suffix}"][crop], rtol=1e-5, atol=1e-5)


def check_mosaic(arrays: dict[str, np.ndarray]) -> None:
    """Tokens that say where they come from travel through the order of a whole image."""
    columns, rows = arrays["grid_wh"].tolist()
    contextual, side = int(arrays["contextual"]), 24
    slot = torch.arange(rows * side * columns * side).view(rows, side, columns, side).transpose(1, 2).flatten(2)
    pools, parts = [], []
    for i, kept in enumerate([arrays["kept"][0], *arrays["kept"]]):  # the thumbnail is not in the file
        at = torch.from_numpy(np.sort(kept))
        names = torch.stack([torch.full_like(at, i - 1), at], dim=1)
        merged = torch.tensor([[i - 1, side**2 + 1 + j] for j in range(contextual)])
        slots = torch.arange(side**2) if i == 0 else side**2 + slot.flatten(0, 1)[i - 1]
        pools.append(Pool(None, slots, 0, (), slots.numpy()))
        parts.append((names, merged, at, at[:0]))
    cls = torch.tensor([[[i - 1, side**2]] for i in range(len(pools))])
    sequence = released_sequence(cls[:, 0], pools, parts)
    first = 1 + len(parts[0][0]) + contextual
    assert (sequence[:first, 0] == -1).all()
    np.testing.assert_array_equal(sequence[first:].numpy(), arrays["emitted"])
