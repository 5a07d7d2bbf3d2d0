"""Reference vectors `vispruner_*`: important and diverse patches of the release, round by round."""

import numpy as np
import torch

from vlmslim.methods.vispruner import VisPruner, without_duplicates
from vlmslim.ops.greedy import cosine_matrix


def check(arrays: dict[str, np.ndarray]) -> None:
    x = torch.from_numpy(arrays["features"])[None]
    attention = torch.from_numpy(arrays["cls_attention"]).mean(0)[None]
    similarity, step = cosine_matrix(x), int(arrays["step"])
    for i, (k, ratio) in enumerate(zip(arrays["T"].tolist(), arrays["important_ratio"].tolist(), strict=True)):
        method = VisPruner(keep=k, important=ratio, step=step)
        got = method.search(k, (), x, attention)[0].numpy()
        assert len(set(got)) == k == len(got)
        count = int(k * ratio)
        np.testing.assert_array_equal(got[:count], arrays[f"important_{i}"])
        if arrays[f"exact_{i}"]:
            np.testing.assert_array_equal(got[count:], arrays[f"residual_{i}"])
            np.testing.assert_array_equal(np.sort(got), arrays[f"selected_{i}"])
        if f"rounds_{i}" in arrays:
            check_rounds(similarity, arrays[f"rounds_{i}"], arrays[f"round_index_{i}"], k - count, step)


def check_rounds(similarity: torch.Tensor, rounds: np.ndarray, index: np.ndarray, diverse: int, step: int) -> None:
    """One round on a list of the file gives the next list, up to swaps of scores that fp32 cannot tell apart."""
    for row, following, at, then in zip(rounds, rounds[1:], index, index[1:], strict=False):
        left, want = row[row >= 0].astype(np.int64), following[following >= 0]
        if then != at + 1 or len(left) <= diverse:
            continue
        drop = min(step, len(left) - diverse)
        got = without_duplicates(similarity, torch.from_numpy(left)[None], drop)[0].numpy()
        assert len(got) == len(want)
        for ours, theirs in zip(got, want, strict=True):
            if ours != theirs:
                near = [float(similarity[0, i, left[1::2]].max()) for i in (ours, theirs)]
                assert abs(near[0] - near[1]) < 1e-6
