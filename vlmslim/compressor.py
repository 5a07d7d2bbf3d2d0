"""The contract of a method: `Compressor`, what it is shown (`ImageTokens`, `LayerInput`) and returns (`Compressed`)."""

import math
import zlib
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmslim.ops.attention import DecoderAttention, tower_qk, weighted_logits
from vlmslim.ops.effective_rank import adapted, effective_rank
from vlmslim.ops.ranking import rank_within_groups
from vlmslim.ops.rectification import merge_rest
from vlmslim.options import check_options, fits, shown

#: A count, a share of an image's visual tokens, or {"auto": count or share, "average": rank}: more to complex images.
Keep: TypeAlias = int | float | dict[str, int | float]


# --- options that many methods have -----------------------------------------------------------------------------------


def check_keep(keep: Keep, name: str = "keep") -> None:
    """Refuse a budget that means nothing.

    Raises:
        ValueError: `keep` is no count (int >= 1), no share (float in (0, 1]), and neither of these for each image.
    """
    if isinstance(keep, dict):
        _check_auto(keep, name)
        keep = keep["auto"]
    if not fits(keep, Keep):
        raise ValueError(f"{name}={shown(keep)}: give a count (64) or a share (0.11) of the visual tokens to keep")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"{name}={keep}: at least one visual token per image must be kept")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"{name}={keep}: a share lies in (0, 1]; for a count of tokens write an integer")


def _check_auto(keep: dict, name: str) -> None:
    """Refuse a budget for each image that does not say its mean and the effective rank of an average image."""
    if not set(keep) <= {"auto", "average"} or isinstance(keep.get("auto"), dict | None):
        raise ValueError(
            f"{name}={shown(keep)}: give each image its own budget by {name}={{'auto': 64, 'average': 31.5}}, the mean "
            "and the effective rank of an average image"
        )
    average = keep.get("average")
    if average is None:
        raise ValueError(
            f"{name}={shown(keep)} does not say the effective rank of an average image: vlmslim.cost.budget.solve("
            f"model, method, prompts, auto={keep['auto']}) finds it, as vlmslim run does for the budget {{auto: ...}}"
        )
    if not fits(average, float) or not average > 0:
        raise ValueError(f"{name}={shown(keep)}: the effective rank of an average image is a positive number")


def resolve_keep(keep: Keep, n: int) -> int:
    """Turn a budget into a number of tokens of an image that has `n`.

    A share is rounded half to even on the double product, as Python's `round` does, and never below one.

    Raises:
        ValueError: the budget is malformed, or larger than the image, or each image has its own.
    """
    check_keep(keep)
    if isinstance(keep, dict):
        raise ValueError(f"keep={keep} depends on the image, and here only its size is known; give a count or a share")
    if isinstance(keep, float):
        return max(1, round(keep * n))
    if keep > n:
        raise ValueError(
            f"keep={keep} is larger than the image, which has {n} visual tokens; use at most {n} or a share"
        )
    return keep


def check_layer(layer: int | float, name: str = "layer") -> None:
    """Refuse a decoder layer before which nothing can be dropped.

    Raises:
        ValueError: `layer` is neither a number (int >= 1) nor a share of the depth (float in (0, 1)).
    """
    if layer <= 0 or (isinstance(layer, float) and layer >= 1):
        raise ValueError(f"{name}={layer!r}: give a decoder layer from 1 on, or a share of the depth in (0, 1)")


def resolve_layer(layer: int | float, depth: int) -> int:
    """Turn a share of the depth into a decoder layer; a number stays as it is.

    A share is rounded down and stays between 1 and `depth` - 1, because before layer 0 nothing has attended yet and
    after the last layer there is nothing to save. 7/8 is layer 28 of 32, 24 of 28 and 3 of 4.
    """
    if not isinstance(layer, float):
        return layer
    return max(1, min(int(layer * depth + 1e-9), depth - 1))


def check_choices(options: object, **known: tuple[str, ...]) -> None:
    """Refuse options whose value is unknown: `check_choices(self, order=("raster", "released"))`.

    Raises:
        ValueError: names the option and its known values.
    """
    for name, values in known.items():
        value = getattr(options, name)
        if value not in values:
            raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, values))}")


#: Rotary positions of what a method keeps before the language model, unless its options move tokens from their places.
POSITIONS = "original"


