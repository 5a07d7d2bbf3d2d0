"""The one abstraction, a `Compressor`, and the records it is handed: `ImageTokens` and `LayerInput`."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmslim.attention import decoder_attention, tower_qk
from vlmslim.selection import rank_within_groups

Keep = int | float


def check_keep(keep: Keep, name: str = "keep") -> None:
    """Refuse a budget that means nothing.

    Raises:
        ValueError: `keep` is neither a count (int >= 1) nor a share (float in (0, 1]).
    """
    if isinstance(keep, bool) or not isinstance(keep, int | float):
        raise ValueError(f"{name}={keep!r}: give a count (64) or a share (0.11) of the visual tokens to keep")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"{name}={keep}: at least one visual token per image must be kept")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"{name}={keep}: a share lies in (0, 1]; for a count of tokens write an integer")


def resolve_keep(keep: Keep, n: int) -> int:
    """Turn a budget into a number of tokens of an image that has `n`.

    A share is rounded half to even on the double product, as Python's `round` does, and never below one.

    Raises:
        ValueError: the budget is malformed, or larger than the image.
    """
    check_keep(keep)
    if isinstance(keep, float):
        return max(1, round(keep * n))
    if keep > n:
        raise ValueError(
            f"keep={keep} is larger than the image, which has {n} visual tokens; use at most {n} or a share"
        )
    return keep


@dataclass
class Compressed:
    """What one image sends to the language model.

    features : (k, d)          tokens, in the order the language model reads them
    index    : (k,) or None    the slot each token takes among the image's n, ascending; None means the first k.
                               Slots decide which rotary position a token keeps under `positions="original"`.
    """

    features: Tensor
    index: Tensor | None = None


@dataclass
class ImageTokens:
    """The visual tokens of one image or one video, between the projector and the language model.

    features : (n, d)       projected tokens, in the order the language model would read them
    tower    : (c, p, v)    vision-tower features of each crop (or frame), as they enter the projector
    pixels   : (c, 3, h, w) the crops themselves
    tiles    : (rows, columns) of the anyres mosaic; (0, 0) without one
    video    : whether the crops are the frames of a video
    prompt   : (t,)         ids of the text tokens of the same prompt; None when the caller gave embeddings
    """

    features: Tensor
    tower: Tensor
    pixels: Tensor
    tiles: tuple[int, int] = (0, 0)
    video: bool = False
    prompt: Tensor | None = None
    layout: Callable[[], Tensor] | None = None  # computes `grid`
    taps: dict[int, tuple[nn.Module, Tensor]] = field(default_factory=dict)  # tower layer -> module, its input

    @cached_property
    def grid(self) -> Tensor:
        """(n, 3): crop, row and column of every token; -1 three times at a newline token.

        Crop 0 is the whole image (the thumbnail under anyres), 1.. are the tiles in reading order; for a video the
        crop is the frame. Rows and columns count within the crop.
        """
        return self.layout().to(self.features.device)

    @cached_property
    def mosaic(self) -> Tensor:
        """(n, 3): component (0 whole image, 1 mosaic of tiles, frame number for a video; -1 newline), row, column.

        Unlike `grid`, the tiles of an image share one coordinate system here.
        """
        if self.video or not self.tiles[1]:
            return self.grid
        crop, row, column = self.grid.unbind(1)
        side = self.side
        tile = crop - 1
        inside = crop > 0
        row = torch.where(inside, row + tile // self.tiles[1] * side, row)
        column = torch.where(inside, column + tile % self.tiles[1] * side, column)
        return torch.stack([crop.clamp(max=1), row, column], dim=1)

    @property
    def side(self) -> int:
        """Patches along one side of a (square) crop."""
        return int(self.tower.shape[1] ** 0.5)

    @property
    def fingerprint(self) -> int:
        """A number that depends on the pixels alone: the same image gets the same one in any batch."""
        return zlib.crc32(self.pixels.detach().float().cpu().numpy().tobytes())

    def qk(self, layer: int) -> tuple[Tensor, Tensor]:
        """Queries and keys of tower layer `layer`, unscaled, heads apart, CLS included: (c, heads, p', v / heads) each.

        Raises:
            RuntimeError: the method did not list `layer` in `tower_layers`.
        """
        if layer not in self.taps:
            raise RuntimeError(f"tower layer {layer} was not recorded: list it in `tower_layers`")
        return tower_qk(*self.taps[layer])

    def pick(self, index: Tensor) -> Compressed:
        """Keep the tokens `index` (k,), in that order."""
        return Compressed(self.features[index], index.sort().values)


@dataclass
class LayerInput:
    """The tokens about to enter decoder layer `layer`, in a prefill that brought images.

    hidden  : (B, S, d)    hidden states
    mask    : (B, S)       False at padding
    image   : (B, S)       0 at text and padding; i at the visual tokens of the row's i-th image
    origin  : (B, S)       index of each token in the caller's sequence
    last    : (B,)         index of the last real token of each row
    entered : B lists      how many visual tokens of each image of the row entered the language model
    """

    layer: int
    hidden: Tensor
    mask: Tensor
    image: Tensor
    origin: Tensor
    last: Tensor
    entered: list[list[int]]
    previous: tuple[nn.Module, Tensor, tuple[Tensor, Tensor]] | None = None

    def attention(self, rows: Tensor, temperature: float = 1.0) -> Tensor:
        """Attention that layer `layer - 1` paid from the query tokens `rows` (B, q): (B, heads, q, S), fp32.

        Recomputed for these rows alone, so that any attention back end serves and no full map exists.

        Raises:
            RuntimeError: asked before layer 0, where nothing has attended yet.
        """
        if self.previous is None:
            raise RuntimeError("there is no attention before decoder layer 0; use layer >= 1")
        layer, hidden, rope = self.previous
        logits = decoder_attention(layer, hidden, rope, self.mask, rows.to(hidden.device))
        return (logits / temperature).softmax(-1).to(self.hidden.device)

    def top(self, score: Tensor, keep: Keep) -> Tensor:
        """(B, S) bool: for every image the `keep` tokens of highest `score` (B, S), lower index first on ties.

        A share counts from what entered the language model.

        Raises:
            ValueError: `keep` is a count larger than an image.
        """
        budget = [[0] + [resolve_keep(keep, n) for n in row] for row in self.entered]
        width = max(map(len, budget))
        budget = torch.tensor([row + [0] * (width - len(row)) for row in budget], device=score.device)
        return (rank_within_groups(score, self.image) < budget.gather(1, self.image)) & (self.image > 0)


@dataclass
class Compressor:
    """A visual-token compression method: settings and weights, never anything about the current image.

    Override `compress` to choose, merge or re-project the tokens of an image before the language model, `retain` to
    drop tokens between decoder layers, or both. Shared attributes:

    layers       : decoder layers before which `retain` is asked: a number, or a float share of the depth
    tower_layers : vision-tower layers whose queries and keys `ImageTokens.qk` can compute; negative from the end
    needs_cls    : the method reads the tower's CLS token
    positions    : "renumbered" closes the gaps in the rotary positions, "original" leaves them
    """

    layers: ClassVar[tuple[int | float, ...]] = ()
    tower_layers: ClassVar[tuple[int, ...]] = ()
    needs_cls: ClassVar[bool] = False
    positions = "renumbered"

    def setup(self, model: nn.Module) -> None:
        """Look at the model once, when it is patched: check it, load trained weights."""

    def trained(self) -> nn.Module | None:
        """The trained part, once `setup` has run: what training optimises and saving writes. None without one."""
        return None

    def stages(self) -> list["Compressor"]:
        """The stages this method is made of, in order; by default itself."""
        return [self]

    def requested(self, n: int) -> int | None:
        """How many of an image's `n` tokens this method was asked to keep; None if it decides itself."""
        keep = getattr(self, "keep", None)
        return resolve_keep(keep, n) if isinstance(keep, int | float) else None

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress the images of one forward. Override to batch across images; the default goes one by one."""
        return [self.compress(image) for image in images]

    def compress(self, image: ImageTokens) -> Compressed:
        """The k <= n tokens that this image sends to the language model."""
        raise NotImplementedError(f"{type(self).__name__} does not compress before the language model")

    def retain(self, tokens: LayerInput) -> Tensor:
        """(B, S) bool, True at the tokens that stay from `tokens.layer` on. Text always stays."""
        raise NotImplementedError(f"{type(self).__name__} sets `layers` but does not override `retain`")
