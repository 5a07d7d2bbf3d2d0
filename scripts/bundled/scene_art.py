"""The parts that scenes are made of: the bank of pictures and fonts, and how one item is drawn.

Art styles, backgrounds, fonts and sign codes of the two splits are disjoint (`assets/bank/sources.json`).
"""

import json
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

BANK = Path(__file__).resolve().parents[2] / "assets" / "bank"
SIZE, PATCH = 192, 16
GRID = SIZE // PATCH
SPRITE, GLYPH = 72, 48
COLOURS = {
    "red": (220, 40, 40), "green": (40, 160, 60), "blue": (45, 90, 225), "yellow": (245, 215, 45),
    "orange": (245, 130, 25), "purple": (140, 55, 180), "black": (30, 30, 30), "white": (245, 245, 245),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
CODE_CHARACTERS = "ACEFHJKLNPRTUVXY23456789"  # none that look alike, none too wide
TAG_DIGITS = "123456789"
THINGS = [t["name"] for t in json.loads((BANK / "things.json").read_text())]


@lru_cache
def load_bank(split: str) -> dict[str, dict]:
    """Read art sheets, backgrounds, glyph strips and shape masks of a split ("train" or "test")."""
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    bank: dict[str, dict] = {"art": {}, "background": {}, "glyphs": {}, "shape": {s: _shape_mask(s) for s in SHAPES}}
    for record in json.loads((BANK / "sources.json").read_text()):
        if record["split"] == split:
            image = Image.open(BANK / record["file"])
            image.load()
            name = Path(record["file"]).stem
            if record["kind"] == "art":
                cells = [image.crop((i * SPRITE, 0, (i + 1) * SPRITE, SPRITE)) for i in range(len(THINGS))]
                bank["art"][name] = dict(zip(THINGS, cells, strict=True))
            elif record["kind"] == "glyphs":
                cells = [image.crop((i * GLYPH, 0, (i + 1) * GLYPH, GLYPH)) for i in range(len(CHARACTERS))]
                bank["glyphs"][name] = dict(zip(CHARACTERS, cells, strict=True))
            else:
                bank["background"][name] = image
    return bank


def _shape_mask(shape: str) -> Image.Image:
    mask = Image.new("L", (288, 288))
    draw = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        draw.ellipse((8, 8, 280, 280), 255)
        if shape == "ring":
            draw.ellipse((84, 84, 204, 204), 0)
    elif shape == "square":
        draw.rectangle((26, 26, 262, 262), 255)
    elif shape == "triangle":
        draw.polygon([(144, 12), (280, 262), (8, 262)], 255)
    elif shape == "cross":
        draw.rectangle((100, 10, 188, 278), 255)
        draw.rectangle((10, 100, 278, 188), 255)
    else:
        turns = np.arange(10) * np.pi / 5 - np.pi / 2
        radii = np.where(np.arange(10) % 2 == 0, 140, 58)
        draw.polygon([(144 + r * np.cos(t), 152 + r * np.sin(t)) for r, t in zip(radii, turns, strict=True)], 255)
    return mask.resize((SPRITE, SPRITE), Image.Resampling.BOX)


def photograph(rng: np.random.Generator, split: str) -> tuple[Image.Image, str]:
    """Draw a background: a part of a photograph, or in training sometimes a gradient; return it with its name."""
    photos = load_bank(split)["background"]
    if split == "train" and rng.random() < 0.15:  # plain or two-colour gradient
        ends = rng.integers(0, 256, (2, 2, 3)).astype(np.uint8)
        if rng.random() < 0.5:
            ends[:] = ends[0, 0]
        return Image.fromarray(ends).resize((SIZE, SIZE), Image.Resampling.BILINEAR), "gradient"
    name = str(rng.choice(sorted(photos)))
    photo = photos[name]
    side = int(rng.integers(SIZE, min(photo.size) + 1))
    left, top = int(rng.integers(photo.width - side + 1)), int(rng.integers(photo.height - side + 1))
    box = (left, top, left + side, top + side)
    image = photo.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box=box, reducing_gap=1.0)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    low, high = (0.45, 1.2) if split == "train" else (0.7, 1.1)
    gain = rng.uniform(low, high, 3) if split == "train" else np.full(3, rng.uniform(low, high))
    table = np.clip(np.arange(256) * gain[:, None] + rng.uniform(0, 40), 0, 255).astype(np.uint8)
    return image.point(table.ravel().tolist()), name