def settle_positions(options: Any) -> None:
    """Replace positions="auto" by the default, or by the release's where the options ask for the order of a release.

    Raises:
        ValueError: positions="original" with tokens that are moved away from their places.
    """
    named = {"mode": ("released",), "order": ("selection", "released")}
    moved = [f"{name}={getattr(options, name)!r}" for name, of in named.items() if getattr(options, name, None) in of]
    if options.positions == "auto":
        options.positions = "renumbered" if moved else POSITIONS
    if moved and options.positions == "original":
        raise ValueError(f"{moved[0]} moves tokens away from their places; use positions='renumbered' with it")


# --- before the language model ----------------------------------------------------------------------------------------


@dataclass
class Compressed:
    """What one image sends to the language model: k tokens, in the order the language model reads them.

    features : (k, d), or None for the image's own tokens at `index`, unchanged. The prompt already contains those, so
               the engine moves them by index and never copies their features
    index    : (k,) positions among the image's n tokens, each at most once. With `features`, the slots that the tokens
               take; None then means the first k. Slots decide which rotary position a token keeps under
               `positions="original"`
    into     : for methods that merge, a function that returns (n,), the one of the k tokens into which each of the
               image's n went, -1 for none. Without it each token is the one at `index`. Pictures call it, and models
               that add features of their tower after decoder layers (DeepStack), which are then averaged alike
    size     : (k,) how many of the image's tokens each one stands for: in every decoder layer, attention to it counts
               as if its key were there so often (its logarithm is added to the logits). None if each stands for one
    """

    features: Tensor | None
    index: Tensor | None = None
    into: Callable[[], Tensor] | None = None
    size: Tensor | None = None

    def __len__(self) -> int:
        tokens = self.index if self.features is None else self.features
        return 0 if tokens is None else len(tokens)

    def vectors(self, image: "ImageTokens") -> Tensor:
        """Return the features (k, d) that `image` sends, also where they are its own tokens."""
        return image.features[self.index] if self.features is None else self.features


