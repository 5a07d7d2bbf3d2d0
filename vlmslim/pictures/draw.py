"""Draw where visual tokens went: kept patches clear, dropped ones faded, merged ones outlined, scores as a heat map."""

import colorsys
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from vlmslim.pictures.canvas import GAP, MARK, Canvas
from vlmslim.pictures.trace import Cut, Trace

FADED = 40 / 255  # how much of a dropped patch's colour is left
VEIL = 200  # the grey that hides the rest of it; not white, because pages and snow are white
PART = 0.4  # the same, of the patch that has the smallest part in a merged token
PAPER = 255  # the grey of the sheet
MARGIN, HEADING, TITLE, CAPTION = 16, 24, 20, 16  # pixels between panels; sizes of the texts, on narrow panels


@dataclass
class Panel:
    """A picture with a title and a caption under it."""

    picture: Image.Image
    title: str
    caption: str = ""


def kept(trace: Trace, processor: Any, layer: int = -1, size: int = 320) -> Image.Image:
    """Draw the tokens of an image that decoder layer `layer` sees, by default the last one.

    Args:
        trace: `slim.receipt.last.traces[row][image]` of a model patched with `record="tokens"`.
        processor: of the checkpoint; it knows how the pixels were normalised.
        layer: negative layers count from the end.
        size: pixels of the longer side of a crop.

    Raises:
        ValueError: no such layer, a stage that does not say what it made its tokens of, or no processor.
    """
    return drawn(Canvas.of(trace, processor, size), trace.at(layer))


def panels(trace: Trace, processor: Any, size: int = 320) -> list[Panel]:
    """Draw an image as the model saw it, its tokens after each stage, and scores where a stage has them.

    Args:
        trace: as for `kept`, and so are the others.
        processor: of the checkpoint.
        size: pixels of the longer side of a crop.
    """
    canvas = Canvas.of(trace, processor, size)
    n, found = len(trace.grid), [Panel(Image.fromarray(canvas.pixels), f"{len(trace.grid)} visual tokens", "unpatched")]
    for cut in trace.cuts:
        if not cut.stage:
            continue
        if (rank := cut.rank) is not None:
            heat = _heat(canvas, rank)
            found.append(Panel(heat, f"{cut.stage}: order of scores", "dark is low, bright is high"))
        first, last = trace.layers(cut)
        layers = f"layer {first}" if first == last else f"layers {first} to {last}"
        caption = f"merged, {layers}" if cut.merged else layers
        caption += f", {cut.nowhere} hold no patch" if cut.nowhere else ""
        found.append(Panel(drawn(canvas, cut), f"{cut.stage}: {cut.count} of {n}", caption))
        if cut.made_of is not None:
            found.append(_parts(canvas, cut.stage, cut.made_of))
    return found


