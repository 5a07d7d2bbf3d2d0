"""What DivPrune and ToDRE share: they pick the tokens of an image one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, resolve_keep
from vlmslim.ops.newlines import fill_budget


class GreedySelection(Compressor):
    """Candidates, batching, newlines and order of a greedy search; subclasses override `search`.

    Attributes:
        keep: visual tokens to keep per image, a count or a share.
        newline: "pool" lets newline tokens compete with patches; "rows" and "drop" as in `fill_budget`.
        order: "raster" feeds the kept tokens in reading order, "selection" in the order in which they were picked.
    """

    keep: Keep
    newline: str
    order: str = "raster"

    def search(self, x: Tensor, k: int, images: Sequence[ImageTokens], candidates: Sequence[Tensor]) -> Tensor:
        """Pick k candidates of every image.

        Args:
            x: (b, m, d) features of the candidates.
            k: number of picks.
            images: b images.
            candidates: b times (m,), the slots of the candidates in their image.

        Returns:
            (b, k) indices into the candidates, in the order of selection; the first j of them are the picks for k = j.
        """
        raise NotImplementedError

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Search the images of a forward, those with equally many candidates together.

        Together, because the picks of a search follow one another: a loop over picks takes as long for many images as
        for one.
        """
        results: dict[int, Compressed] = {}
        groups: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}  # by budget and number of candidates
        for i, image in enumerate(images):
            n = len(image.features)
            k = resolve_keep(self.keep, n)
            slots = torch.arange(n, device=image.features.device)
            if k == n and self.order == "raster":
                results[i] = image.pick(slots)
                continue
            if k < n and self.newline != "pool":
                slots = (image.grid[:, 0] >= 0).nonzero()[:, 0]
            groups.setdefault((k, len(slots)), []).append((i, slots))
        for (k, size), members in groups.items():
            group, candidates = [images[i] for i, _ in members], [slots for _, slots in members]
            x = torch.stack([image.features[slots] for image, slots in zip(group, candidates, strict=True)])
            found = self.search(x, min(k, size), group, candidates)
            for (i, slots), order in zip(members, found, strict=True):
                image, picks = images[i], slots[order]
                if size < len(image.features):  # newlines were no candidates: they are still to be paid for
                    picks = fill_budget(picks, image.grid, image.tiles, k, self.newline)
                results[i] = image.pick(picks.sort().values if self.order == "raster" else picks)
        return [results[i] for i in range(len(images))]
