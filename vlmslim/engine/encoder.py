"""The vision side: what a method is shown of each image, recorded while the model encodes it."""

import inspect
import math
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlmslim.compressor import ImageTokens
from vlmslim.engine.families import encoder_layers, with_newlines

_ATTRIBUTE = "vlmslim_images"


class RecordingEncoder:
    """Stands in for `get_image_features` or `get_video_features` on one model instance.

    The model's own output comes back with the `ImageTokens` of each image on it: `generate` may encode the images
    long before it calls `forward`, so the record has to travel with the features.

    Args:
        core: the model without its head.
        kind: "image" or "video".
        tower_layers: the layers of the vision tower whose inputs are recorded.
        on_encoded: called with the kind and the output after each encoding.
    """

    def __init__(
        self,
        core: nn.Module,
        kind: str,
        tower_layers: tuple[int, ...],
        on_encoded: Callable[[str, ModelOutput], None],
    ):
        self.core, self.kind, self.tower_layers, self.on_encoded = core, kind, tower_layers, on_encoded
        self.name = f"get_{kind}_features"
        self.encode = getattr(core, self.name)
        self.__signature__ = inspect.signature(self.encode)  # generate() picks its arguments by name
        self.latest: weakref.ref | None = None
        self.grids: dict[tuple, Tensor] = {}  # see `_grid`

    def attach(self) -> None:
        """Shadow the method on the instance."""
        setattr(self.core, self.name, self)

    def detach(self) -> None:
        """Uncover the class's own method."""
        vars(self.core).pop(self.name, None)

    def __call__(self, *args, **kwargs):
        """Encode as the model does, and record."""
        seen = _Seen()
        with ExitStack() as hooks:
            # Hooks live only while the images are encoded: a method may call the projector itself.
            enter = hooks.enter_context
            enter(self.core.vision_tower.register_forward_pre_hook(seen.pixels, with_kwargs=True))
            enter(self.core.multi_modal_projector.register_forward_pre_hook(seen.tower, with_kwargs=True))
            for i in self.tower_layers:
                layer = encoder_layers(self.core)[i]
                enter(layer.register_forward_pre_hook(partial(seen.tap, i), with_kwargs=True))
            if self.kind == "image" and hasattr(self.core, "pack_image_features"):
                pack = self.core.pack_image_features
                self.core.pack_image_features = partial(seen.pack, pack)
                hooks.callback(vars(self.core).pop, "pack_image_features")
            out = self.encode(*args, **kwargs)
        if not isinstance(out, tuple):  # a caller of return_dict=False wants the bare features
            setattr(out, _ATTRIBUTE, self._video(out, seen) if self.kind == "video" else self._images(out, seen))
            self.latest = weakref.ref(out)
            self.on_encoded(self.kind, out)
        return out

    def recognise(self, output) -> None:
        """Give a copy of the latest output its records back: accelerate rebuilds what it moves between devices."""
        latest = self.latest() if self.latest is not None else None
        if is_recorded(output) or latest is None:
            return
        ours, theirs = latest.pooler_output, output.pooler_output
        if [x.shape for x in ours] == [x.shape for x in theirs] and torch.equal(ours[0], theirs[0].to(ours[0])):
            setattr(output, _ATTRIBUTE, recorded(latest))

    def _images(self, out, seen: "_Seen") -> list[ImageTokens]:
        side = self.core.config.vision_config.image_size // self.core.config.vision_config.patch_size
        count = len(out.pooler_output)
        crops = seen.crops or [1] * count
        tiles = [(0, 0)] * count
        if seen.crops:
            from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

            pinpoints, pixels = self.core.config.image_grid_pinpoints, self.core.config.vision_config.image_size
            tiles = [
                tuple(get_anyres_image_grid_shape(size, pinpoints, pixels)) if c > 1 else (0, 0)
                for size, c in zip(seen.sizes, crops, strict=True)
            ]
        pixels, tower = seen.pixel_values.split(crops), seen.tower_features.split(crops)
        taps = {i: (layer, x.split(crops)) for i, (layer, x) in seen.taps.items()}
        return [
            ImageTokens(
                features=features,
                tower=tower[n],
                pixels=pixels[n],
                tiles=tiles[n],
                size=seen.sizes[n] if tiles[n][1] else (0, 0),
                layout=partial(self._grid, seen, n, tiles[n][1], side, tower[n].shape[1]),
                taps={i: (layer, x[n]) for i, (layer, x) in taps.items()},
            )
            for n, features in enumerate(out.pooler_output)
        ]

    def _grid(self, seen: "_Seen", n: int, wide: int, side: int, patches: int) -> Tensor:
        """`ImageTokens.grid` of image `n`, found once for images of one size: it takes longer than to choose by it."""
        if not seen.crops:
            return torch.from_numpy(_crop_grid(side, patches)).clone()
        key = seen.sizes[n], seen.crops[n], wide, side, patches, seen.packing
        if key not in self.grids:
            if len(self.grids) == 256:
                self.grids.clear()
            self.grids[key] = _image_grid(partial(seen.repack, n), seen.crops[n], wide, side, patches)
        return self.grids[key].clone()

    def _video(self, out, seen: "_Seen") -> list[ImageTokens]:
        count = len(out.pooler_output)
        frames = len(seen.pixel_values) // count
        pixels, tower = seen.pixel_values.split(frames), seen.tower_features.split(frames)
        taps = {i: (layer, x.split(frames)) for i, (layer, x) in seen.taps.items()}
        whole = with_newlines(self.core, out.pooler_output, frames)
        return [
            ImageTokens(
                features=features,
                tower=tower[n],
                pixels=pixels[n],
                video=True,
                layout=partial(_video_grid, frames, len(features)),
                taps={i: (layer, x[n]) for i, (layer, x) in taps.items()},
            )
            for n, features in enumerate(whole)
        ]


