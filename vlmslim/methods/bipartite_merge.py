"""bipartite_merge: average alike visual tokens; the first stage of AIM (arXiv 2412.03248)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_choices, check_keep, resolve_keep
from vlmslim.ops.selection import share_out


@dataclass
class BipartiteMerge(Compressor):
    """Halve the tokens of every crop or frame, again and again, by averaging each with its nearest match.

    LLaVA-1.5 and LLaVA-NeXT merge what enters the projector, alike by the keys of the tower's last layer; CLS has no
    part in it, so SigLIP towers do too. OneVision merges what enters the language model, alike by itself. Tokens of
    different crops or frames never merge. Released for LLaVA-1.5 and for OneVision videos; tiled images are our
    extension, and without their rows of patches they lose their newlines.

    keep      : visual tokens to send per image, a count or a share; crops or frames get even shares
    order     : "raster" sends the merged tokens in reading order; "released" the unmerged ones of a crop first, most
                alike first, as the release does (the same where the last step halves: shares of 1/2, 1/4, 1/8)
    newline   : the token that ends a video (or an untiled image) is kept, "within" the budget, or as "extra" to one
                of patches alone, as in the release (49 a frame and one more)
    positions : "renumbered" (as released) or "original" rotary positions
    """

    keep: Keep = 0.25
    order: str = "raster"
    newline: str = "within"
    positions: str = "renumbered"

    def __post_init__(self):
        check_keep(self.keep)
        check_choices(self, order=("raster", "released"), newline=("within", "extra"))
        if self.order == "released" and self.positions == "original":
            raise ValueError("order='released' moves tokens away from their places; use positions='renumbered' with it")

    def setup(self, model: nn.Module) -> None:
        """Find the projector, if merging comes before it. OneVision pools after it, so there it cannot."""
        if model.config.model_type != "llava_onevision":
            self.projector = model.model.multi_modal_projector
            self.tower_layers = (-1,)

    def compress(self, image: ImageTokens) -> Compressed:
        """Merge within every crop, then project."""
        n, device = len(image.features), image.features.device
        crop = image.grid[:, 0].cpu()
        newline = (crop < 0).nonzero()[:, 0]
        patches = n - len(newline)
        tiled = image.tiles[1] > 0
        if self.newline == "extra" and not tiled:
            k, spared = resolve_keep(self.keep, patches), len(newline)
        else:
            k = resolve_keep(self.keep, n)
            spared = max(0, k - patches) if tiled else min(len(newline), k - 1)
            k -= spared
        if k + spared == n:
            return Compressed(image.features, torch.arange(n, device=device))
        x, metric = self._space(image)
        crops = [(crop == c).nonzero()[:, 0] for c in crop[crop >= 0].unique().tolist()]
        alike: dict[tuple[int, int], list[int]] = {}
        targets = share_out(k, [len(index) for index in crops])
        for i, target in enumerate(targets):
            if target:
                alike.setdefault((len(crops[i]), target), []).append(i)
        merged, slots = [x[:0]] * len(crops), [torch.arange(0)] * len(crops)
        for (_, target), members in alike.items():
            index = torch.stack([crops[i] for i in members]).to(x.device)
            tokens, place = merge_tokens(x[index], metric[index] if metric is not None else None, target)
            for i, t, slot in zip(members, tokens, index.gather(1, place), strict=True):
                merged[i], slots[i] = t, slot
        features = torch.cat(merged)
        if hasattr(self, "projector"):
            features = self.projector(features)
        spare = newline[:spared].to(device)
        features = torch.cat([features.to(image.features), image.features[spare]])
        slot = torch.cat([*(slot.to(device) for slot in slots), spare])
        index, order = slot.sort()
        return Compressed(features[order] if self.order == "raster" else features, index)

    def _space(self, image: ImageTokens) -> tuple[Tensor, Tensor | None]:
        """What is merged and by which likeness, token by token of the image; no likeness of their own at OneVision."""
        if not hasattr(self, "projector"):
            return image.features, None
        keys = image.qk(-1)[1].transpose(1, 2).flatten(2)  # (c, p', v)
        keys = keys[:, keys.shape[1] - image.tower.shape[1] :]
        crop, row, column = image.grid.to(keys.device).unbind(1)
        ahead = image.tower.shape[1] - image.side**2  # CLS, if the model selects it too
        place = torch.where(row < 0, 0, ahead + row * image.side + column)
        token = (crop.clamp(min=0) * image.tower.shape[1] + place).to(image.tower.device)
        return image.tower.flatten(0, 1)[token], keys.flatten(0, 1)[token]


def merge_tokens(x: Tensor, metric: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Merge n tokens into k, in as few steps as possible: each removes half of what is left at most.

    A mean of means: how many tokens a token already stands for doesn't count. Differentiable in `x`.

    Args:
        x: (..., n, d) tokens.
        metric: (..., n, m) what their likeness is measured on, merged along with them; None for the tokens themselves.
        k: tokens to be left, 1 <= k <= n.

    Returns:
        (..., k, d) tokens in the release's order, and (..., k), the index of the token in whose place each stands.
    """
    dtype = x.dtype
    slot = torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1])
    with torch.autocast(x.device.type, enabled=False):
        x = x.float()
        metric = x if metric is None else metric.detach().float()
        while (n := x.shape[-2]) > k:
            order, mate = match(metric, min(n - k, n // 2))
            own = metric is x
            x = merge_step(x, order, mate)
            metric = x if own else merge_step(metric, order, mate)
            slot = torch.cat([slot[..., ::2].gather(-1, order[..., mate.shape[-1] :]), slot[..., 1::2]], dim=-1)
    return x.to(dtype), slot


@torch.no_grad()
def match(metric: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Find the r tokens at even places that are most like some token at an odd place, by cosine.

    Args:
        metric: (..., n, m) in fp32.
        r: how many, at most n // 2.

    Returns:
        order: (..., ceil(n / 2)) the even tokens, numbered among themselves, most alike first.
        mate: (..., r) for the first r of them, the odd token that each is most like.
    """
    unit = F.normalize(metric, dim=-1)
    likeness = unit[..., ::2, :] @ unit[..., 1::2, :].transpose(-1, -2)
    mate = likeness.argmax(-1)
    best = likeness.gather(-1, mate[..., None])[..., 0]
    order = best.argsort(dim=-1, descending=True, stable=True)
    return order, mate.gather(-1, order[..., :r])


def merge_step(x: Tensor, order: Tensor, mate: Tensor) -> Tensor:
    """Average every odd token with the even ones that `match` gave it: (..., n, d) -> (..., n - r, d).

    The even ones left over come first, in their order.
    """
    even, odd = (x[..., i::2, :] for i in (0, 1))
    even = even.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))
    moved, left = even.split([mate.shape[-1], even.shape[-2] - mate.shape[-1]], dim=-2)
    if x.device.type == "cpu":
        shape, m = odd.shape, odd.shape[-2]
        first = torch.arange(0, mate[..., 0].numel() * m, m).view(*mate.shape[:-1], 1)  # place of each crop's first
        into = (first + mate).flatten()
        count = into.bincount(minlength=odd[..., 0].numel()).view(*shape[:-1], 1)
        total = odd.reshape(-1, shape[-1]).index_add(0, into, moved.reshape(-1, shape[-1])).view(shape)
    else:  # a product with 0 and 1: there, a scatter sums in no fixed order
        joins = (torch.arange(odd.shape[-2], device=x.device)[:, None] == mate[..., None, :]).to(x.dtype)
        total, count = odd + joins @ moved, joins.sum(-1, keepdim=True)
    return torch.cat([left, total / (1 + count)], dim=-2)
