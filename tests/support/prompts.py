"""Prompts for tiny models of the LLaVA families: rows of token ids, pictures and videos."""

from dataclasses import dataclass
from functools import cache

import torch
from tiny import BOS, IMAGE, PAD, SIDE, VIDEO, family_of, shared_model
from torch import Tensor, nn


@dataclass(frozen=True)
class Picture:
    """An image of a given size (height, width) whose pixels follow from `seed`."""

    seed: int = 0
    size: tuple[int, int] = (60, 30)


@dataclass(frozen=True)
class Clip:
    """A video of some frames whose pixels follow from `seed`."""

    seed: int = 0
    frames: int = 3


Row = list  # of token ids, Pictures and Clips


def words(seed: int, count: int, first: int = 2) -> list[int]:
    """Draw token ids of text, none of them lower than `first`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(first, 90, (count,), generator=generator).tolist()


def _pixels(seed: int, crops: int) -> Tensor:
    """Patches of an image that differ in mean and contrast, so that tokens differ as those of real images do."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(crops, 3, SIDE, SIDE, generator=generator)
    coarse = torch.randn(crops, 3, 4, 4, generator=generator)
    return pixels + coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


@cache
def visual_tokens(family: str, size: tuple[int, int], alone: bool = True) -> int:
    """Count the tokens of a picture of `size`, by asking the model itself. `alone`: the only image of its row."""
    if family in ("llava", "siglip"):
        return 16
    extra = {} if alone or family == "next" else dict(batch_num_images=torch.tensor([2]))
    n = 1 if alone or family == "next" else 2
    model = shared_model(family, "sdpa").model
    with torch.no_grad():
        out = model.get_image_features(torch.zeros(n, 5, 3, SIDE, SIDE), torch.tensor([size] * n), **extra)
    return len(out.pooler_output[0])


def clip_tokens(frames: int) -> int:
    return frames * 4 + 1


def padded(lines: list[list[int]], fill: int, padding: str) -> Tensor:
    """Make one tensor of lines of different lengths, filled up at the `padding` side, "left" or "right"."""
    width = max(map(len, lines))
    fills = [[fill] * (width - len(line)) for line in lines]
    return torch.tensor([f + x if padding == "left" else x + f for f, x in zip(fills, lines, strict=True)])


def batch(model: nn.Module, rows: list[Row], padding: str = "left") -> dict:
    """Inputs of the model for `rows`. padding: "left", "right", or "none" (equal rows, no attention mask)."""
    family = family_of(model)
    pictures, sizes, per_row, clips, ids = [], [], [], [], []
    for row in rows:
        seen = [x for x in row if isinstance(x, Picture)]
        per_row.append(len(seen))
        line = []
        for x in row:
            if isinstance(x, Picture):
                pictures.append(_pixels(x.seed, 5 if family in ("next", "onevision") else 1))
                sizes.append(x.size)
                line += [IMAGE] * visual_tokens(family, x.size, len(seen) == 1)
            elif isinstance(x, Clip):
                clips.append(_pixels(500 + x.seed, x.frames))
                line += [VIDEO] * clip_tokens(x.frames)
            else:
                line.append(x)
        ids.append(line)
    if padding == "none":
        assert len(set(map(len, ids))) == 1, "rows of different lengths need padding"
        inputs = dict(input_ids=torch.tensor(ids))
    else:
        ones = [[1] * len(line) for line in ids]
        inputs = dict(input_ids=padded(ids, PAD, padding), attention_mask=padded(ones, 0, padding))
    if pictures:
        stacked = torch.stack(pictures)
        inputs["pixel_values"] = (stacked if family in ("next", "onevision") else stacked[:, 0]).to(model.dtype)
        if family in ("next", "onevision"):
            inputs["image_sizes"] = torch.tensor(sizes)
        if family == "onevision":
            inputs["batch_num_images"] = torch.tensor([n for n in per_row if n])
    if clips:
        inputs["pixel_values_videos"] = torch.stack(clips).to(model.dtype)
    return inputs


def packed(model: nn.Module, rows: list[Row]) -> dict:
    """Inputs of the model for `rows`, packed into one row."""
    singles = [batch(model, [one]) for one in rows]
    inputs = {
        "input_ids": torch.cat([x["input_ids"] for x in singles], 1),
        "position_ids": torch.cat([torch.arange(x["input_ids"].shape[1]) for x in singles])[None],
        "use_cache": False,
    }
    for name in ("pixel_values", "image_sizes", "batch_num_images"):
        if any(name in x for x in singles):
            inputs[name] = torch.cat([x[name] for x in singles if name in x])
    return inputs


ROWS: list[Row] = [  # different images, different sizes, different text lengths
    [BOS, Picture(0, (60, 30)), *words(0, 5)],
    [BOS, *words(1, 4), Picture(1, (32, 64)), *words(2, 9)],
]
LONG_ROWS: list[Row] = [*ROWS, [BOS, *words(3, 7)], [BOS, *words(4, 2), Picture(2, (60, 60)), *words(5, 3)]]
SEVERAL: list[Row] = [
    [BOS, Picture(3, (60, 30)), *words(6, 2), Picture(4, (32, 64)), *words(7, 4)],
    [BOS, *words(8, 3), Picture(5, (64, 64)), *words(9, 5)],
]
EQUAL: list[Row] = [  # two rows of one length, so that no mask is needed
    [BOS, Picture(6), *words(10, 6)],
    [BOS, *words(11, 3), Picture(7), *words(12, 3)],
]


def varied_row(i: int) -> list:
    """Make a row of one picture; sizes and lengths follow from `i`."""
    return [BOS, *words(i, i % 3), Picture(i, [(60, 30), (32, 64), (60, 60)][i % 3]), *words(50 + i, 3 + i % 4)]


def visual(inputs: dict, row: int = 0) -> list[Tensor]:
    """The caller's positions of each image or video of a row: runs of placeholders."""
    ids = inputs["input_ids"][row]
    place = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
    if not len(place):
        return []
    breaks = (place.diff() != 1).nonzero()[:, 0] + 1
    return list(place.tensor_split(breaks.tolist()))


def all_visual(inputs: dict, row: int = 0) -> Tensor:
    """(L,) bool: the caller's positions of every image and video of a row."""
    ids = inputs["input_ids"][row]
    return (ids == IMAGE) | (ids == VIDEO)


def valid(inputs: dict, row: int) -> Tensor:
    """(L,) bool: where row `row` is no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"][row], dtype=torch.bool) if mask is None else mask[row].bool()
