"""bipartite_merge: average similar visual tokens; stage 1 of AIM (ICCV 2025, arXiv 2412.03248)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import (
    Compressed,
    Compressor,
    ImageTokens,
    Keep,
    check_choices,
    check_keep,
    resolve_keep,
    settle_positions,
)
from vlmslim.engine.families import family_of, projects_patches
from vlmslim.ops.budgets import share_out


@dataclass
class BipartiteMerge(Compressor):
    """Halve the tokens of every crop or frame again and again, by averaging each token with its nearest match.

    LLaVA-1.5 and LLaVA-NeXT merge the tokens that enter the projector. There, similarity is that of the keys of the
    vision tower's last layer; CLS takes no part, so SigLIP towers work too. OneVision merges the tokens that enter the
    language model, by their own similarity, because it pools them after the projector, and so do families whose
    projector makes a token of several patches (our extension). Tokens of different crops or
    frames never merge. The release covers LLaVA-1.5 and OneVision videos. Tiled images are our extension; they lose
    their newlines, because merged tokens form no rows.

    keep      : visual tokens to send per image, a count or a share; crops or frames get even shares
    order     : "raster" sends the merged tokens in reading order; "released" sends the unmerged tokens of a crop
                first, most similar first, as the release does. The two agree where the last step halves: at shares of
                1/2, 1/4 and 1/8
    newline   : the token that ends a video or an untiled image is kept either "within" the budget, or "extra" to a
                budget of patches alone, as in the release (49 a frame and one more)
    positions : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    keep: Keep = 0.25
    order: str = "raster"
    newline: str = "within"
    positions: str = "auto"

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_choices(self, order=("raster", "released"), newline=("within", "extra"))
        settle_positions(self)
        self.before_projector = False

    def setup(self, model: Any) -> None:
        """Merge before the projector where it maps patch by patch, else after it."""
        self.ends_with_newline = family_of(model).anyres  # an image without tiles does
        if model.config.model_type == "llava_onevision":
            return
        if projects_patches(model.model):
            self.before_projector = True
            self.tower_layers = (-1,)
        else:
            self.substitutes = ("late merge",)

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int:
        """Return the budget, and the newline that newline="extra" does not count."""
        patches = n - (self.newline == "extra" and self.ends_with_newline and not tiles[1])
        return resolve_keep(self.keep, patches) + n - patches

    def compress(self, image: ImageTokens) -> Compressed:
        """Merge within every crop, then project."""
        n, device = len(image.features), image.features.device
        crop = image.grid_on_host[:, 0]
        newlines = np.flatnonzero(crop < 0)
        k, spared = self._budget(image, len(newlines))
        if k + spared == n:
            return image.pick_all()

        x, metric = self._tokens_and_metric(image)
        crops = [np.flatnonzero(crop == c) for c in np.unique(crop[crop >= 0])]
        groups: dict[tuple[int, int], list[int]] = {}  # crops of equal size and budget merge together
        for i, (slots, budget) in enumerate(zip(crops, share_out(k, [len(slots) for slots in crops]), strict=True)):
            if budget:
                groups.setdefault((len(slots), budget), []).append(i)
        merged, places = [x[:0]] * len(crops), [torch.arange(0, device=device)] * len(crops)
        steps: list[tuple[list[int], list[tuple[Tensor, Tensor]]]] = []
        for (_, budget), members in groups.items():
            these = torch.from_numpy(np.stack([crops[i] for i in members])).to(x.device, non_blocking=True)
            steps.append((members, []))
            tokens, place = merge_tokens(x[these], None if metric is None else metric[these], budget, steps[-1][1])
            for i, own, taken in zip(members, tokens, these.gather(1, place).to(device), strict=True):
                merged[i], places[i] = own, taken

        features = torch.cat(merged)
        if self.before_projector:
            features = image.project(features)
        spare = torch.from_numpy(newlines[:spared]).to(device, non_blocking=True)
        features = torch.cat([features.to(image.features), image.features[spare]])
        index, order = torch.cat([*places, spare]).sort()

        def into() -> Tensor:
            number = torch.full((n,), -1)
            for members, taken in steps:
                ended = destinations(len(crops[members[0]]), taken).expand(len(members), -1)
                for i, own in zip(members, ended, strict=True):
                    number[crops[i]] = own.cpu() + sum(map(len, places[:i]))
            number[spare.cpu()] = sum(map(len, places)) + torch.arange(len(spare))
            rank = order.argsort().cpu() if self.order == "raster" else torch.arange(len(order))
            return torch.where(number < 0, -1, rank[number])

        return Compressed(features[order] if self.order == "raster" else features, index, into)

    def _budget(self, image: ImageTokens, newlines: int) -> tuple[int, int]:
        """Return how many tokens to merge the patches into, and how many newlines to keep."""
        patches = len(image.features) - newlines
        tiled = image.tiles[1] > 0
        if self.newline == "extra" and not tiled:
            return resolve_keep(self.keep, patches), newlines
        k = resolve_keep(self.keep, len(image.features))
        spared = max(0, k - patches) if tiled else min(newlines, k - 1)
        return k - spared, spared

    def _tokens_and_metric(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        """Return, for each of the image's tokens, what merges (n, v) and what similarity is measured on (n, w).

        None instead of the latter means that similarity is that of the tokens themselves.
        """
        if not self.before_projector:
            return image.features, None
        patches = image.tower.shape[1]  # of a crop, and CLS in front if the model selects it too
        keys = image.qk(-1)[1].transpose(1, 2).flatten(2)[:, -patches:]  # (c, p, v)
        crop, row, column = image.grid.to(keys.device).unbind(1)
        ahead = patches - image.side**2
        place = torch.where(row < 0, 0, ahead + row * image.side + column)
        token = (crop.clamp(min=0) * patches + place).to(image.tower.device)
        return image.tower.flatten(0, 1)[token], keys.flatten(0, 1)[token]


def merge_tokens(
    x: Tensor, metric: Tensor | None, k: int, steps: list[tuple[Tensor, Tensor]] | None = None
) -> tuple[Tensor, Tensor]:
    """Merge n tokens into k in as few steps as possible; each step removes at most half of the tokens left.

    A merged token is a mean of means: it does not matter how many tokens each part already stands for. Differentiable
    in `x`.

    Args:
        x: (..., n, d) tokens.
        metric: (..., n, w) what similarity is measured on, merged along with the tokens; None for the tokens
            themselves.
        k: number of tokens to end up with, 1 <= k <= n.
        steps: gets what `match` found in each step, for `destinations`.

    Returns:
        (..., k, d) tokens in the release's order, and (..., k) the slot that each of them takes.
    """
    dtype = x.dtype
    slot = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        metric = x if metric is None else metric.detach().float()
        while (n := x.shape[-2]) > k:
            order, mate = match(metric, min(n - k, n // 2))
            if steps is not None:
                steps.append((order, mate))
            own = metric is x
            x = merge_step(x, order, mate)
            metric = x if own else merge_step(metric, order, mate)
            slot = torch.cat([slot[..., ::2].gather(-1, order[..., mate.shape[-1] :]), slot[..., 1::2]], dim=-1)
    return x.to(dtype), slot


def destinations(n: int, steps: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Follow n tokens through the `steps` of `merge_tokens`: (..., n), the number of the token in which each ended."""
    place: Tensor | None = None
    for order, mate in steps:
        left = order.shape[-1] - mate.shape[-1]  # even tokens that stay come first, and then the odd ones
        alone = torch.arange(left, device=mate.device).expand(*mate.shape[:-1], left)
        even = torch.empty_like(order).scatter_(-1, order, torch.cat([left + mate, alone], dim=-1))
        total = n if place is None else int(place.max()) + 1
        step = torch.empty((*mate.shape[:-1], total), dtype=torch.long, device=mate.device)
        step[..., ::2], step[..., 1::2] = even, left + torch.arange(total // 2, device=mate.device)
        place = step if place is None else step.gather(-1, place)
    return torch.arange(n)[None] if place is None else place


@torch.no_grad()
def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Find the r even tokens (those at even places) that are most similar to some odd token, by cosine.

    Args:
        metric: (..., n, m) in fp32.
        r: number of tokens to find, at most n // 2.

    Returns:
        order: (..., ceil(n / 2)) all even tokens, numbered among themselves, most similar first.
        mate: (..., r) for the first r of them, the odd token that each is most similar to.
    """
    unit = F.normalize(metric, dim=-1)
    similarity = unit[..., ::2, :] @ unit[..., 1::2, :].transpose(-1, -2)
    mate = similarity.argmax(-1)
    best = similarity.gather(-1, mate[..., None])[..., 0]
    order = best.argsort(dim=-1, descending=True, stable=True)
    return order, mate.gather(-1, order[..., :r])


def merge_step(x: Tensor, order: Tensor, mate: Tensor) -> Tensor:
    """Average every odd token with the even tokens that `match` gave it: (..., n, d) -> (..., n - r, d).

    The even tokens that were not matched come first, in their order.
    """
    even, odd = x[..., ::2, :], x[..., 1::2, :]
    even = even.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))
    moved, left = even.split([mate.shape[-1], even.shape[-2] - mate.shape[-1]], dim=-2)
    # A product with zeros and ones, because a scatter on a GPU sums in no fixed order.
    joins = (torch.arange(odd.shape[-2], device=x.device)[:, None] == mate[..., None, :]).to(x.dtype)
    mean = (odd + joins @ moved) / (1 + joins.sum(-1, keepdim=True))
    return torch.cat([left, mean], dim=-2)
