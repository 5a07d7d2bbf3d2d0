"""The vision side: what a method is shown of each image, recorded while the model encodes it."""

import copy
import inspect
import math
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from vlmslim.compressor import ImageTokens
from vlmslim.engine.attention import attention_of, tower_heads
from vlmslim.engine.families import (
    FAMILIES,
    anyres_tiles,
    attending_layer,
    encoder_layers,
    has_plain_heads,
    merge,
    projector,
    tower,
    window_order,
    with_newlines,
)
from vlmslim.engine.grids import cell_grid, crop_grid, in_order, packed_grid, token_order, video_grid
from vlmslim.engine.shadow import Shadow
from vlmslim.engine.sharding import is_sharded
from vlmslim.ops.attention import tower_qk

_ATTRIBUTE = "vlmslim_images"

#: What has passed while images are encoded in this thread or task. Another thread's hooks see it and look away.
_ENCODING: ContextVar["_Seen | None"] = ContextVar("vlmslim_encoding", default=None)


@dataclass
class Encoded:
    """The images of an encoder output, without the tower's hidden states, which need not outlive the encoder.

    images : in the order of the prompts, or their views where the prompt tells which views make a picture
    copies : how many rows in succession share them, because `generate` repeats entries for beams
    """

    images: list[ImageTokens]
    copies: int

    @classmethod
    def of(cls, output: Any) -> "Encoded":
        """Read the images off an encoder output.

        Raises:
            ValueError: the output was not encoded by this patched model.
        """
        if not is_recorded(output):
            raise ValueError(
                "these image features were encoded before the patch or by a function that was set after it, or cut up "
                "by chunked prefill; let the patched model encode the images, and call generate() with "
                "prefill_chunk_size=None"
            )
        record: _Record = getattr(output, _ATTRIBUTE)
        images = [copy.copy(image) for image in record.images]  # several forwards may share an output
        return cls(images, len(output.pooler_output) // max(record.entries, 1))


@dataclass
class _Record:
    """What travels with an encoder output.

    images  : `Encoded.images`
    entries : of the output when it was encoded
    encoder : that recorded them
    """

    images: list[ImageTokens]
    entries: int
    encoder: "RecordingEncoder"


def is_recorded(output: object) -> bool:
    """Tell whether an encoder output carries the records of its images."""
    return hasattr(output, _ATTRIBUTE)


class SharedEncoding:
    """What the model made of its latest pictures, for patches that take turns on the same inputs.

    It holds one output for images and one for videos, so its memory is that of one batch. Inputs are the same if they
    are the same tensors; whoever writes into a tensor must not share it.

    Args:
        tower_layers: that any of the patches reads.
        counts_only: whether none of the patches looks at pictures.
    """

    def __init__(self, tower_layers: Iterable[int], counts_only: bool):
        self.tower_layers, self.counts_only = tuple(sorted(set(tower_layers))), counts_only
        self._held: dict[str, tuple[dict[str, Any], Any]] = {}

    def find(self, kind: str, given: dict[str, Any]) -> Any:
        """Return the output for the arguments `given` of an encoding, or None."""
        before, output = self._held.get(kind, ({}, None))
        same = before.keys() == given.keys() and all(_same(before[name], value) for name, value in given.items())
        return _copied(output) if same and output is not None else None

    def hold(self, kind: str, given: dict[str, Any], output: Any) -> None:
        """Keep an output in place of the one before."""
        self._held[kind] = given, _copied(output)

    def forget(self) -> None:
        """Free the memory."""
        self._held.clear()


def _same(a: Any, b: Any) -> bool:
    """Tell whether two arguments of an encoding are one tensor, or equal settings."""
    return a is b or not isinstance(a, Tensor) and repr(a) == repr(b)


def _copied(output: Any) -> Any:
    """Copy an output but not its tensors, because `generate` replaces them in it when it expands beams.

    The hidden states of all layers of the tower stay out of the copy, because they are the most of its memory and the
    model reads them no more.
    """
    copied = type(output)(**{k: v for k, v in output.items() if k not in ("hidden_states", "attentions")})
    setattr(copied, _ATTRIBUTE, getattr(output, _ATTRIBUTE))
    return copied


class RecordingEncoder:
    """Stands in for `get_image_features` or `get_video_features` on one model instance.

    The model's own output comes back with the `ImageTokens` of each image on it. `generate` may encode the images long
    before it calls `forward`, so the record has to travel with the features.

    Args:
        core: the model without its head.
        kind: "image" or "video".
        tower_layers: the layers of the vision tower whose inputs are recorded.
        counts_only: whether the images are counted and no method sees them, so that any tower will do.
        on_encoded: called with the kind and the output after each encoding.
        shared: with the patches that take turns; `tower_layers` and `counts_only` are then those of all of them.
    """

    def __init__(
        self,
        core: Any,
        kind: str,
        tower_layers: tuple[int, ...],
        counts_only: bool,
        on_encoded: Callable[[str, ModelOutput], None],
        shared: SharedEncoding | None = None,
    ):
        if shared is not None:
            tower_layers, counts_only = shared.tower_layers, shared.counts_only
        self.shared = shared
        self.core, self.kind, self.tower_layers, self.on_encoded = core, kind, tower_layers, on_encoded
        self.family, self.counts_only = FAMILIES[core.config.model_type], counts_only
        self.name = f"get_{kind}_features"
        self.shadows = [Shadow(core, self.name, self._encode)]
        if kind == "image" and hasattr(core, "pack_image_features"):
            self.shadows.append(Shadow(core, "pack_image_features", _pack))
        self.latest = _Latest()

    def attach(self) -> None:
        """Stand in for the functions that the instance has now."""
        for shadow in self.shadows:
            shadow.stay_on_top()

    def detach(self) -> None:
        """Put back what was there before."""
        for shadow in self.shadows:
            shadow.lift()

    def _encode(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Encode as the model does, or as a function of the user's does, and record."""
        before = _ENCODING.get()
        if before is not None and before.core is self.core:  # Qwen3-VL encodes videos through its image encoder
            return encode(*args, **kwargs)
        given = self._given(args, kwargs)
        output = None if self.shared is None else self.shared.find(self.kind, given)
        if output is None:
            output, seen = self._watch(encode, args, kwargs)
            if isinstance(output, tuple):  # a caller of return_dict=False wants the bare features
                return output
            record = _Record(self._recorded(output, seen, args, kwargs), len(output.pooler_output), self)
            setattr(output, _ATTRIBUTE, record)
            if self.shared is not None:
                self.shared.hold(self.kind, given, output)
        self.latest.output = weakref.ref(output)
        self.on_encoded(self.kind, output)
        return output

    def _given(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Return the arguments of an encoding by name."""
        given = inspect.signature(self._own).bind(*args, **kwargs).arguments
        return given | given.pop("kwargs", {})

    @property
    def _own(self) -> Callable[..., Any]:
        """The model's own function."""
        return partial(getattr(type(self.core), self.name), self.core)

    def _watch(self, encode: Callable[..., Any], args: tuple, kwargs: dict) -> "tuple[Any, _Seen]":
        """Encode, and note what passes."""
        seen, before = _Seen(self.core), _ENCODING.get()
        with ExitStack() as hooks:
            _ENCODING.set(seen)
            hooks.callback(_ENCODING.set, before)
            # The hooks live only while the images are encoded, because a method may call the projector itself. The
            # modules are looked up here, because adapters may replace them while the patch is on.
            noted: list[tuple[nn.Module, Callable]] = [
                (tower(self.core), seen.pixels),
                (projector(self.core), seen.tower),
            ]
            for i in self.tower_layers:
                layer = encoder_layers(self.core)[i]
                if has_plain_heads(layer):
                    noted.append((layer, partial(seen.layer, i)))
                elif (attention := attention_of(encoder_layers(self.core)[attending_layer(self.core, i)])) is not None:
                    noted.append((attention, partial(seen.heads, i)))
            for module, note in noted:
                hooks.enter_context(module.register_forward_pre_hook(seen.unless_elsewhere(note), with_kwargs=True))
            return encode(*args, **kwargs), seen

    def _recorded(self, output: Any, seen: "_Seen", args: tuple, kwargs: dict) -> list[ImageTokens]:
        """Return the images of an output.

        A function of the user's may return features that it kept. What was recorded of them belongs to the output; if
        nothing was, the model encodes the pixels once more.

        Raises:
            ValueError: the features are not those of the pixels.
        """
        if not self._all_passed(output, seen):
            if self.counts_only:
                return [ImageTokens(x, tower=x[:0], pixels=x[:0]) for x in output.pooler_output]
            record = getattr(output, _ATTRIBUTE, None)
            if record is not None and record.encoder is self:
                return record.images
            with torch.no_grad():
                ours, seen = self._watch(self._own, args, kwargs)
            if not self._all_passed(output, seen) or not _alike(output.pooler_output, ours.pooler_output):
                raise ValueError(
                    f"{self.name} was replaced on this model by a function that returns other features than the model "
                    "makes of the same pixels, so no method can tell which patches they belong to; let the function "
                    "call the one that it replaces, or patch with 'none'"
                )
        return self._records(output, seen, self._given(args, kwargs))

    def _all_passed(self, output: Any, seen: "_Seen") -> bool:
        """Tell whether all images of an output passed while they were encoded, and no others."""
        count, units = len(output.pooler_output), self.family.units
        if not seen.all_pixels or len(seen.all_pixels) != len(seen.all_features):
            return False
        if units in ("packed", "samples"):
            return True
        if self.kind == "video":
            return len(seen.pixel_values) % count == 0
        return count == (len(seen.crops) if units == "anyres" else len(seen.tower_features))

    def recognise(self, output: Any) -> None:
        """Give a copy of the latest output its records back, because accelerate rebuilds outputs that it moves."""
        latest = self.latest.output()
        if is_recorded(output) or latest is None:
            return
        ours, theirs = latest.pooler_output, output.pooler_output
        if [x.shape for x in ours] == [x.shape for x in theirs] and torch.equal(ours[0], theirs[0].to(ours[0])):
            setattr(output, _ATTRIBUTE, getattr(latest, _ATTRIBUTE))

    def _project(self, tower: Tensor) -> Tensor:
        """Apply the model's projector, whichever it has now."""
        return projector(self.core)(tower)

    def _records(self, output: Any, seen: "_Seen", given: dict[str, Any]) -> list[ImageTokens]:
        """Make a record of each image from what passed, given the arguments of the encoding by name."""
        family = self.family
        if self.counts_only and family.units in ("crops", "anyres") and self.kind == "image":
            return [ImageTokens(features, tower=features[:0], pixels=features[:0]) for features in output.pooler_output]
        if family.units == "packed":
            return self._packed(output, seen, next(x for name, x in given.items() if name.endswith(family.grid)))
        if family.units == "samples":
            return self._views(torch.cat(list(output.pooler_output)).unflatten(0, (len(seen.tower_features), -1)), seen)
        if self.kind == "video":
            return self._videos(output, seen)
        return self._anyres(output, seen) if family.units == "anyres" else self._views(output.pooler_output, seen)

    def _views(self, features: Any, seen: "_Seen") -> list[ImageTokens]:
        """Record square views, each with `features` (n, d) of its own."""
        images = []
        for view, part in zip(features, seen.parts([1] * len(features)), strict=True):
            per = self._merge(len(view), part["tower"].shape[1])
            side = math.isqrt(part["tower"].shape[1])
            if per > 1:
                order = token_order((side, side), per).to(part["tower"].device)
                part["tower"] = part["tower"][:, order]
                layers, heads = part["recorded_layers"], part["recorded_heads"]
                part["recorded_layers"] = {i: (layer, in_order(x, order)) for i, (layer, x) in layers.items()}
                part["recorded_heads"] = {i: (in_order(q, order), in_order(k, order)) for i, (q, k) in heads.items()}
            cells = math.isqrt(len(view))
            grid = partial(crop_grid, cells, len(view))
            projector = self._project if per == 1 else None  # it takes all patches of a token together
            images.append(
                ImageTokens(view, patches=(side, side), merge=per, projector=projector, make_grid=grid, **part)
            )
        return images

    def _merge(self, tokens: int, patches: int) -> int:
        """Return how many patches along each side make one of the `tokens` of a view."""
        return math.isqrt(patches // tokens) if patches >= tokens else 1

    def _packed(self, output: Any, seen: "_Seen", grids: Tensor) -> list[ImageTokens]:
        """Record images of any size that follow each other; `grids` has (frames,) rows and columns of patches."""
        per, sizes = merge(self.core), torch.as_tensor(grids).tolist()
        if len(sizes[0]) == 2:  # of pixels
            patch = self.core.config.vision_config.patch_size
            sizes = [(1, height // patch, width // patch) for height, width in sizes]
        counts = [math.prod(size) for size in sizes]
        pixels = _packed_pixels(self.core, seen.pixel_values, sizes)
        patches = seen.tower_features.flatten(0, -2)
        if len(patches) < sum(counts):  # merged before the projector (GLM)
            counts, per = [count // per**2 for count in counts], 1
            sizes = [(t, h // merge(self.core), w // merge(self.core)) for t, h, w in sizes]
        order = window_order(self.core, grids)
        if order is not None:
            order = (order[:, None] * per**2 + torch.arange(per**2)).flatten().to(patches.device)
            patches = patches[order]
        frames, towers = [size[0] for size in sizes], patches.split(counts)
        heads = {i: _heads_of_images(qk, counts, frames, order) for i, qk in seen.made.items()}
        images = []
        for n, (t, h, w) in enumerate(sizes):
            part = towers[n].unflatten(0, (t, -1))
            recorded = {i: qk[n] for i, qk in heads.items()}
            if per > 1 and not hasattr(self.core, "visual"):  # Pixtral's patches come row by row
                within = token_order((h, w), per).to(part.device)
                part = part[:, within]
                recorded = {i: (q[:, :, within], k[:, :, within]) for i, (q, k) in recorded.items()}
            grid = partial(cell_grid, (t, h // per, w // per))
            images.append(
                ImageTokens(
                    features=output.pooler_output[n],
                    tower=part,
                    pixels=pixels[n][0],
                    patches=(h, w),
                    merge=per,
                    video=self.kind == "video",
                    make_grid=grid,
                    make_views=pixels[n][1],
                    recorded_heads=recorded,
                )
            )
        return images

    def _anyres(self, output: Any, seen: "_Seen") -> list[ImageTokens]:
        """Record images that the model packs: a thumbnail and tiles each."""
        config = self.core.config
        side = config.vision_config.image_size // config.vision_config.patch_size
        images = []
        for n, part in enumerate(seen.parts(seen.crops)):
            patches, tiles, size = part["tower"].shape[1], (0, 0), (0, 0)
            if patches - side**2 not in (0, 1):
                raise _unknown_tower(self.core, patches, side)
            if seen.crops[n] > 1:
                size = seen.sizes[n]
                tiles = anyres_tiles(config, size)
            grid = partial(packed_grid, seen.repack[n], seen.crops[n], tiles[1], side, patches)
            images.append(
                ImageTokens(
                    features=output.pooler_output[n],
                    patches=(side, side),
                    tiles=tiles,
                    size=size,
                    projector=self._project,
                    make_grid=grid,
                    **part,
                )
            )
        return images

    def _videos(self, output: Any, seen: "_Seen") -> list[ImageTokens]:
        count = len(output.pooler_output)
        frames = len(seen.pixel_values) // count
        return [
            ImageTokens(
                features=features,
                video=True,
                projector=self._project,
                make_grid=partial(video_grid, frames, len(features)),
                **part,
            )
            for features, part in zip(
                with_newlines(self.core, output.pooler_output, frames), seen.parts([frames] * count), strict=True
            )
        ]


class _Latest(threading.local):
    """The latest output of an encoder in each thread."""

    output: Callable[[], Any] = staticmethod(lambda: None)

    def __reduce__(self) -> tuple:
        return _Latest, ()  # a copy of the model has encoded nothing


def _pack(pack: Callable[..., Any], features: Any, image_sizes: Any, *strategy: Any, **kwargs: Any) -> Any:
    """Pack as the model does, and show the running encoding how."""
    if strategy:  # LLaVA-NeXT-Video passes it by position
        kwargs["vision_feature_select_strategy"] = strategy[0]
    if (seen := _ENCODING.get()) is not None:
        seen.pack(pack, features, image_sizes, kwargs)
    return pack(features, image_sizes, **kwargs)


def _alike(a: Any, b: Any) -> bool:
    """Tell whether features (n, d) of several images are the same, up to rounding."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return False
    pairs = [(x.float(), y.to(x).float()) for x, y in zip(a, b, strict=True)]
    return all(bool((x - y).abs().max() <= 0.02 * y.abs().max()) for x, y in pairs)


def _unknown_tower(core: Any, patches: int, side: int) -> TypeError:
    return TypeError(
        f"the vision tower {type(tower(core)).__name__} made {patches} tokens of a picture of {side} x {side} patches; "
        "vlmslim needs one for each patch, and at most a CLS token with them"
    )


class _Seen:
    """What passed through the model while images were encoded.

    core           : the model
    all_pixels     : of all crops or frames, one entry for each run of the tower
    all_features   : the same, as they enter the projector
    layers         : tower layer -> the module, and its inputs
    made           : tower layer -> queries and keys, where they depend on positions
    sharded        : tower layer -> queries and keys of each run, where it has its weights only while it runs
    crops, sizes   : per image, the number of crops, and height and width; of anyres models only
    repack         : per image, sends other features through its packing; of anyres models only
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self.all_pixels: list[Tensor] = []
        self.all_features: list[Tensor] = []
        self.layers: dict[int, tuple[nn.Module, list[Tensor]]] = {}
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.sharded: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self.crops: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.repack: list[Callable[[Tensor], Tensor]] = []

    @property
    def pixel_values(self) -> Tensor:
        """Pixels of all crops or frames."""
        return _joined(self.all_pixels)

    @property
    def tower_features(self) -> Tensor:
        """Tower features of all crops or frames."""
        return _joined(self.all_features)

    def unless_elsewhere(self, note: Callable[[nn.Module, tuple, dict], None]) -> Callable:
        """Make a hook that notes nothing while the module runs for another encoding, in another thread."""

        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if _ENCODING.get() is self:
                note(module, args, kwargs)

        return hook

    def pixels(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        self.all_pixels.append(args[0] if args else next(iter(kwargs.values())))

    def tower(self, projector: nn.Module, args: tuple, kwargs: dict) -> None:
        if len(self.all_features) == len(self.all_pixels):
            return  # Ovis2 projects its indicator tokens too, afterwards
        self.all_features.append(args[0] if args else next(iter(kwargs.values())))

    def layer(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.layers.setdefault(i, (layer, []))[1].append(hidden)
        if is_sharded(layer):  # its weights are gone when a method asks
            self.sharded.setdefault(i, []).append(tower_qk(layer, hidden))

    def heads(self, i: int, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        q, k = tower_heads(attention, args, kwargs)
        if i in self.made:
            q, k = torch.cat([self.made[i][0], q], 1), torch.cat([self.made[i][1], k], 1)
        self.made[i] = q, k

    def pack(self, pack: Callable, image_features: Any, image_sizes: Any, kwargs: dict) -> None:
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        self.repack += [partial(_repack, pack, image_sizes, kwargs, n) for n in range(len(sizes))]
        self.crops += [len(features) for features in image_features]
        self.sizes += [(int(height), int(width)) for height, width in sizes]

    def parts(self, counts: list[int]) -> list[dict[str, Any]]:
        """Split what was seen into images of so many crops or frames each."""
        pixels, features = self.pixel_values.split(counts), self.tower_features.split(counts)
        layers = {i: (layer, _joined(x).split(counts)) for i, (layer, x) in self.layers.items()}
        made = {
            i: [_joined(part).split(counts) for part in zip(*parts, strict=True)] for i, parts in self.sharded.items()
        }
        return [
            {
                "tower": features[n],
                "pixels": pixels[n],
                "recorded_layers": {i: (layer, x[n]) for i, (layer, x) in layers.items()},
                "recorded_heads": {i: (q[n], k[n]) for i, (q, k) in made.items()},
            }
            for n in range(len(counts))
        ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join what passed in one run of the tower or in several; packed images follow each other in one row."""
    if len(parts) == 1:
        return parts[0]
    rows = all(part.shape[1:] == parts[0].shape[1:] for part in parts)
    return torch.cat(list(parts), dim=0 if rows else 1)


def _packed_pixels(
    core: Any, pixels: Tensor, sizes: Sequence[Sequence[int]]
) -> list[tuple[Tensor, Callable[[], Tensor] | None]]:
    """Return the pixels of each packed image, and what makes pictures of them where they are patches.

    Args:
        core: the model without its head.
        pixels: of all images, patches (N, numbers) or pictures (images, 3, h, w), padded to the largest.
        sizes: frames, rows and columns of patches of each.
    """
    patch = core.config.vision_config.patch_size
    if pixels.ndim == 4:
        return [(x[None, :, : h * patch, : w * patch], None) for x, (_, h, w) in zip(pixels, sizes, strict=True)]
    parts = [part[None] for part in pixels.split([math.prod(size) for size in sizes])]
    return [(x, partial(_of_patches, x, size, merge(core), patch)) for x, size in zip(parts, sizes, strict=True)]


def _of_patches(pixels: Tensor, size: Sequence[int], merge: int, patch: int) -> Tensor:
    """Put patches (1, t h w, numbers), token by token, back into pictures (t, 3, height, width).

    A patch of Qwen's spans two moments; the first one is shown. Of a still picture both are the same.
    """
    t, h, w = size
    x = pixels.view(t, h // merge, w // merge, merge, merge, 3, -1, patch, patch)[:, :, :, :, :, :, 0]
    return x.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(t, 3, h * patch, w * patch)


def _heads_of_images(
    qk: tuple[Tensor, Tensor], counts: list[int], frames: list[int], order: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """Split queries and keys (heads, N, d) of packed images: for each image, (frames, heads, patches, d) twice.

    Towers that merge patches before the projector attend among more patches than they hand out, `counts` of each image.
    """
    each = qk[0].shape[1] // sum(counts)
    q, k = (x if order is None else x[:, order] for x in qk)
    sizes = [each * count for count in counts]

    def split(x: Tensor) -> list[Tensor]:
        return [part.unflatten(1, (t, -1)).transpose(0, 1) for part, t in zip(x.split(sizes, 1), frames, strict=True)]

    return list(zip(split(q), split(k), strict=True))


def _repack(pack: Callable, image_sizes: Any, kwargs: dict, n: int, features: Tensor) -> Tensor:
    """Send other features (c, p, 3) through the packing of image `n`, with -1 for the newline."""
    newline = features.new_full((3,), -1.0)
    packed, _ = pack([features], image_sizes[n : n + 1], **kwargs | {"image_newline": newline})
    return packed[0]
