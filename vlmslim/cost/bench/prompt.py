"""Made-up prompts of an exact size: random words around images of noise."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmslim.cost.vision import Grid, TowerShape
from vlmslim.engine.families import Family, anyres_tiles, family_of, merge

#: Tokens a side of an image in a tower that takes any size, if no size is asked for: 576 tokens, as in LLaVA-1.5.
SIDE = 24
VISUAL = -1  # stands for a visual token in the layout of an image


@dataclass(frozen=True)
class _Shown:
    """A batch of images of noise.

    inputs : of the model
    tiles  : rows and columns of tiles; (0, 0) without tiles
    crops  : of each image
    grid   : of each image, in a tower that takes any size
    """

    inputs: dict[str, Tensor]
    tiles: tuple[int, int] = (0, 0)
    crops: int = 1
    grid: Grid | None = None


@dataclass(frozen=True)
class SyntheticPrompt:
    """A batch of prompts of one size; each prompt has its own words and images.

    ids         : (B, L) ids, with placeholders where visual tokens go
    image       : (L,) i at the tokens of the i-th image of a prompt, from 1; 0 at text
    pixels      : the other inputs of the model: pixel values, and what a family needs with them
    types       : name of the input that says which tokens are visual; "" for a family without one
    batch, images : prompts, and images in each prompt
    tokens      : visual tokens of each image
    crops       : crops of each image, as they enter the vision tower
    grid        : frames, rows and columns of patches of each image, in a tower that takes any size; None elsewhere
    image_token : id of the placeholder
    """

    ids: Tensor
    image: Tensor
    pixels: dict[str, Tensor]
    types: str
    batch: int
    images: int
    tokens: int
    crops: int
    grid: Grid | None
    image_token: int

    @classmethod
    def make(
        cls,
        model: Any,
        *,
        batch: int = 1,
        images: int = 1,
        image_size: tuple[int, int] | None = None,
        text_tokens: int = 46,
        seed: int = 0,
    ) -> "SyntheticPrompt":
        """Make a batch of prompts for a model, and encode its images once to count their tokens.

        Args:
            model: an unpatched model.
            batch: prompts.
            images: images in each prompt.
            image_size: height and width in pixels. They decide the tiles of families that cut images into tiles, by
                default two a side, and the tokens of families that take any size, by default 24 a side. The other
                families scale every image to the size of the vision tower.
            text_tokens: words of each prompt, before and after the images together. By default 46, because most papers
                count 622 tokens: 576 visual tokens and 46 words. Markers around images and tiles come on top.
            seed: seed of words and noise.

        Raises:
            ValueError: fewer than 2 text tokens.
        """
        if text_tokens < 2:
            raise ValueError(f"text_tokens={text_tokens}: use at least 2, one before the images and one after them")
        generator = torch.Generator().manual_seed(seed)
        config, device, family = model.config, model.device, family_of(model)
        shown = _show(model, family, batch, images, image_size, generator)
        with torch.inference_mode():
            encoded = model.model.get_image_features(**shown.inputs).pooler_output
        tokens = sum(len(entry) for entry in encoded) // (batch * images)
        special = {config.image_token_id, getattr(config, "video_token_id", None)}
        ids = torch.tensor([i for i in range(3, config.text_config.vocab_size) if i not in special])
        words = ids[torch.randint(len(ids), (batch, text_tokens), generator=generator)]
        before, after = words.split([text_tokens // 2, text_tokens - text_tokens // 2], dim=1)
        layout = torch.tensor(_layout(family, tokens, shown.tiles))
        visual = (layout == VISUAL).repeat(images)
        middle = torch.where(visual, config.image_token_id, ids[layout.clamp(min=0)].repeat(images))
        number = torch.arange(1, images + 1).repeat_interleave(len(layout)) * visual
        return cls(
            ids=torch.cat([before, middle.expand(batch, -1), after], dim=1).to(device),
            image=torch.nn.functional.pad(number, (before.shape[1], after.shape[1])).to(device),
            pixels=shown.inputs,
            types="mm_token_type_ids"
            if family.grid == "grid_thw"
            else "token_type_ids"
            if family.masks_by_type
            else "",
            batch=batch,
            images=images,
            tokens=tokens,
            crops=shown.crops,
            grid=shown.grid,
            image_token=config.image_token_id,
        )

    @property
    def text_tokens(self) -> int:
        """Text tokens of each prompt: words, and markers around images and tiles."""
        return self.ids.shape[1] - self.visual_tokens

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of each prompt."""
        return self.images * self.tokens

    def kept(self, visual_tokens: int) -> Tensor:
        """Return (L,) bool, True at text and at the first tokens of each image, as evenly as possible."""
        keep = self.image == 0
        for i, part in enumerate(torch.arange(visual_tokens).tensor_split(self.images), start=1):
            own = self.image == i
            keep |= own & (own.cumsum(0) <= len(part))
        return keep

    def inputs(self, visual_tokens: int | None = None) -> dict[str, Tensor]:
        """Return the inputs of `forward` and `generate`, with `visual_tokens` placeholders a prompt instead of all.

        A shortened prompt does not say which tokens are visual where rotary positions have several numbers, because
        they would be made for whole images. So its positions have the same number on each axis.
        """
        ids, image = self.ids, self.image
        if visual_tokens is not None:
            keep = self.kept(visual_tokens)
            ids, image = ids[:, keep], image[keep]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.pixels
        if self.types and (visual_tokens is None or self.types == "token_type_ids"):
            inputs[self.types] = (image > 0).long().expand(self.batch, -1).contiguous()
        return inputs