@dataclass
class ImageTokens:
    """The visual tokens of one image or one video, between the projector and the language model.

    features : (n, d)       projected tokens, in the order the language model would read them
    tower    : (c, p, v)    vision-tower features of each crop (or frame), as they enter the projector. Where a token is
                            made of several patches, they stand next to each other, token by token
    pixels   : (c, 3, h, w) the crops themselves; towers that take patches give (1, patches, numbers)
    patches  : rows and columns of patches of one crop
    merge    : patches along each side of a token
    tiles    : rows and columns of tiles in the anyres mosaic; (0, 0) without tiles
    size     : height and width of the picture that was cut into tiles; (0, 0) without tiles
    video    : whether the crops are the frames of a video
    prompt   : (t,) ids of the text tokens of the same prompt, on the CPU; None if the caller gave embeddings
    score    : (n,) by which a method ranked the tokens, higher is better; pictures show it. None if it did not say
    projector       : the model's projector, found when it is used, because adapters replace it
    make_grid       : computes `grid` when a method asks for it
    make_views      : computes `views`, where `pixels` are no pictures
    recorded_layers : layer of the vision tower -> the module and its input (c, p', v), of a method's `tower_layers`
    recorded_heads  : layer of the vision tower -> its queries and keys (c, heads, p, v / heads), where the tower turns
                      them by position, or has its weights only while it runs
    """

    features: Tensor
    tower: Tensor
    pixels: Tensor
    patches: tuple[int, int] = (0, 0)
    merge: int = 1
    tiles: tuple[int, int] = (0, 0)
    size: tuple[int, int] = (0, 0)
    video: bool = False
    prompt: Tensor | None = None
    score: Tensor | None = None
    projector: Callable[[Tensor], Tensor] | None = None
    make_grid: Callable[[], Tensor] | None = None
    make_views: Callable[[], Tensor] | None = None
    recorded_layers: dict[int, tuple[nn.Module, Tensor]] = field(default_factory=dict)
    recorded_heads: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def grid_on_host(self) -> np.ndarray:
        """(n, 3) on the host: crop, row and column of every token; -1 three times at a newline token.

        Crop 0 is the whole image (the thumbnail under anyres), 1.. are the tiles in reading order; for a video the
        crop is the frame. Rows and columns count within the crop. They are known before the picture is encoded, so
        that choices by places need no waiting for the device.

        Raises:
            RuntimeError: the image was made without `make_grid`.
        """
        if self.make_grid is None:
            raise RuntimeError("the positions of this image's tokens are unknown; make it with make_grid=...")
        return self.make_grid().numpy()

    @cached_property
    def grid(self) -> Tensor:
        """(n, 3): `grid_on_host` on the device of the features."""
        return torch.from_numpy(self.grid_on_host).to(self.features.device, non_blocking=True)

    @cached_property
    def mosaic(self) -> Tensor:
        """(n, 3): `mosaic_on_host` on the device of the features."""
        return torch.from_numpy(self.mosaic_on_host).to(self.features.device, non_blocking=True)

    @cached_property
    def mosaic_on_host(self) -> np.ndarray:
        """(n, 3) on the host: component, row and column of every token; -1 three times at a newline token.

        Component 0 is the whole image, 1 the mosaic of tiles; of a video it is the frame. Unlike in `grid`, the tiles
        of an image share one coordinate system.
        """
        rows, columns = self.tiles
        if self.video or not columns:
            return self.grid_on_host
        crop, row, column = self.grid_on_host.T
        tile, in_tile = crop - 1, crop > 0
        row = np.where(in_tile, row + tile // columns * self.side, row)
        column = np.where(in_tile, column + tile % columns * self.side, column)
        return np.stack([crop.clip(max=1), row, column], axis=1)

    @property
    def views(self) -> Tensor:
        """The crops or frames as pictures, normalised as the tower reads them: (c, 3, h, w)."""
        return self.pixels if self.make_views is None else self.make_views()

    @property
    def side(self) -> int:
        """Patches along one side of a (square) crop."""
        return self.patches[0] or int(self.tower.shape[1] ** 0.5)

    @classmethod
    def joined(cls, views: "list[ImageTokens]", thumbnail: int = -1) -> "ImageTokens":
        """Make one picture of its views. The thumbnail, the last view (-1) or the first one (0), becomes crop 0."""
        to_front = -thumbnail

        def make_grid() -> Tensor:
            crops = [(i + to_front) % len(views) for i in range(len(views))]
            moved = [v.grid_on_host + [i, 0, 0] for i, v in zip(crops, views, strict=True)]
            return torch.from_numpy(np.concatenate(moved))

        def crops_of(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts).roll(to_front, 0)

        def heads(layer: int, part: int) -> Tensor:
            return crops_of([view.recorded_heads[layer][part] for view in views])

        layers = {
            i: (layer, crops_of([view.recorded_layers[i][1] for view in views]))
            for i, (layer, _) in views[0].recorded_layers.items()
        }
        return replace(
            views[0],
            features=torch.cat([view.features for view in views]),
            tower=crops_of([view.tower for view in views]),
            pixels=crops_of([view.pixels for view in views]),
            make_grid=make_grid,
            recorded_layers=layers,
            recorded_heads={i: (heads(i, 0), heads(i, 1)) for i in views[0].recorded_heads},
        )

    @cached_property
    def effective_rank(self) -> float:
        """How complex the image is: the effective rank of its features, the mean over its crops or frames.

        Newlines do not count.
        """
        crop = self.grid[:, 0]
        ranks = [effective_rank(self.features[crop == i][None]) for i in crop[crop >= 0].unique()]
        return float(sum(ranks) / len(ranks))

    @property
    def fingerprint(self) -> int:
        """A number that depends on the pixels only, so that an image has the same one in any batch."""
        return zlib.crc32(self.pixels.detach().float().cpu().contiguous().numpy().data)

    def generator(self, seed: int) -> torch.Generator:
        """Return a CPU generator of random numbers, the same for this image and seed in any batch and in any run."""
        mixed = (seed * 0x9E3779B1 + self.fingerprint) % 2**32  # torch reads 32 bits of a CPU generator's seed
        return torch.Generator().manual_seed(mixed)

    def qk(self, layer: int) -> tuple[Tensor, Tensor]:
        """Compute queries and keys of a vision-tower layer, unscaled, CLS included: (c, heads, p', v / heads) each.

        Raises:
            RuntimeError: the method did not list `layer` in `tower_layers`.
        """
        if layer in self.recorded_heads:
            return self.recorded_heads[layer]
        if layer not in self.recorded_layers:
            raise RuntimeError(f"tower layer {layer} was not recorded: list it in `tower_layers`")
        return tower_qk(*self.recorded_layers[layer])

    @property
    def cls(self) -> Tensor:
        """(c, v): the CLS token of each crop, as the tower returns it in the layer whose patches LLaVA reads.

        Raises:
            RuntimeError: the method did not list -1, the layer that reads it, in `tower_layers`.
        """
        if -1 not in self.recorded_layers:
            raise RuntimeError("the CLS token was not recorded: list -1 in `tower_layers`")
        return self.recorded_layers[-1][1][:, 0]

    def at_tokens(self, patches: Tensor) -> Tensor:
        """Read what is known of each patch of the tower at the image's tokens.

        A token that is made of several patches reads their mean. A token of a resized mosaic reads the patch nearest to
        it. Where the frames of a video are pooled after the tower, the values are pooled alike.

        Args:
            patches: (c, p) or (c, p, v) of every crop or frame, without CLS, in the order of `tower`.

        Returns:
            (n,) or (n, v); 0 at tokens without a place, such as newlines.
        """
        grid = self.grid.to(patches.device, non_blocking=True)
        side = (self.patches[1] or self.side) // self.merge
        cells = (self.patches[0] or self.side) // self.merge * side
        if (each := patches.shape[1] // cells) > 1:
            patches = patches.unflatten(1, (cells, each)).float().mean(2).to(patches)
        if self.video and each == 1 and (pooled := int(self.grid_on_host[:, 1].max()) + 1) < side:
            maps = patches.reshape(len(patches), side, side, -1).movedim(-1, 1).float()
            maps = functional.interpolate(maps, (pooled, pooled), mode="bilinear").movedim(1, -1)
            patches, side = maps.reshape(len(patches), pooled**2, *patches.shape[2:]).to(patches), pooled
        crop, row, column = grid.clamp(min=0).unbind(1)
        read = patches[crop, row * side + column]
        return read.where((grid >= 0).all(1).view(-1, *[1] * (read.ndim - 1)), torch.zeros_like(read))

    @property
    def tower_tokens(self) -> Tensor:
        """(n, v): the vision tower's features at the image's tokens, before the projector; 0 at newlines."""
        return self.at_tokens(self.tower[:, -(math.prod(self.patches) or self.side**2) :])

    def project(self, tower: Tensor) -> Tensor:
        """Project vision-tower features (..., v) with the model's own projector: (..., d).

        They enter in the dtype of `tower`, because the weights of a quantised projector have none that would do.

        Raises:
            RuntimeError: the image was made without `projector`.
        """
        if self.projector is None:
            raise RuntimeError("the projector of this image's model is unknown; make the image with projector=...")
        return self.projector(tower.to(self.tower.dtype))

    def pick(self, index: Tensor) -> Compressed:
        """Keep the image's own tokens at `index` (k,), in that order."""
        return Compressed(None, index)


# --- between decoder layers -------------------------------------------------------------------------------------------


class Attends(Protocol):
    """What a decoder layer attends with, as `vlmslim.engine.attention.LayerAttention`."""

    @property
    def rotary(self) -> Tensor | tuple[Tensor, ...] | None:
        """Cosine and sine of the rotary positions, (B or 1, S, head_dim) each, in most models."""

    def attend(
        self, mask: Tensor, keys: Tensor | None, prefix: int = 0, blocks: Tensor | None = None
    ) -> DecoderAttention:
        """Return the attention of the layer."""

    def first(self, count: int) -> Self:
        """Return the same without the tokens after the first `count` of every row."""


@dataclass
class LayerInput:
    """The tokens about to enter decoder layer `layer`, in a prefill that brought images.

    hidden   : (B, S, d) hidden states
    mask     : (B, S)    False at padding
    image    : (B, S)    i at the visual tokens of the row's i-th image, from 1; 0 at text and padding
    slot     : (B, S)    position of a visual token among its image's n, from 0; -1 at text, at padding, and at tokens
                         that a stage before the language model made without saying which slots they take
    origin   : (B, S)    index of each token in the caller's sequence
    last     : (B,)      index of the last token of each row that is not padding
    entered  : per row, how many visual tokens of each image entered the language model
    present  : per row, how many visual tokens of each image there are now; their sum alone, if no more is known
    image_last : per row, whether a visual token ends the prompt; None if tokens after the prompt are left out
    images   : per row, the images themselves
    weight   : (B, S)    how strongly each token may be attended to at this layer; None if all count in full
    previous : what the layer before attends with; None before layer 0
    coming   : finds out with what `layer` itself is about to attend, when a method asks for it
    in_cache : (B, kv heads, P + S, head_dim) rotated keys of the layer before; None if the KV cache does not have them
    cached   : (B, P)    False at padding, of tokens that the KV cache held before this forward; None if it was empty
    size     : (B, P + S) how many tokens each key stands for in attention; None if each stands for one
    blocks   : (B, S)    tokens of one block see each other both ways, -1 for none; None if all see only what is before
    score    : (B, S)    by which a method ranked the tokens, higher is better; pictures show it. None if it did not say
    """

    layer: int
    hidden: Tensor
    mask: Tensor
    image: Tensor
    slot: Tensor
    origin: Tensor
    last: Tensor
    entered: list[list[int]]
    present: list[list[int]]
    image_last: list[bool] | None
    images: list[list[ImageTokens]]
    weight: Tensor | None = None
    previous: Attends | None = None
    coming: Callable[[], Attends] | None = None
    in_cache: Tensor | None = None
    cached: Tensor | None = None
    size: Tensor | None = None
    blocks: Tensor | None = None
    score: Tensor | None = None

    def without_last(self, count: int) -> "LayerInput":
        """Return the same input without the last `count` tokens of every row, which the caller's prompt does not have.

        They are guesses of speculative decoding, or an answer that the caller scores.
        """
        if not count:
            return self
        end = self.hidden.shape[1] - count
        cut = {name: getattr(self, name)[:, :end] for name in ("hidden", "mask", "image", "slot", "origin")}
        held, coming = 0 if self.cached is None else self.cached.shape[1], self.coming
        return replace(
            self,
            **cut,
            image_last=None,
            last=self.last.clamp(max=end - 1),
            weight=None if self.weight is None else self.weight[:, :end],
            previous=None if self.previous is None else self.previous.first(end),
            coming=None if coming is None else lambda: coming().first(end),
            in_cache=None if self.in_cache is None else self.in_cache[:, :, : held + end],
            size=None if self.size is None else self.size[:, : held + end],
            blocks=None if self.blocks is None else self.blocks[:, :end],
        )

    @property
    def keys(self) -> Tensor:
        """(B, kv heads, S, head_dim) rotated keys of the layer before in fp32, cached or computed anew."""
        return self._attention.keys[:, :, self._attention.prefix :].to(self.hidden.device)

    @property
    def rotary(self) -> tuple[Tensor, ...] | None:
        """Cosine and sine of the tokens' rotary positions in the layer before, (B or 1, S, rotated channels) each.

        None where the layer does not turn, or turns by something else.
        """
        turned = None if self.previous is None else self.previous.rotary
        return turned if isinstance(turned, tuple) and len(turned) == 2 else None

    @cached_property
    def _attention(self) -> DecoderAttention:
        if self.previous is None:
            raise RuntimeError("there is no attention before decoder layer 0; use layer >= 1")
        return self._attended(self.previous, self.in_cache)

    @cached_property
    def _coming(self) -> DecoderAttention:
        if self.coming is None:
            raise RuntimeError("what this layer is about to attend with is unknown; make the input with coming=...")
        return self._attended(self.coming())

    def _attended(self, attends: Attends, keys: Tensor | None = None) -> DecoderAttention:
        if self.cached is None:
            return attends.attend(self.mask, keys, blocks=self.blocks)
        mask, prefix = torch.cat([self.cached, self.mask], dim=1), self.cached.shape[1]
        blocks = None if self.blocks is None else functional.pad(self.blocks, (prefix, 0), value=-1)
        return attends.attend(mask, keys, prefix, blocks)

    def attention(self, rows: Tensor, temperature: float = 1.0, end: int | None = None) -> Tensor:
        """Compute the attention that query tokens paid in layer `layer - 1`.

        It is recomputed for these rows alone, so that every attention back end serves and no full map exists. Tokens
        that were in the KV cache before this forward take their share, which is not returned.

        Args:
            rows: (B, q) indices of the query tokens.
            temperature: of the softmax.
            end: look at the tokens before `end` only, which is all that rows before `end` can see; None for all.

        Returns:
            (B, heads, q, S) in fp32, or (B, heads, q, end).
        """
        if end is not None and self.blocks is not None:  # tokens before `end` may see tokens of their block after it
            return self.attention(rows, temperature)[..., :end]
        return self._paid(self._attention, rows, temperature, end)

    def coming_attention(self, rows: Tensor) -> Tensor:
        """Compute the attention that query tokens are about to pay in layer `layer` itself, before anything is dropped.

        The layer's own norm and projections are applied to `hidden`, with the rotary positions that the tokens have
        now. Arguments and result are those of `attention`.

        Raises:
            RuntimeError: the layer has its weights only while it runs (FSDP, offloading).
        """
        return self._paid(self._coming, rows)

    def _paid(
        self, attention: DecoderAttention, rows: Tensor, temperature: float = 1.0, end: int | None = None
    ) -> Tensor:
        rows = rows.to(attention.mask.device)
        logits = attention.logits(rows, end)
        if self.size is not None:
            logits = logits + self.size.to(logits.device)[:, None, None, : logits.shape[-1]].log()
        if self.weight is not None:
            logits = weighted_logits(logits, self.weight[:, :end].to(logits.device), rows)
        return attention.softmax(logits, temperature).to(self.hidden.device)

    def top(self, score: Tensor, keep: Keep | Callable[[int], int]) -> Tensor:
        """Choose for every image the `keep` tokens of highest `score` (B, S), the lower index first on ties.

        A share counts from what entered the language model; a function turns that number into a count.

        Returns:
            (B, S) bool, True at the chosen visual tokens.

        Raises:
            ValueError: `keep` is a count larger than an image.
        """
        count = keep if callable(keep) else partial(resolve_keep, keep)
        counts = [[0] + [count(n) for n in row] for row in self.entered]  # 0 of text and padding
        width = max(map(len, counts))
        self.score = score
        budget = torch.tensor([row + [0] * (width - len(row)) for row in counts]).to(score.device, non_blocking=True)
        return (rank_within_groups(score, self.image) < budget.gather(1, self.image)) & (self.image > 0)

    def count_of_top(self, keep: Keep | Callable[[int], int]) -> list[list[int]] | None:
        """Return how many tokens of each image `top` chooses, per row; None where that depends on earlier drops."""
        count = keep if callable(keep) else partial(resolve_keep, keep)
        rows = list(zip(self.entered, self.present, strict=True))
        if any(len(entered) != len(present) for entered, present in rows):
            return None
        return [[min(count(n), left) for n, left in zip(*row, strict=True)] for row in rows]


@dataclass
class Retained:
    """What stays from a decoder layer on, where a method changes the states of visual tokens: what `retain` returns.

    A token that the method made, such as a mean of dropped ones, takes the place of one of them. It then is a token
    like any other: it has the slot and the rotary position of that place, and counts in caches, receipts and drops.

    keep   : (B, S) bool, True at the places that stay
    hidden : (B, S, d) the states that enter the layer, read at visual tokens only, because text stays as it is
    """

    keep: Tensor
    hidden: Tensor


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass
class Compressor:
    """A visual-token compression method: settings and weights, and nothing about the current image.

    Override `compress` to choose, merge or re-project the tokens of an image before the language model, `retain` to
    drop tokens between decoder layers, or both. Shared attributes:

    layers       : decoder layers before which `retain` is asked: numbers, or shares of the depth (`resolve_layer`)
    tower_layers : vision-tower layers whose queries and keys `ImageTokens.qk` can compute; negative from the end
    needs_cls    : the method reads the tower's CLS token
    needs_patches : the method needs visual tokens that are single patches of the tower, projected one by one
    may_keep_none : the method may send no token of an image
    reads_prompt : the method reads the question, so that it cannot compress an image for all prompts at once
    encodes_again : the method encodes pictures itself, with the model's own tower
    reads_back   : why the method brings values from the device to the host, which waits until the device has computed
                   them; empty if it does not. The engine waits for nothing between the vision tower and the end of the
                   prefill, except for methods that say so here
    positions    : "renumbered" closes the gaps in the rotary positions, "original" leaves them
    layer_positions : the same, for the gaps that `retain` leaves, from that layer on
    budget_options : options that `vlmslim.cost.budget` may solve, the preferred one first; the larger, the costlier
    """

    layers: tuple[int | float, ...] = field(default=(), init=False, repr=False, compare=False)
    reads_prompt: bool = field(default=False, init=False, repr=False, compare=False)
    tower_layers: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    needs_cls: ClassVar[bool] = False
    needs_patches: ClassVar[bool] = False
    may_keep_none: ClassVar[bool] = False
    encodes_again: ClassVar[bool] = False
    reads_back: str = field(default="", init=False, repr=False, compare=False)
    budget_options: ClassVar[tuple[str, ...]] = ("keep",)
    positions = "renumbered"
    layer_positions = "original"

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Check the options by their annotations, before the class reads them in `__post_init__`.

        Raises:
            ValueError: names the option, its value and what to give instead.
        """
        check_options(cls, given, named)
        return super().__new__(cls)

    @property
    def acts_before_llm(self) -> bool:
        """Whether this class overrides `compress` or `compress_images`."""
        cls = type(self)
        return cls.compress is not Compressor.compress or cls.compress_images is not Compressor.compress_images

    @property
    def drops_between_layers(self) -> bool:
        """Whether this class overrides `retain` or `soft_retain`."""
        cls = type(self)
        return cls.retain is not Compressor.retain or cls.soft_retain is not Compressor.soft_retain

    def setup(self, model: nn.Module) -> None:
        """Look at the model once, when it is patched: check it, load trained weights."""

    def trained(self) -> nn.Module | None:
        """Return what training optimises and saving writes, once `setup` has run; None for a training-free method."""
        return None

    def stages(self) -> list["Compressor"]:
        """Return the stages that this method consists of, in order; by default itself."""
        return [self]

    def requested(self, n: int) -> int | None:
        """Return how many of an image's `n` tokens this method was asked to keep; None if it decides itself."""
        keep = getattr(self, "keep", None)
        return resolve_keep(keep, n) if isinstance(keep, int | float) else None

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int | None:
        """Return how many tokens an image will send to the language model, as known before it is encoded.

        Servers reserve places for an image by this number. By default `requested`; override where they differ.

        Args:
            n: the image's visual tokens.
            tiles: rows and columns of its tiles, as `ImageTokens.tiles`.
            size: height and width of the picture that was cut into tiles, as `ImageTokens.size`.

        Returns:
            None if what is seen in the image decides.
        """
        return self.requested(n) if self.acts_before_llm else n

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """Return how many of an image's `n` tokens each of `depth` decoder layers sees, as far as the settings say.

        The receipt says what happened. By default `requested`, from the first of `layers` on.
        """
        k = self.requested(n)
        first = min((resolve_layer(layer, depth) for layer in self.layers), default=0)
        return [n] * first + [n if k is None else k] * (depth - first)

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress the images of one forward. Override to batch across images; by default they go one by one."""
        return [self.compress(image) for image in images]

    def ask(self, images: list[ImageTokens]) -> object:
        """Return what `compress_images` returns, each image at its own budget if `keep` says so; for the engine."""
        if not isinstance(keep := getattr(self, "keep", None), dict):
            return self.compress_images(images)
        groups: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            n = len(image.features)
            budget = adapted(resolve_keep(keep["auto"], n), n, image.effective_rank, keep["average"])
            groups.setdefault(budget, []).append(i)
        results: dict[int, Compressed] = {}
        for budget, members in groups.items():
            own = copy(self)  # with all that `setup` found
            own.keep = budget  # type: ignore[attr-defined]
            answer = own.compress_images([images[i] for i in members])
            if not isinstance(answer, list | tuple) or len(answer) != len(members):
                return answer  # the engine says what is wrong with it
            results |= zip(members, answer, strict=True)
        return [results[i] for i in range(len(images))]

    def compress(self, image: ImageTokens) -> Compressed:
        """Return the k <= n tokens that an image sends to the language model."""
        raise NotImplementedError(f"{type(self).__name__} does not compress before the language model")

    def retain(self, tokens: LayerInput) -> Tensor | Retained:
        """Return (B, S) bool, True at the tokens that stay from `tokens.layer` on, or `Retained` with new states.

        Text always stays.
        """
        raise NotImplementedError(f"{type(self).__name__} sets `layers` but does not override `retain`")

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return how many visual tokens `retain` keeps of `tokens`, from settings and numbers of tokens.

        The engine then need not wait for the device to count them. None: it counts.

        Returns:
            For each row, the counts of its images, or their sum alone, if they share a budget.
        """
        return None

    def soft_retain(self, tokens: LayerInput) -> Tensor | None:
        """Return how strongly each token may be attended to from `tokens.layer` on: (B, S) in [0, 1]; None: `retain`.

        For methods in training: nothing is dropped, gradients pass, and the weights of successive layers multiply. A
        weight of zero is what `retain` would drop. Text always counts in full.
        """
        return None


@dataclass
class Selector(Compressor):
    """Base of the methods that keep some of an image's own tokens before the language model. Override `compress`.

    A method that batches over images overrides `select_images` in place of `compress_images`.

    keep      : visual tokens to keep per image, a count or a share
    positions : rotary positions: "original", or "renumbered", which closes the gaps. "auto" is "original", unless the
                order of a release moves tokens away from their places
    rectify   : select half of the budget; the other half are means, at the lower medians of their places. Of the
                patches that are not selected, as many are anchors as there are means, and each patch joins the anchor
                of largest cosine. A mean counts in attention for all its patches: the logarithm of their number is
                added to its logits ("Improving Visual Token Reduction via Rectifying Distortions", arXiv 2606.01711;
                at 64 tokens of LLaVA-1.5 the paper gains 2 to 4 points on four selectors). Needs positions="original",
                and eager or sdpa attention. The paper's second term, by the distance of query and key, is left out:
                the release adds it to the prefill alone, so that decoding differs from recomputing
    """

    keep: Keep
    positions: str = field(default="auto", kw_only=True)
    rectify: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        settle_positions(self)
        if self.rectify and self.positions != "original":
            raise ValueError(
                "rectify=True puts merged tokens at the places of what they stand for; use positions='original' with it"
            )

    def budget(self, image: ImageTokens) -> int:
        """Return how many tokens of an image to keep."""
        return resolve_keep(self.keep, len(image.features))

    def at_budget(self, k: int) -> Self:
        """Return the same method, set up as it is, that selects k tokens of every image and merges none."""
        other = copy(self)
        other.keep, other.rectify = k, False
        return other

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Select tokens of the images of one forward; by default they go one by one to `compress`."""
        return [self.compress(image) for image in images]

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Select tokens; with `rectify` half of the budget, and merge the others."""
        if not self.rectify:
            return self.select_images(images)
        counts = [self.budget(image) for image in images]
        halves = [k if k == len(x.features) else max(1, k // 2) for k, x in zip(counts, images, strict=True)]
        found: dict[int, Compressed] = {}
        for half in set(halves):
            own = [i for i, k in enumerate(halves) if k == half]
            found |= zip(own, self.at_budget(half).select_images([images[i] for i in own]), strict=True)
        return [_rectified(image, found[i], k) for i, (image, k) in enumerate(zip(images, counts, strict=True))]


def _rectified(image: ImageTokens, chosen: Compressed, k: int) -> Compressed:
    """Fill the budget k of an image with means of what was not chosen; with newlines once all patches take part."""
    x, index, n = image.features, chosen.index, len(image.features)
    if chosen.features is not None or index is None:
        raise ValueError("rectify=True merges what was not selected, and this method makes tokens itself")
    if len(index) >= k:
        return chosen
    free = torch.ones(n, dtype=torch.bool, device=x.device).index_fill(0, index, False)
    patch = image.grid[:, 0] >= 0
    slots = patch.nonzero()[:, 0]
    kept = (~free & patch)[slots].nonzero()[:, 0]
    made = min(k - len(index), len(slots) - len(kept))
    others = index[~patch[index]]
    spare = (free & ~patch).nonzero()[: k - len(index) - made, 0]
    features, place, size, joined = merge_rest(x[slots], kept, len(kept) + made)
    slot, order = torch.cat([slots[place], others, spare]).sort()
    size = torch.cat([size, torch.ones_like(others), torch.ones_like(spare)])[order]
    sent = torch.cat([features.to(x), x[others], x[spare]])[order]

    def into() -> Tensor:
        where = torch.full((n,), -1, device=x.device)
        where[torch.cat([others, spare])] = torch.arange(len(features), k, device=x.device)
        where[slots] = joined
        return torch.where(where < 0, -1, order.argsort()[where.clamp(min=0)])

    return Compressed(sent, slot, into, size)


@dataclass
class ScoreAndKeep(Selector):
    """Base of the methods that score the tokens of an image and keep the best before the language model.

        @dataclass
        class Norm(ScoreAndKeep):
            def score(self, image):
                return image.features.norm(dim=-1)

    Newline tokens of anyres images and videos are scored like any other token. Options are those of `Selector`.
    """

    keep: Keep = 0.25

    def score(self, image: ImageTokens) -> Tensor:
        """Return one number for each token of an image, (n,). Higher is better."""
        raise NotImplementedError(f"{type(self).__name__} does not override `score`")

    def compress(self, image: ImageTokens) -> Compressed:
        """Keep the tokens of highest score, the lower index first on ties, in reading order."""
        n, score = len(image.features), self.score(image)
        if not isinstance(score, Tensor) or score.shape != (n,):
            got = f"a Tensor {tuple(score.shape)}" if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"{type(self).__name__}.score returned {got}: return a tensor of shape ({n},), a number for each token"
            )
        image.score = score
        order = score.argsort(descending=True, stable=True)
        return image.pick(order[: self.budget(image)].sort().values)