def sheet(lines: Sequence[Sequence[Panel]], heading: str = "", across: int = 5) -> Image.Image:
    """Put panels on one sheet. Each line begins anew on the left and holds at most `across` panels a row."""
    rows = [line[i : i + across] for line in lines for i in range(0, len(line), across)]
    columns = [max(row[i].picture.width for row in rows if i < len(row)) for i in range(max(map(len, rows)))]
    width, scale = sum(columns) + MARGIN * (len(columns) - 1), max(1.0, min(columns) / 480)  # wide panels, large texts
    large, title, caption = (ImageFont.load_default(scale * size) for size in (HEADING, TITLE, CAPTION))
    pictures: list[tuple[Image.Image, tuple[int, int]]] = []
    texts: list[tuple[tuple[int, int], str, str, Any]] = []

    def write(text: str, left: int, top: int, width: int, most: int, colour: str, font: Any) -> int:
        """Note the lines of a text, and return where the next one begins."""
        for line in _wrapped(text, font, width, most):
            texts.append(((left + width // 2, top), line, colour, font))
            top += round(1.25 * font.size)
        return top

    top = MARGIN
    if heading:
        top = write(heading, MARGIN, top, width, 3, "black", large) + MARGIN
    for row in rows:
        left, ends = MARGIN, []
        under = top + max(panel.picture.height for panel in row) + MARGIN // 2
        for panel, own in zip(row, columns, strict=False):
            pictures.append((panel.picture, (left + (own - panel.picture.width) // 2, top)))
            below = write(panel.title, left, under, own, 2, "black", title)
            ends.append(write(panel.caption, left, below, own, 3, "#555555", caption))
            left += own + MARGIN
        top = max(ends) + MARGIN
    whole = Image.new("RGB", (width + 2 * MARGIN, top), (PAPER,) * 3)
    pen = ImageDraw.Draw(whole)
    for picture, place in pictures:
        whole.paste(picture, place)
    for place, line, colour, font in texts:
        pen.text(place, line, colour, font, anchor="ma")
    return whole


def drawn(canvas: Canvas, cut: Cut) -> Image.Image:
    """Fade what `cut` dropped, and outline tokens that were made of several.

    Raises:
        ValueError: a stage did not say what it made its tokens of.
    """
    shown = np.append(cut.shown, [False, False])  # of -2 and -1
    clear = shown[canvas.token]
    pixels = np.where(clear[..., None], canvas.pixels, VEIL + FADED * (canvas.pixels.astype(np.float32) - VEIL))
    pixels[canvas.token < 0] = PAPER
    if cut.merged:
        assert cut.into is not None
        group = np.append(cut.into, [-1, -1])[canvas.token]
        several = np.append(np.bincount(cut.into[cut.into >= 0], minlength=cut.count) > 1, False)
        edge = _edges(group) & several[group]
        pixels[edge] = _colours(cut.count)[group[edge]]
    return Image.fromarray(pixels.round().astype(np.uint8))


def _parts(canvas: Canvas, stage: str, made_of: np.ndarray) -> Panel:
    """Draw each token made of several patches by itself: the clearer a patch, the more of it is in the token."""
    made = made_of[(made_of > 0).sum(1) > 1]
    across = math.ceil(math.sqrt(len(made)))
    height, width = (max(MARK, (side + GAP) // across - GAP) for side in canvas.token.shape)
    whole = Image.new(
        "RGB", (across * (width + GAP) - GAP, -(-len(made) // across) * (height + GAP) - GAP), (PAPER,) * 3
    )
    for i, share in enumerate(made):
        part = np.append(np.where(share > 0, PART + (1 - PART) * share / share.max(), FADED), [0, 0])[canvas.token]
        pixels = VEIL + part[..., None] * (canvas.pixels.astype(np.float32) - VEIL)
        pixels[canvas.token < 0] = PAPER
        small = Image.fromarray(pixels.round().astype(np.uint8)).resize((width, height), Image.Resampling.BOX)
        whole.paste(small, (i % across * (width + GAP), i // across * (height + GAP)))
    return Panel(whole, f"{stage}: parts", f"what each of {len(made)} merged tokens is made of")


def _edges(group: np.ndarray) -> np.ndarray:
    """Find the pixels (H, W) next to a pixel of another group, two pixels wide on each side of the border."""
    edge = np.zeros(group.shape, bool)
    for axis in (0, 1):
        for step in (-2, -1, 1, 2):
            other = np.roll(group, step, axis)
            np.moveaxis(other, axis, 0)[slice(None, step) if step > 0 else slice(step, None)] = -1
            edge |= other != group
    return edge


def _colours(count: int) -> np.ndarray:
    """Return colours (count, 3) of which neighbours differ, because each hue is a golden section after the last."""
    return np.array([colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.9, 0.9) for i in range(count)]).reshape(-1, 3) * 255


def _heat(canvas: Canvas, rank: np.ndarray) -> Image.Image:
    """Draw the order of scores (n,) over the picture; white where there is none."""
    part = np.append(rank, [np.nan, np.nan])[canvas.token]
    known = np.isfinite(part)
    grey = Image.fromarray(np.where(known, part * 255, 0).round().astype(np.uint8))
    colour = np.asarray(ImageOps.colorize(grey, black="#16105c", mid="#d3436e", white="#fcfdbf"), np.float32)
    mixed = 0.8 * colour + 0.2 * canvas.pixels.mean(-1, keepdims=True)
    return Image.fromarray(np.where(known[..., None], mixed, PAPER).round().astype(np.uint8))


def _wrapped(text: str, font: Any, width: int, most: int) -> list[str]:
    """Break a text into at most `most` lines of `width` pixels; the last one ends in dots where there is more."""
    lines: list[str] = []
    rest = "".join(letter if letter.isprintable() else " " for letter in text).strip()
    while rest and len(lines) < most:
        end = max(1, bisect_right(range(len(rest) + 1), width, key=lambda count: font.getlength(rest[:count])) - 1)
        if end < len(rest):
            end = max(rest.rfind(" ", 0, end + 1), rest.rfind(":", 0, end) + 1, rest.rfind("+", 0, end)) or end
        lines.append(rest[:end])
        rest = rest[end:].strip()
    if rest:
        lines[-1] = lines[-1][:-3] + "..."
    return lines
