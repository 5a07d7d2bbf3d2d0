"""The images of an encoder output, as a method is shown them.

`Family.units` says how the encoder of a family hands out images. Each of these ways has a function here.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmslim.compressor import ImageTokens
from vlmslim.engine.families import FAMILIES, anyres_tiles, merge, projector, tower, window_order, with_newlines
from vlmslim.engine.grids import cell_grid, crop_grid, in_order, packed_grid, token_order, video_grid
from vlmslim.engine.observation import Observation


def images_of(
    core: Any, kind: str, output: Any, seen: Observation, given: dict[str, Any], counts_only: bool
) -> list[ImageTokens]:
    """Make the images of an encoder output from what passed while the model encoded them.

    Args:
        core: the model without its head.
        kind: "image" or "video".
        output: of the encoder.
        seen: what passed.
        given: the arguments of the encoding, by name.
        counts_only: the images are counted and no method sees them, so that their features are enough.
    """
    family = FAMILIES[core.config.model_type]
    if counts_only and family.units in ("crops", "anyres") and kind == "image":
        return bare_images(output)
    if family.units == "packed":
        grids = next(value for name, value in given.items() if name.endswith(family.grid))
        return _packed_images(core, kind, output, seen, grids)
    if family.units == "samples":
        views = torch.cat(list(output.pooler_output)).unflatten(0, (len(seen.tower_features), -1))
        return _square_views(core, views, seen)
    if kind == "video":
        return _videos(core, output, seen)
    return _mosaics(core, output, seen) if family.units == "anyres" else _square_views(core, output.pooler_output, seen)


def bare_images(output: Any) -> list[ImageTokens]:
    """Make images that can be counted only, because their features are all that is known of them."""
    return [ImageTokens(features, tower=features[:0], pixels=features[:0]) for features in output.pooler_output]


def _square_views(core: Any, features: Any, seen: Observation) -> list[ImageTokens]:
    """Make an image of each square view, with `features` (n, d) of its own."""
    images = []
    for view, part in zip(features, seen.parts([1] * len(features)), strict=True):
        per = _merged(len(view), part["tower"].shape[1])
        side = math.isqrt(part["tower"].shape[1])
        if per > 1:
            order = token_order((side, side), per).to(part["tower"].device)
            part["tower"] = part["tower"][:, order]
            layers, heads = part["recorded_layers"], part["recorded_heads"]
            part["recorded_layers"] = {i: (layer, in_order(x, order)) for i, (layer, x) in layers.items()}
            part["recorded_heads"] = {i: (in_order(q, order), in_order(k, order)) for i, (q, k) in heads.items()}
        cells = math.isqrt(len(view))
        grid = partial(crop_grid, cells, len(view))
        project = partial(_project, core) if per == 1 else None  # a projector that merges takes several patches
        images.append(ImageTokens(view, patches=(side, side), merge=per, projector=project, make_grid=grid, **part))
    return images


def _merged(tokens: int, patches: int) -> int:
    """Return how many patches along each side make one of the `tokens` of a view."""
    return math.isqrt(patches // tokens) if patches >= tokens else 1


def _packed_images(core: Any, kind: str, output: Any, seen: Observation, grids: Tensor) -> list[ImageTokens]:
    """Make images of any size that follow each other; `grids` has (frames,) rows and columns of patches."""
    per, sizes = merge(core), torch.as_tensor(grids).tolist()
    if len(sizes[0]) == 2:  # of pixels
        patch = core.config.vision_config.patch_size
        sizes = [(1, height // patch, width // patch) for height, width in sizes]
    counts = [math.prod(size) for size in sizes]
    pixels = _packed_pixels(core, seen.pixel_values, sizes)
    patches = seen.tower_features.flatten(0, -2)
    if len(patches) < sum(counts):  # merged before the projector (GLM)
        counts, per = [count // per**2 for count in counts], 1
        sizes = [(t, h // merge(core), w // merge(core)) for t, h, w in sizes]
    order = window_order(core, grids)
    if order is not None:
        order = (order[:, None] * per**2 + torch.arange(per**2)).flatten().to(patches.device)
        patches = patches[order]
    frames, towers = [size[0] for size in sizes], patches.split(counts)
    heads = {i: _heads_of_images(qk, counts, frames, order) for i, qk in seen.made.items()}
    images = []
    for n, (t, h, w) in enumerate(sizes):
        part = towers[n].unflatten(0, (t, -1))
        recorded = {i: qk[n] for i, qk in heads.items()}
        if per > 1 and not hasattr(core, "visual"):  # Pixtral's patches come row by row
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
                video=kind == "video",
                make_grid=grid,
                make_views=pixels[n][1],
                recorded_heads=recorded,
            )
        )
    return images


def _mosaics(core: Any, output: Any, seen: Observation) -> list[ImageTokens]:
    """Make images that the model packs: a thumbnail and tiles each."""
    config = core.config
    side = config.vision_config.image_size // config.vision_config.patch_size
    images = []
    for n, part in enumerate(seen.parts(seen.crops)):
        patches, tiles, size = part["tower"].shape[1], (0, 0), (0, 0)
        if patches - side**2 not in (0, 1):
            raise _unknown_tower(core, patches, side)
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
                projector=partial(_project, core),
                make_grid=grid,
                **part,
            )
        )
    return images


def _videos(core: Any, output: Any, seen: Observation) -> list[ImageTokens]:
    """Make videos of square frames."""
    count = len(output.pooler_output)
    frames = len(seen.pixel_values) // count
    return [
        ImageTokens(
            features=features,
            video=True,
            projector=partial(_project, core),
            make_grid=partial(video_grid, frames, len(features)),
            **part,
        )
        for features, part in zip(
            with_newlines(core, output.pooler_output, frames), seen.parts([frames] * count), strict=True
        )
    ]


def _project(core: Any, tower_features: Tensor) -> Tensor:
    """Apply the projector that the model has now, because adapters may replace it."""
    return projector(core)(tower_features)


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


def _unknown_tower(core: Any, patches: int, side: int) -> TypeError:
    return TypeError(
        f"the vision tower {type(tower(core)).__name__} made {patches} tokens of a picture of {side} x {side} patches; "
        "vlmslim needs one for each patch, and at most a CLS token with them"
    )
