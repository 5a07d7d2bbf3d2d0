"""DivPrune: "Diversity-based Visual Token Pruning for Large Multimodal Models" (CVPR 2025, arXiv 2503.02175)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_keep, resolve_keep
from vlmslim.selection import full_precision


@dataclass
class DivPrune(Compressor):
    """Keep the subset of visual tokens whose smallest pairwise cosine distance is large (algorithm 1 of the paper).

    Departures from the release (commit 799e2d9), each because the release misbehaves there: distances are computed
    in fp32, not in the model's dtype, where rounding re-picks tokens; a picked token is never picked again; a zero
    token is at distance 1 from all others instead of NaN; every image of every sample is pruned, wherever it stands;
    at least one token stays. On distinct fp32 tokens the picks are those of the release.

    keep      : visual tokens to keep per image, a count or a share. The paper uses 0.098
    order     : "raster" feeds the kept tokens in reading order, as the release does; "selection" in the order in
                which they were picked, as the runs behind the paper's tables did
    newline   : anyres newline tokens: "pool" lets them compete as the release does (they are all alike, so at most
                one survives), "drop" removes them, "rows" keeps the newline of each row that keeps a token; all
                within the budget
    positions : "renumbered" (as released) or "original" rotary positions
    """

    keep: Keep = 0.098
    order: str = "raster"
    newline: str = "pool"
    positions: str = "renumbered"

    def __post_init__(self):
        check_keep(self.keep)
        for name, known in (("order", ("raster", "selection")), ("newline", ("pool", "drop", "rows"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(map(repr, known))}")
        if self.order == "selection" and self.positions == "original":
            raise ValueError(
                "order='selection' moves tokens away from their places; use positions='renumbered' with it"
            )

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Images with equally many tokens are searched together: the greedy loop is as long for many as for one."""
        results: list[Compressed | None] = [None] * len(images)
        alike: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            alike.setdefault(len(image.features), []).append(i)
        for n, members in alike.items():
            k = resolve_keep(self.keep, n)
            if self.newline == "pool" or k == n:
                picks = farthest_points(torch.stack([images[i].features for i in members]), k)
                for i, index in zip(members, picks, strict=True):
                    results[i] = images[i].pick(self._ordered(index))
            else:
                for i in members:
                    results[i] = images[i].pick(self._ordered(self._without_newlines(images[i], k)))
        return results

    def _ordered(self, index: Tensor) -> Tensor:
        return index.sort().values if self.order == "raster" else index

    def _without_newlines(self, image: ImageTokens, k: int) -> Tensor:
        """Pick among patches; (k,) indices, newlines of the surviving rows included if asked for."""
        component, row, _ = image.mosaic.unbind(1)
        patches = (component >= 0).nonzero()[:, 0]
        picks = patches[farthest_points(image.features[patches], min(k, len(patches)))]
        if self.newline == "rows":
            # The newline behind a row of tiles is the next newline of the sequence; a thumbnail row has none.
            newline = (component < 0).nonzero()[:, 0]
            tiled = (component[picks] == 1) & (not image.video)  # the one newline of a video ends no row
            end = torch.searchsorted(newline, picks)
            end = torch.where(tiled, end, len(newline))
            new = (end[:, None] == end).int().argmax(1) == torch.arange(len(end), device=end.device)
            new &= tiled & (end < len(newline))
            chosen = (new + 1).cumsum(0) <= k  # every pick costs one token, the first of a row two
            picks, end = picks[chosen], end[chosen & new]
            spare = patches[~torch.isin(patches, picks)][: k - len(picks) - len(end)]
            picks = torch.cat([picks, newline[end], spare])
        elif len(picks) < k:
            picks = torch.cat([picks, (component < 0).nonzero()[: k - len(picks), 0]])
        return picks


@full_precision
def farthest_points(x: Tensor, k: int) -> Tensor:
    """Greedy max-min selection by cosine distance.

    The first pick is the token farthest from its nearest neighbour; each next one the token farthest from those
    picked so far. Ties go to the lower index. O(n^2 d) once, then O(n) a pick, without synchronisation.

    Args:
        x: (..., n, d) tokens.
        k: how many to pick, 1 <= k <= n.

    Returns:
        (..., k) indices in the order of selection; the first j of them are the selection for k = j.
    """
    x = F.normalize(x, dim=-1)
    distance = 1 - x @ x.transpose(-1, -2)  # (..., n, n)
    others = distance.clone()
    others.diagonal(dim1=-2, dim2=-1).fill_(float("inf"))
    pick = others.amin(-1).argmax(-1, keepdim=True)  # (..., 1)
    picks, nearest = [pick], torch.full_like(x[..., 0], float("inf"))
    for _ in range(k - 1):
        row = distance.gather(-2, pick[..., None].expand(*pick.shape, x.shape[-2]))[..., 0, :]
        nearest = torch.minimum(nearest, row).scatter(-1, pick, float("-inf"))
        pick = nearest.argmax(-1, keepdim=True)
        picks.append(pick)
    return torch.cat(picks, dim=-1)