def _show(
    model: Any,
    family: Family,
    batch: int,
    images: int,
    size: tuple[int, int] | None,
    generator: torch.Generator,
) -> _Shown:
    """Make images of noise, as they enter the model's vision tower."""
    config, device, count = model.config, model.device, batch * images
    tower = TowerShape.from_config(config)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, model.dtype)

    if family.units == "packed":
        patch = config.vision_config.patch_size
        side = patch * merge(model.model)
        most = getattr(config.vision_config, "image_size", 0) // side if family.grid == "image_sizes" else 0
        height, width = size or (side * (min(SIDE, most) if most else SIDE),) * 2
        rows, columns = (max(1, round(x / side)) * merge(model.model) for x in (height, width))
        if family.grid == "image_sizes":
            pixels, grids = noise(count, 3, rows * patch, columns * patch), [[rows * patch, columns * patch]]
        else:
            pixels, grids = noise(count * rows * columns, tower.numbers), [[1, rows, columns]]
        name = family.grid if family.grid == "image_sizes" else f"image_{family.grid}"
        return _Shown(
            {"pixel_values": pixels, name: torch.tensor(grids * count, device=device)}, grid=(1, rows, columns)
        )
    assert tower.grid is not None  # all others scale images to the size of the tower
    side = tower.grid[1] * _one(config.vision_config.patch_size)
    height, width = size or (2 * side, 2 * side)
    if family.anyres:
        inputs = {"image_sizes": torch.tensor([[height, width]] * count, device=device)}
        onevision, crops = config.model_type == "llava_onevision", 1
        if not onevision or images == 1:  # OneVision cuts no tiles if a prompt has several images
            crops = 1 + math.prod(anyres_tiles(config, (height, width)))
        if onevision:
            inputs["batch_num_images"] = torch.tensor([images] * batch, device=device)
        return _Shown({"pixel_values": noise(count, crops, 3, side, side)} | inputs, crops=crops)
    tiles, crops = (0, 0), 1
    if family.joins is not None:
        tiles = max(1, round(height / side)), max(1, round(width / side))
        crops = math.prod(tiles) + (math.prod(tiles) > 1)
    if family.units == "samples":
        return _Shown({"pixel_values": noise(batch, images * crops, 3, side, side)}, tiles, crops)
    return _Shown({"pixel_values": noise(count * crops, 3, side, side)}, tiles, crops)


def _layout(family: Family, tokens: int, tiles: tuple[int, int]) -> list[int]:
    """Lay out an image: `VISUAL` at each of its tokens, and numbers of words that mark where it and its tiles begin.

    Families without markers are told apart by their tokens alone.
    """
    start, end, place, newline = range(4)
    views = math.prod(tiles) + (math.prod(tiles) > 1) or 1
    view = [VISUAL] * (tokens // views)
    if family.units == "samples":  # a marker and a place before each view, and a newline after each row
        rows = ([start, place, *view] * tiles[1] + [newline]) * tiles[0] if views > 1 else []
        return [*rows, start, place, *view, start]
    if family.units == "packed" or family.joins is not None or family.masks_by_type:
        apart = [] if family.joins is None or family.joins(np.empty(0)) else [place]
        return [start, *view, *(views - 1) * [*apart, *view], end]
    return view


def _one(size: Any) -> int:
    return size if isinstance(size, int) else size[0]
