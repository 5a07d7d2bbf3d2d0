"""A method's view of one image, `ImageTokens`, and its answer before the language model, `Compressed`."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmslim.ops.attention import tower_qk
from vlmslim.ops.effective_rank import effective_rank
from vlmslim.ops.noise import digest, uniform


@dataclass
class Compressed:
    """The k tokens that one image sends to the language model, in the order in which the language model reads them.

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
    made_of  : for methods whose tokens share patches, instead of `into`: a function that returns (k, n), how much of
               each of the image's n tokens is in each of the k, 0 where nothing of it is. Pictures call it
    """

    features: Tensor | None
    index: Tensor | None = None
    into: Callable[[], Tensor] | None = None
    size: Tensor | None = None
    made_of: Callable[[], Tensor] | None = None

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
    encoded  : what the method's own `encode` made of the picture; None if the model encoded it
    projector       : the model's projector, found when it is used, because adapters replace it
    make_grid       : computes `grid` when a method asks for it
    make_views      : computes `views`, where `pixels` are no pictures
    recorded_layers : layer of the vision tower -> the module and its input (c, p', v), of a method's `tower_layers`
    recorded_heads  : layer of the vision tower -> its queries and keys (c, heads, p, v / heads), as it made them
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
    encoded: Compressed | None = None
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
            encoded=None,
            make_grid=make_grid,
            recorded_layers=layers,
            recorded_heads={i: (heads(i, 0), heads(i, 1)) for i in views[0].recorded_heads},
        )

    @cached_property
    def effective_rank(self) -> float:
        """The complexity of the image: the effective rank of its features, the mean over its crops or frames.

        Newlines do not count.
        """
        crop = self.grid[:, 0]
        ranks = [effective_rank(self.features[crop == i][None]) for i in crop[crop >= 0].unique()]
        return float(sum(ranks) / len(ranks))

    def uniform(self, seed: int, count: int) -> Tensor:
        """Draw random numbers in [0, 1), (count,) fp64, that depend on pixels and seed alone."""
        return uniform(digest(self.pixels), seed, count).to(self.features.device)

    def qk(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return queries and keys of a vision-tower layer, unscaled, CLS included: (c, heads, p', v / heads) each.

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

    def pick_all(self) -> Compressed:
        """Keep all of the image's own tokens."""
        return self.pick(torch.arange(len(self.features), device=self.features.device))
