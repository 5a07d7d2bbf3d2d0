"""The pixels that the model saw of an image, laid out on one canvas, and the visual token of each pixel."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlmslim.pictures.trace import Trace

GAP = 6  # pixels between crops
MARK = 8  # pixels along each side of the mark of a token without a place


@dataclass
class Canvas:
    """An image as the model saw it.

    pixels : (H, W, 3) uint8
    token  : (H, W) the image's token at each pixel; -1 where there is none, because the model cut the padding away;
             -2 between crops
    """

    pixels: np.ndarray
    token: np.ndarray

    @classmethod
    def of(cls, trace: Trace, processor: Any, size: int = 320) -> "Canvas":
        """Lay out an image: thumbnail and mosaic, crops or frames, and marks for tokens without a place.

        Args:
            trace: of the image.
            processor: of the checkpoint; it knows how the pixels were normalised.
            size: pixels of the longer side of a crop, or of a mosaic of tiles.

        Raises:
            ValueError: the processor does not say how the pixels were normalised.
        """
        pictures, cells = pictures_of(trace, processor), cells_of(trace)
        rows, columns = trace.tiles
        if columns:
            height, width = (part * n for part, n in zip(pictures.shape[1:3], trace.tiles, strict=True))
            mosaic = pictures[1:].reshape(rows, columns, *pictures.shape[1:]).swapaxes(1, 2).reshape(height, width, 3)
            parts = [
                _scaled(pictures[0], cells[0], size // 2),
                _scaled(mosaic, _mosaic_cells(cells[1:], trace), size),
            ]
            lines = [parts]
        else:
            across = 4 if trace.video else math.ceil(math.sqrt(len(pictures)))
            parts = [_scaled(picture, own, size) for picture, own in zip(pictures, cells, strict=True)]
            lines = [parts[i : i + across] for i in range(0, len(parts), across)]
        placeless = np.flatnonzero((trace.grid < 0).any(1))
        canvas = _stacked([_beside(line) for line in lines])
        return canvas if not len(placeless) else _stacked([canvas, _marks(placeless, canvas.token.shape[1])])


def pictures_of(trace: Trace, processor: Any) -> np.ndarray:
    """Undo the normalisation of an image's crops or frames: (c, h, w, 3) uint8.

    Raises:
        ValueError: the processor does not say how the pixels were normalised.
    """
    kinds = ("video_processor", "image_processor") if trace.video else ("image_processor",)
    how = next((part for kind in kinds if (part := getattr(processor, kind, None)) is not None), None)
    if how is None:
        raise ValueError(
            "a picture needs the checkpoint's processor, which knows how pixels were normalised; give "
            "slim.picture(processor), with AutoProcessor.from_pretrained(checkpoint)"
        )
    pixels = trace.views.numpy()
    if getattr(how, "do_normalize", True):
        mean, std = (np.asarray(x, np.float32).reshape(1, -1, 1, 1) for x in (how.image_mean, how.image_std))
        pixels = pixels * std + mean
    if getattr(how, "do_rescale", True):
        pixels = pixels * 255
    return pixels.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1)


def cells_of(trace: Trace) -> np.ndarray:
    """Return the token at each cell of each crop: (c, rows, columns), -1 where there is none."""
    cells = np.full((len(trace.views), *trace.cells), -1)
    placed = np.flatnonzero((trace.grid >= 0).all(1))
    cells[tuple(trace.grid[placed].T)] = placed
    return cells


def _mosaic_cells(cells: np.ndarray, trace: Trace) -> np.ndarray:
    """Join the cells of tiles (c - 1, r, c): (rows, columns).

    A model that shrinks large mosaics has fewer tokens than cells. The cells between them show the nearest token.
    """
    rows, columns = trace.tiles
    joined = cells.reshape(rows, columns, *cells.shape[1:]).swapaxes(1, 2)
    joined = joined.reshape(rows * cells.shape[1], columns * cells.shape[2])
    for axis in (0, 1):
        there = np.flatnonzero((joined >= 0).any(1 - axis))
        if len(there) > 1 and len(there) <= there[-1] - there[0]:
            reach = round((there[-1] - there[0]) / (len(there) - 1) / 2)
            span = np.arange(max(0, there[0] - reach), min(joined.shape[axis], there[-1] + reach + 1))
            nearest = there[np.abs(span[:, None] - there).argmin(1)]
            filled = np.full_like(joined, -1)
            np.moveaxis(filled, axis, 0)[span] = np.moveaxis(joined, axis, 0)[nearest]
            joined = filled
    return joined


def _scaled(picture: np.ndarray, cells: np.ndarray, size: int) -> Canvas:
    """Scale a crop so that every cell has whole pixels, and its longer side about `size`."""
    height, width = picture.shape[:2]
    scale = size / max(height, width)
    tall, wide = (max(1, round(side * scale / n)) for side, n in zip((height, width), cells.shape, strict=True))
    rows, columns = cells.shape
    whole = Image.fromarray(picture).resize((wide * columns, tall * rows), Image.Resampling.LANCZOS)
    return Canvas(np.asarray(whole), cells.repeat(tall, 0).repeat(wide, 1))


def _marks(tokens: np.ndarray, width: int) -> Canvas:
    """Draw a grey square for each of the tokens (m,) without a place, in lines of at most `width` pixels."""
    across = max(1, width // MARK)
    cells = np.full(-(-len(tokens) // across) * across, -2)
    cells[: len(tokens)] = tokens
    token = cells.reshape(-1, across).repeat(MARK, 0).repeat(MARK, 1)
    inside = np.arange(token.shape[0])[:, None] % MARK * (np.arange(token.shape[1]) % MARK) > 0  # a pixel between two
    token = np.where(inside, token, -2)
    return Canvas(np.where(token[..., None] < 0, 255, 90).astype(np.uint8).repeat(3, 2), token)


def _blank(height: int, width: int) -> Canvas:
    return Canvas(np.full((height, width, 3), 255, np.uint8), np.full((height, width), -2))


def _beside(parts: list[Canvas]) -> Canvas:
    """Put canvases beside one another, with gaps."""
    turned = [Canvas(part.pixels.swapaxes(0, 1), part.token.T) for part in parts]
    whole = _stacked(turned)
    return Canvas(whole.pixels.swapaxes(0, 1), whole.token.T)


def _stacked(parts: list[Canvas]) -> Canvas:
    """Put canvases below one another, with gaps; narrower ones stand on the left."""
    width = max(part.token.shape[1] for part in parts)
    pieces: list[Canvas] = []
    for part in parts:
        height, own = part.token.shape
        whole = _blank(height, width)
        whole.pixels[:, :own], whole.token[:, :own] = part.pixels, part.token
        pieces += [_blank(GAP, width), whole]
    pieces = pieces[1:]
    return Canvas(np.concatenate([p.pixels for p in pieces]), np.concatenate([p.token for p in pieces]))
