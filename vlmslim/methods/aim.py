"""AIM: "Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning" (ICCV 2025, arXiv 2412.03248)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmslim.attention import decoder_attention
from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, LayerInput, check_keep, resolve_keep
from vlmslim.selection import full_precision, rank_within_groups, share_out

ROWS = 256  # query rows of an attention map that exist at once


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
        for name, known in (("order", ("raster", "released")), ("newline", ("within", "extra"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r}: use one of {', '.join(map(repr, known))}")
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


@dataclass
class PageRankPrune(Compressor):
    """Drop visual tokens layer by layer, least important first, until none is left.

    Layer l sees r(l) of the visual tokens that entered: all up to layer `start`, then linearly fewer, none from layer
    `stop` on. Those stay that rank highest in the sharpened attention of layer l - 1, taken as a graph in which every
    token, text included, hands its importance to what it looks at. The images of a prompt share its budget; text
    always stays, and so does a prompt's last token, which predicts the next; kept tokens keep their rotary positions.

    The release only hides pruned tokens as keys: they go on voting and cost what they did. Here they are gone, so
    that the graph is that of the survivors (keep sets differ by about one token a layer). Also unlike the release,
    every sample has a budget of its own, decoding sees what prefill kept, and equal scores go to the lower index.

    start       : l1, last layer that sees everything: a number, or a share of the depth. By default the paper's 14 of
                  28 layers and 13 of 32; half of any other depth
    stop        : l2, first layer that sees nothing. By default 22 of 28 and 21 of 32; 11/14 of any other depth
    temperature : of the softmax of the graph; below 1 sharpens
    iterations  : steps from the uniform distribution
    damping     : share that is spread evenly at each step
    """

    knobs: ClassVar = ("stop", "start")

    start: int | float | None = None
    stop: int | float | None = None
    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    def __post_init__(self):
        for name in ("start", "stop"):
            layer = getattr(self, name)
            if layer is None:
                continue
            if isinstance(layer, bool) or not isinstance(layer, int | float):
                raise ValueError(f"{name}={layer!r}: give a decoder layer (14) or a share of the depth (0.5)")
            if layer < 0 or isinstance(layer, float) and layer > 1:
                raise ValueError(f"{name}={layer}: a layer is not negative, and a share of the depth lies in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: it must be positive; the paper's is 0.1")
        if isinstance(self.iterations, bool) or not isinstance(self.iterations, int) or self.iterations < 1:
            raise ValueError(f"iterations={self.iterations!r}: at least one; the paper's number is 5")
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping={self.damping!r}: a share lies in [0, 1); the release has 0")

    def setup(self, model: nn.Module) -> None:
        """Turn the schedule into layers of this model."""
        depth = len(model.model.language_model.layers)
        self.span = self.span_of(depth)
        self.layers = tuple(range(self.span[0] + 1, min(self.span[1], depth - 1) + 1))

    def span_of(self, depth: int) -> tuple[int, int]:
        """Last layer that sees everything and first that sees nothing, of `depth`.

        Raises:
            ValueError: the second is not beyond the first.
        """
        usual = (13, 21) if depth == 32 else (round(depth / 2), round(depth * 11 / 14))
        given = (round(layer * depth) if isinstance(layer, float) else layer for layer in (self.start, self.stop))
        first, none = (default if layer is None else layer for layer, default in zip(given, usual, strict=True))
        if first >= none:
            raise ValueError(f"pruning from layer {first} to {none} of {depth}: give a stop beyond the start")
        return first, none

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """The schedule."""
        return [scheduled(n, layer, *self.span_of(depth)) for layer in range(depth)]

    def retain(self, tokens: LayerInput) -> Tensor:
        """Keep the highest ranks of every sample."""
        visual = tokens.image > 0
        place = torch.arange(visual.shape[1], device=visual.device)
        visual &= place != tokens.last[:, None]
        budget = [scheduled(sum(row), tokens.layer, *self.span) for row in tokens.entered]
        if not any(budget):
            return ~visual
        score = pagerank(
            tokens.mask, previous_attention(tokens, self.temperature), iterations=self.iterations, damping=self.damping
        )
        rank = rank_within_groups(score.to(visual.device), visual.long())
        return ~visual | (rank < torch.tensor(budget, device=visual.device)[:, None])


@dataclass
class AIM(Compressor):
    """Merge alike visual tokens before the language model, then prune them progressively inside it.

    Two stages, `BipartiteMerge` and `PageRankPrune`, which say more and can be used apart. The paper's settings:
    OneVision-7B video keep=0.25; LLaVA-1.5 keep=0.4375 (252 tokens) or keep=0.125 (72). What a prefill costs follows
    `equivalent_tokens` in the receipt, far below `keep`. keep=1.0 keeps everything, inside the language model too;
    to prune only, use the stage `PageRankPrune()`.

    Departures from the release (commit edc24e9): likeness, means and importance are computed in fp32; a zero token is
    like no other instead of NaN; a merge asked to remove nothing is the identity; ties go to the lower index; tokens
    stand in reading order by default; pruned tokens are removed rather than hidden, per sample; batches, several
    images a prompt and any depth work. `order="released", newline="extra"` sends the language model what the release
    does.

    keep        : visual tokens to send per image, a count or a share
    start, stop : decoder layers (or shares of the depth) between which the schedule falls from all tokens to none
    order       : "raster", or "released" for the release's order
    newline     : "within" the budget, or "extra" to it, for the token that ends a video or an untiled image
    positions   : "renumbered" (as released) or "original" rotary positions
    temperature, iterations, damping : of the importance
    """

    knobs: ClassVar = ("keep", "stop")

    keep: Keep = 0.25
    start: int | float | None = None
    stop: int | float | None = None
    order: str = "raster"
    newline: str = "within"
    positions: str = "renumbered"
    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    def __post_init__(self):
        self.stages()

    def stages(self) -> list[Compressor]:
        """Merging, and pruning unless everything is to be kept."""
        merge = BipartiteMerge(self.keep, self.order, self.newline, self.positions)
        prune = PageRankPrune(self.start, self.stop, self.temperature, self.iterations, self.damping)
        return [merge] if isinstance(self.keep, float) and self.keep == 1 else [merge, prune]


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

    The even ones left over come first, in their order. The sum is a product with 0 and 1 rather than a scatter, whose
    order of summation is not fixed on a GPU.
    """
    even, odd = (x[..., i::2, :] for i in (0, 1))
    even = even.gather(-2, order[..., None].expand(*order.shape, x.shape[-1]))
    moved, left = even.split([mate.shape[-1], even.shape[-2] - mate.shape[-1]], dim=-2)
    joins = (torch.arange(odd.shape[-2], device=x.device)[:, None] == mate[..., None, :]).to(x.dtype)  # (..., odd, r)
    return torch.cat([left, (odd + joins @ moved) / (1 + joins.sum(-1, keepdim=True))], dim=-2)


