"""Multiply-adds of vision towers and projectors, from a configuration alone and without torch.

One layer of a tower that processes `n` tokens of `d` numbers, with MLP width `m`, does

    4 n d^2  projections        2 p d  attention        2 n d m  MLP, or 3 n d m if it is gated

where `p` counts the pairs of tokens that see each other: n^2 in a frame, or fewer where a layer attends in windows.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

#: Frames, rows and columns of an image, in patches of the tower.
Grid: TypeAlias = tuple[int, int, int]

_GATED = ("qwen2_5_vl", "glm4v", "pixtral", "ovis2")  # towers whose MLP has three matrices
_CLS = ("clip", "internvl")  # towers with a CLS token in front of the patches


@dataclass(frozen=True)
class TowerShape:
    """The sizes of a vision tower that decide its cost.

    layers, hidden, mlp : as of a language model
    matrices : of the MLP, which has two, or three if it is gated
    numbers  : numbers in a patch
    cls      : tokens in front of the patches
    grid     : of a view; None for a tower that takes any size
    merge    : patches along each side of a token, where the tower knows it
    windows  : layers that attend in windows
    window   : patches along a side of a window
    """

    layers: int
    hidden: int
    mlp: int
    matrices: int
    numbers: int
    cls: int
    grid: Grid | None
    merge: int
    windows: int = 0
    window: int = 0

    @classmethod
    def from_config(cls, config: Any) -> "TowerShape":
        """Read the config of a vision tower, or the `vision_config` in the config of a model."""
        config = getattr(config, "vision_config", config)
        kind, patch = config.model_type, _one(config.patch_size)
        hidden: int = getattr(config, "embed_dim", None) or config.hidden_size  # Qwen2-VL's `hidden_size` is its output
        mlp: int = getattr(config, "intermediate_size", None) or hidden * config.mlp_ratio
        if kind.startswith("glm4v"):
            mlp = config.out_hidden_size  # its `intermediate_size` is the merger's
        channels: Any = getattr(config, "num_channels", None) or getattr(config, "in_channels", 3)
        packed = hasattr(config, "spatial_merge_size") or kind == "pixtral"
        side = 0 if packed else _one(config.image_size) // patch
        full = getattr(config, "fullatt_block_indexes", None)
        layers: int = getattr(config, "depth", None) or config.num_hidden_layers  # transformers 5.17 says `depth` only
        merge = getattr(config, "spatial_merge_size", None)
        return cls(
            layers=layers,
            hidden=hidden,
            mlp=mlp,
            matrices=3 if kind.startswith(_GATED) else 2,
            numbers=channels * _one(getattr(config, "temporal_patch_size", 1)) * patch**2,
            cls=int(kind.startswith(_CLS)),
            grid=None if packed else (1, side, side),
            merge=merge or getattr(config, "hidden_stride", None) or 1,
            windows=0 if full is None else layers - len(full),
            window=0 if full is None else config.window_size // patch,
        )

    def of(self, grid: Grid | None) -> Grid:
        """Return the grid of an image.

        Raises:
            ValueError: the tower takes images of any size, and none is given.
        """
        grid = grid or self.grid
        if grid is None:
            raise ValueError(
                "this vision tower takes pictures of any size: give grid=(frames, rows, columns) of patches"
            )
        return grid

    def pairs(self, grid: Grid) -> float:
        """Count the pairs of tokens that see each other in all layers."""
        frames, rows, columns = grid
        everywhere = frames * (rows * columns + self.cls) ** 2
        if not self.windows:
            return self.layers * everywhere
        inside = frames * sum(n**2 for n in _cut(rows, self.window)) * sum(n**2 for n in _cut(columns, self.window))
        return (self.layers - self.windows) * everywhere + self.windows * inside


def tower_multiply_adds(config: Any, grid: Grid | None = None) -> float:
    """Count the multiply-adds of a vision tower for one crop: all layers, the patch embedding, and what it ends in.

    All layers count, and the pooling head of a SigLIP that has one, because transformers runs them even if the
    projector reads an earlier layer. A Pixtral tower lets kernels attend among all images of a prompt, and masks; here
    each image counts by itself.

    Args:
        config: of the model, or of its tower.
        grid: frames, rows and columns of patches of an image, for a tower that takes any size.

    Raises:
        ValueError: no grid for a tower that takes any size.
    """
    vision = getattr(config, "vision_config", config)
    shape = TowerShape.from_config(vision)
    frames, rows, columns = size = shape.of(grid)
    d, patches = shape.hidden, frames * rows * columns
    n = patches + frames * shape.cls
    layers = shape.layers * (4 * n * d * d + shape.matrices * n * d * shape.mlp) + 2 * shape.pairs(size) * d
    return patches * d * shape.numbers + layers + _ending(vision, shape, size)


def _ending(vision: Any, shape: TowerShape, grid: Grid) -> float:
    """Count the multiply-adds after a tower's layers, before the projector."""
    frames, rows, columns = grid
    d, n, tokens = shape.hidden, rows * columns, frames * _tokens(rows, columns, shape.merge)
    wide = d * shape.merge**2
    kind = vision.model_type
    if kind.startswith("siglip") and getattr(vision, "vision_use_head", True):  # one query attends to all patches
        return 2 * d * d + 2 * n * d * d + 2 * n * d + 2 * d * shape.mlp
    if kind.startswith("glm4v"):  # a convolution merges patches
        return tokens * wide * vision.out_hidden_size
    if kind.startswith("ovis2"):  # scores of the visual vocabulary
        return tokens * wide * (vision.vocab_size - vision.num_visual_indicator_tokens)
    mergers = len(getattr(vision, "deepstack_visual_indexes", ()))
    return mergers * tokens * (wide * wide + wide * getattr(vision, "out_hidden_size", 0))