def recolour(rng: np.random.Generator, sprite: Image.Image, split: str) -> Image.Image:
    """Change the colours of a cut-out: much in training, because the test style is unseen."""
    rgb = np.asarray(sprite.convert("RGB"), np.float32)
    if split == "train":  # saturation and channel gains in one matrix
        saturation = rng.uniform(0.6, 1.5)
        mix = np.full((3, 3), (1 - saturation) / 3) + saturation * np.eye(3)
        gain = rng.uniform(0.75, 1.2, 3) * rng.uniform(0.75, 1.2)
        rgb = rgb @ (mix * gain).astype(np.float32) + np.float32(rng.uniform(-25, 25))
        if rng.random() < 0.5:  # shading, the way a 3D render differs from flat art
            ramp = np.linspace(-1, 1, rgb.shape[0], dtype=np.float32) * np.float32(rng.uniform(-50, 50))
            rgb += ramp[:, None, None]
    else:
        rgb = rgb * np.float32(rng.uniform(0.9, 1.1))
    alpha = sprite.getchannel("A")
    sprite = Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8))
    sprite.putalpha(alpha)
    if split == "train" and rng.random() < 0.2:
        sprite = sprite.filter(ImageFilter.BoxBlur(1))
    return sprite


def fit(rng: np.random.Generator, sprite: Image.Image, size: int, split: str, flip: bool, turn: float) -> Image.Image:
    """Turn a cut-out by up to `turn` degrees, perhaps mirror it, and bring it to about `size` pixels."""
    if flip and rng.random() < 0.5:
        sprite = sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    stretch = 0.15 if split == "train" else 0.05
    shape = [max(8, round(size * f)) for f in rng.uniform(1 - stretch, 1 + stretch, 2)]
    return sprite.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR).resize(shape, Image.Resampling.BOX)


def draw_plate(rng: np.random.Generator, text: str, split: str, cell: int, advance: int) -> tuple[Image.Image, str]:
    """Draw a plate with `text` on it, one character every `advance` pixels; return it with the font's name."""
    fonts = load_bank(split)["glyphs"]
    font = str(rng.choice(sorted(fonts)))
    pad = 3
    plate = (pad * 2 + advance * len(text), round(cell * 0.80) + 4)
    light = tuple(int(c) for c in rng.integers(205, 256, 3))
    dark = tuple(int(c) for c in rng.integers(0, 70, 3))
    paper, ink = (light, dark) if rng.random() < 0.7 else (dark, light)
    out = Image.new("RGBA", plate, (*paper, 255))
    for i, char in enumerate(text):
        glyph = fonts[font][char].resize((cell, cell), Image.Resampling.BOX)
        out.paste(ink, (pad + i * advance + (advance - cell) // 2, (plate[1] - cell) // 2), glyph)
    return out, font


def draw_shape(rng: np.random.Generator, shape: str, colour: str, size: int, split: str) -> Image.Image:
    """Draw a shape in a colour, with a thin outline."""
    mask = fit(rng, load_bank(split)["shape"][shape], size, split, False, 12)
    rgb = np.clip(np.array(COLOURS[colour]) + rng.integers(-16, 17, 3), 0, 255)
    edge = 20 if rgb.mean() > 110 else 235  # thin outline, so that a shape never melts into its background
    inner = Image.new("L", mask.size)
    inner.paste(mask.resize((mask.width - 4, mask.height - 4), Image.Resampling.BOX), (2, 2))
    out = Image.new("RGBA", mask.size, (edge, edge, edge, 0))
    out.putalpha(mask)
    out.paste((*(int(c) for c in rgb), 255), (0, 0), inner)
    out.putalpha(mask)
    return out