def scheduled(n: int, layer: int, start: int, stop: int) -> int:
    """How many of `n` visual tokens decoder layer `layer` sees: all up to `start`, none from `stop` on."""
    return n * min(max(stop - layer, 0), stop - start) // (stop - start)


def previous_attention(tokens: LayerInput, temperature: float = 1.0, rows: int = ROWS) -> Iterator[Tensor]:
    """Attention of layer `tokens.layer - 1`, a few rows at a time, the last ones first.

    Yields:
        (B, heads, q, end) in fp32: what rows end - q .. end - 1 pay to the tokens 0 .. end - 1, all that they can see.
    """
    layer, hidden, rope = tokens.previous
    batch, size = hidden.shape[:2]
    rows = min(rows, -(-size // 2))  # never the whole map at once, however short the prompt
    for end in range(size, 0, -rows):
        row = torch.arange(max(0, end - rows), end, device=hidden.device).expand(batch, -1)
        seen = tuple(part[:, :end] for part in rope)
        logits = decoder_attention(layer, hidden[:, :end], seen, tokens.mask[:, :end], row)
        yield logits.div_(temperature).softmax(-1)


@full_precision
def pagerank(real: Tensor, attention: Iterable[Tensor], *, iterations: int = 5, damping: float = 0.0) -> Tensor:
    """Importance of tokens: where a uniform distribution goes in a few steps along causal attention.

    Every head is a graph of its own, and their results are joined by the root mean square. As nobody looks ahead,
    what a row passes on is settled once all rows behind it are done: taken from the last row to the first, all steps
    can be made at once, so that each row of attention is needed just once.

    Args:
        real: (B, S) 1 at tokens, 0 at padding.
        attention: blocks (B, heads, q, end): rows end - q .. end - 1, last rows first, all rows in the end.
        iterations: number of steps.
        damping: share of every step that is spread evenly.

    Returns:
        (B, S).
    """
    uniform = real / real.sum(1, keepdim=True)
    rank: list[Tensor] = []
    for block in attention:
        heads, q, end = block.shape[1:]
        uniform = uniform.to(block.device)
        if not rank:
            start = uniform[:, None].repeat(1, heads, 1)
            rank = [start, *(damping * start for _ in range(iterations))]
        for now, then in zip(rank, rank[1:], strict=False):
            then[..., :end] += (1 - damping) * (now[..., None, end - q : end] @ block)[..., 0, :]
    last = rank[-1]
    scale = last.amax(1, keepdim=True).clamp(min=torch.finfo(last.dtype).tiny)  # squares of small ranks underflow
    return (scale * (last / scale).square().mean(1, keepdim=True).sqrt())[:, 0]
