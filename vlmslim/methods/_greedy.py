"""What methods share that pick an image's tokens one after the other."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, resolve_keep
from vlmslim.ops.newlines import spend


class GreedySelection(Compressor):
    """Candidates, batching, newlines and order of a greedy search; `search` says which token comes next.

    Attributes:
        keep: visual tokens to keep per image, a count or a share.
        newline: "pool" lets newline tokens compete with patches; "rows" and "drop" as in `newlines.spend`.
        order: "raster" feeds the kept tokens in reading order, "selection" in the order in which they were picked.
    """

    keep: Keep
    newline: str
    order: ClassVar[str] = "raster"

    def search(self, x: Tensor, k: int, images: Sequence[ImageTokens], pools: Sequence[Tensor]) -> Tensor:
        """Pick k of the candidates of every image.

        Args:
            x: (b, m, d) the candidates' features.
            k: how many.
            images: b images.
            pools: b times (m,), the candidates' places in their image.

        Returns:
            (b, k) indices into the candidates, in the order of selection; the first j of them are those for k = j.
        """
        raise NotImplementedError

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Images with equally many candidates are searched together: the loop is as long for many as for one."""
        results: list[Compressed | None] = [None] * len(images)
        alike: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for i, image in enumerate(images):
            n = len(image.features)
            k = resolve_keep(self.keep, n)
            pool = torch.arange(n, device=image.features.device)
            if k == n and self.order == "raster":
                results[i] = image.pick(pool)
                continue
            if k < n and self.newline != "pool":
                pool = (image.grid[:, 0] >= 0).nonzero()[:, 0]
            alike.setdefault((k, len(pool)), []).append((i, pool))
        for (k, size), members in alike.items():
            group, pools = [images[i] for i, _ in members], [pool for _, pool in members]
            x = torch.stack([_candidates(image, pool) for image, pool in zip(group, pools, strict=True)])
            for (i, pool), found in zip(members, self.search(x, min(k, size), group, pools), strict=True):
                image, picks = images[i], pool[found]
                if size < len(image.features):
                    picks = spend(picks, image.grid, image.tiles, k, self.newline)
                results[i] = image.pick(picks.sort().values if self.order == "raster" else picks)
        return results


def _candidates(image: ImageTokens, pool: Tensor) -> Tensor:
    return image.features if len(pool) == len(image.features) else image.features[pool]


def least_close(closeness: Tensor, first: Tensor, k: int, fold: str) -> Tensor:
    """From a first token on, add again and again the token least close to those picked so far; ties to the lower index.

    On a GPU three operations a pick, without synchronisation. On a CPU numpy does them, because it starts an operation
    in a tenth of the time that PyTorch takes, and each of them has but one row to go through.

    Args:
        closeness: (b, n, n) of every token to every other, infinite to itself.
        first: (b,) the first pick of each set.
        k: how many to pick, 1 <= k <= n.
        fold: how closeness to several is made of closeness to each: "maximum" or "add".

    Returns:
        (b, k) indices in the order of selection.
    """
    if closeness.device.type != "cpu":
        every = torch.arange(len(closeness), device=closeness.device)
        return least_close_to(lambda pick: closeness[every, pick], first, k, fold)
    b, n, _ = closeness.shape
    rows, combine = closeness.numpy().reshape(b * n, n), getattr(np, fold)
    start, pick = (np.arange(0, b * n, n), first.numpy()) if b > 1 else (0, first.item())  # one image: one axis less
    picks = np.empty((k, b), dtype=int)
    picks[0] = pick
    so_far = rows[start + pick].copy()
    for i in range(1, k):
        pick = so_far.argmin(-1)
        picks[i] = pick
        combine(so_far, rows[start + pick], out=so_far)
    return torch.from_numpy(picks.T)


def least_close_to(row: Callable[[Tensor], Tensor], first: Tensor, k: int, fold: str) -> Tensor:
    """The same with a function for the closeness (b, n) of all tokens to the picks (b,), infinite to themselves."""
    combine, picks = getattr(torch, fold), [first]
    so_far = row(first)
    for _ in range(k - 1):
        picks.append(so_far.argmin(1))
        combine(so_far, row(picks[-1]), out=so_far)
    return torch.stack(picks, dim=1)