#: Multiply-adds of the projector for a visual token, by `model_type`. Those of other families are two-layer MLPs.
_PROJECTORS: dict[str, Callable[[Any], float]] = {
    "internvl": lambda c: _two(4 * c.vision_config.hidden_size, _text(c), _text(c)),
    "idefics3": lambda c: c.vision_config.hidden_size * c.scale_factor**2 * _text(c),
    "smolvlm": lambda c: c.vision_config.hidden_size * c.scale_factor**2 * _text(c),
    "gemma3": lambda c: c.vision_config.hidden_size * _text(c),
    "qwen2_vl": lambda c: _merger(c.vision_config.embed_dim, c.vision_config.hidden_size, c),
    "qwen2_5_vl": lambda c: _merger(c.vision_config.hidden_size, c.vision_config.out_hidden_size, c),
    "qwen3_vl": lambda c: _merger(c.vision_config.hidden_size, c.vision_config.out_hidden_size, c),
    "glm4v": lambda c: (
        c.vision_config.out_hidden_size * (c.vision_config.out_hidden_size + 3 * c.vision_config.intermediate_size)
    ),
    "mistral3": lambda c: (
        c.vision_config.hidden_size**2 * c.spatial_merge_size**2
        + _two(c.vision_config.hidden_size * _levels(c), _text(c), _text(c))
    ),
    "aya_vision": lambda c: _swiglu(c, getattr(c, "alignment_intermediate_size", _text(c))),
    "cohere2_vision": lambda c: _swiglu(c, c.alignment_intermediate_size),
    "ovis2": lambda c: c.vision_config.vocab_size * _text(c),
}


def projector_multiply_adds(config: Any) -> float:
    """Count the multiply-adds of a model's projector for a visual token; where patches are merged, that counts too."""
    if config.model_type in _PROJECTORS:
        return _PROJECTORS[config.model_type](config)
    return _two(config.vision_config.hidden_size * _levels(config), _text(config), _text(config))


def crop_tokens(config: Any, grid: Grid | None = None) -> int:
    """Count the tokens that one crop, or an image of a `grid`, brings to the language model."""
    shape = TowerShape.from_config(config)
    frames, rows, columns = shape.of(grid)
    keeps_cls = shape.cls and getattr(config, "vision_feature_select_strategy", "default") == "full"
    return frames * _tokens(rows, columns, _merge(config, shape)) + frames * bool(keeps_cls)


def _merge(config: Any, shape: TowerShape) -> int:
    """Return the patches along each side of a visual token."""
    if config.model_type == "internvl":
        return round(1 / config.downsample_ratio)
    if config.model_type == "gemma3":
        return shape.of(None)[1] // math.isqrt(config.mm_tokens_per_image)
    named = (getattr(config, name, None) for name in ("scale_factor", "downsample_factor", "spatial_merge_size"))
    return next((merge for merge in named if merge), shape.merge)


def _tokens(rows: int, columns: int, merge: int) -> int:
    return math.ceil(rows / merge) * math.ceil(columns / merge)


def _cut(length: int, piece: int) -> list[int]:
    """Cut a side into windows; the last one may be smaller."""
    return [min(piece, length - start) for start in range(0, length, piece)]


def _one(size: Any) -> int:
    return size if isinstance(size, int) else size[0]


def _text(config: Any) -> int:
    return config.text_config.hidden_size


def _levels(config: Any) -> int:
    """Count the tower layers of which the projector reads the features side by side."""
    names = ("vision_feature_layer", "vision_feature_layers")  # VipLlava's, before transformers 5.25
    levels = next((x for name in names if (x := getattr(config, name, None)) is not None), -1)
    return 1 if isinstance(levels, int) else len(levels)


def _two(width: int, middle: int, out: int) -> int:
    return width * middle + middle * out


def _merger(width: int, out: int, config: Any) -> int:
    wide = width * config.vision_config.spatial_merge_size**2
    return _two(wide, wide, out)


def _swiglu(config: Any, middle: int) -> int:
    width = config.vision_config.hidden_size * config.downsample_factor**2
    return width * middle + middle // 2 * _text(config)
