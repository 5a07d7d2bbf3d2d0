"""What methods share that pick an image's tokens one after the other."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, resolve_keep
from vlmslim.newlines import spend


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
            x = torch.stack([image.features[pool] for image, pool in zip(group, pools, strict=True)])
            for (i, pool), found in zip(members, self.search(x, min(k, size), group, pools), strict=True):
                image, picks = images[i], pool[found]
                if size < len(image.features):
                    picks = spend(picks, image.grid, image.tiles, k, self.newline)
                results[i] = image.pick(picks.sort().values if self.order == "raster" else picks)
        return results