def is_recorded(output) -> bool:
    """Whether an encoder output carries the records of its images."""
    return hasattr(output, _ATTRIBUTE)


def recorded(output) -> list[ImageTokens]:
    """The records that travel on an encoder output.

    Raises:
        ValueError: the output was not encoded by this patched model.
    """
    if not is_recorded(output):
        raise ValueError(
            "these image features were encoded before the patch, or cut up by chunked prefill; let the patched model "
            "encode the images, and call generate() with prefill_chunk_size=None"
        )
    return getattr(output, _ATTRIBUTE)


class _Seen:
    """What passed by while images were encoded."""

    def __init__(self):
        self.taps: dict[int, tuple[nn.Module, Tensor]] = {}
        self.crops: list[int] | None = None

    def pixels(self, tower, args, kwargs):
        self.pixel_values = args[0] if args else kwargs["pixel_values"]

    def tower(self, projector, args, kwargs):
        self.tower_features = args[0] if args else kwargs["image_features"]

    def tap(self, i, layer, args, kwargs):
        self.taps[i] = layer, args[0] if args else kwargs["hidden_states"]

    def pack(self, pack, image_features, image_sizes, **kwargs):
        self.crops = [len(f) for f in image_features]
        self.sizes = [tuple(map(int, size)) for size in image_sizes]  # once: each number waits for the device
        self.repack = partial(_repack, pack, image_sizes, kwargs)
        self.packing = tuple((name, value) for name, value in kwargs.items() if isinstance(value, str | int | float))
        return pack(image_features, image_sizes, **kwargs)


def _repack(pack, image_sizes, kwargs, n: int, grid: Tensor) -> Tensor:
    """Send something else, (c, p, 3), through the packing of image `n`, with -1 for the newline."""
    packed, _ = pack([grid], image_sizes[n : n + 1], **kwargs | {"image_newline": grid.new_full((3,), -1.0)})
    return packed[0]


def _image_grid(repack: Callable, crops: int, wide: int, side: int, patches: int) -> Tensor:
    """`ImageTokens.grid` of an image that the model packs.

    Tiles get unpadded, resized and joined by newlines. To learn where each token ends up, the coordinates themselves
    travel through the model's own packing and are read off its result; a flat patch index would not survive the
    bilinear resizing of OneVision.
    """
    crop = torch.from_numpy(_crop_grid(side, patches))
    tiles = [crop + torch.tensor([1.0, i // wide * side, i % wide * side]) for i in range(crops - 1)]
    at = repack(torch.stack([crop.float(), *tiles])).round().long()
    kind, row, column = at.unbind(1)
    number = torch.where(kind == 1, 1 + row // side * max(wide, 1) + column // side, kind)
    return torch.stack([number, *(torch.where(kind == 1, x % side, x) for x in (row, column))], dim=1)


@cache
def _crop_grid(side: int, patches: int) -> np.ndarray:
    """(p, 3): zero, row and column of each token of one crop; -1 twice at CLS."""
    grid = np.zeros((patches, 3), dtype=np.int64)
    grid[-(side**2) :, 1:] = np.indices((side, side)).reshape(2, -1).T
    grid[: patches - side**2, 1:] = -1  # vision_feature_select_strategy="full" leaves CLS in front
    return grid


def _video_grid(frames: int, n: int) -> Tensor:
    """`ImageTokens.grid` of a video: pooled frames one after the other, and one newline at the end."""
    side = math.isqrt(n // frames)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(side), torch.arange(side))
    return torch.cat([grid, grid.new_full((n - len(grid), 3), -1)])
