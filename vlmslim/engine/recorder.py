"""What a forward keeps for pictures, if the patch was asked to record tokens."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vlmslim.compressor import Compressed, ImageTokens
from vlmslim.engine.layout import Layout
from vlmslim.engine.stages import Stage
from vlmslim.pictures.trace import Cut, Trace


class Recorder:
    """Keeps, during one forward, what each stage sent and by which scores it ranked.

    sent   : of each prompt and image, its places in the prompt (n,), and what the stage before the language model sent
    scores : decoder layer -> the scores (B, S) by which a stage ranked before it
    """

    def __init__(self) -> None:
        self.sent: list[list[tuple[np.ndarray, Compressed | None]]] = []
        self.scores: dict[int, Tensor] = {}

    def traces(
        self, images: list[list[ImageTokens]], layouts: dict[int, Layout], stages: Sequence[Stage], depth: int
    ) -> list[list[Trace]]:
        """Return where the tokens of each image went, prompt by prompt.

        Args:
            images: of each prompt.
            layouts: the first layer of each run of decoder layers, and the tokens that the run sees.
            stages: of the patch.
            depth: number of decoder layers.
        """
        return [
            [_trace(image, depth, self._cuts(row, number, image, layouts, stages)) for number, image in enumerate(own)]
            for row, own in enumerate(images)
        ]

    def _cuts(
        self, row: int, number: int, image: ImageTokens, layouts: dict[int, Layout], stages: Sequence[Stage]
    ) -> list[Cut]:
        """Follow the tokens of one image of a prompt through the runs of decoder layers."""
        columns, sent = self.sent[row][number]
        entrance = next((stage.name for stage in stages if stage.acts_before_llm), "")
        seats, into = _entered(entrance, sent, len(columns))
        cuts = [Cut(0, entrance, len(seats), into, None if image.score is None else _host(image.score))]
        between = {layer: stage.name for stage in stages for layer in stage.layers}
        before = layouts[0]
        for first in sorted(layouts.keys() & between.keys()):
            score = self._score(first, row, number, before, columns, seats, into)
            before = layouts[first]
            left = _tokens(before, row, number, columns, seats)
            cuts.append(Cut(first, between[first], len(left), None if into is None else _renumbered(into, left), score))
        return cuts

    def _score(
        self,
        layer: int,
        row: int,
        number: int,
        before: Layout,
        columns: np.ndarray,
        seats: np.ndarray,
        into: np.ndarray | None,
    ) -> np.ndarray | None:
        """Spread the scores of a stage, which saw the tokens `before`, over the image's own tokens: (n,)."""
        if layer not in self.scores or into is None:
            return None
        (place,) = (before.image[row] == number + 1).cpu().numpy().nonzero()
        each = np.full(len(seats) + 1, np.nan, np.float32)  # the last entry is for tokens that went nowhere
        each[_tokens(before, row, number, columns, seats)] = _host(self.scores[layer])[row, place]
        return each[into]


def _entered(stage: str, sent: Compressed | None, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Return the seats (k,) that the tokens of an image take among its n, ascending, and `Cut.into`.

    Raises:
        ValueError: `Compressed.into` is not what it has to be.
    """
    if sent is None:
        return np.arange(n), np.arange(n)
    k = len(sent)
    index = np.arange(k) if sent.index is None else sent.index.cpu().numpy()
    if sent.into is not None:
        into = sent.into().cpu().numpy()
        if into.shape != (n,) or not np.isin(into, np.arange(-1, k)).all():
            raise ValueError(
                f"{stage} returned Compressed.into of shape {into.shape}: return ({n},), for each token of the image "
                f"which of the {k} tokens sent it went into, 0 to {k - 1}, or -1"
            )
        return np.sort(index), into
    if sent.index is None:
        return index, None
    into = np.full(n, -1)
    into[index] = np.arange(k)
    return np.sort(index), into


def _tokens(layout: Layout, row: int, number: int, columns: np.ndarray, seats: np.ndarray) -> np.ndarray:
    """Return which of the tokens that entered, by number, a layout holds of an image."""
    origin = layout.origin[row, layout.image[row] == number + 1].cpu().numpy()
    return np.searchsorted(seats, np.searchsorted(columns, origin))


def _renumbered(into: np.ndarray, left: np.ndarray) -> np.ndarray:
    """Give the tokens that are `left` (k',) new numbers in `into` (n,); those that are gone become -1."""
    number = np.full(max(into.max(initial=-1), left.max(initial=-1)) + 2, -1)  # the last entry is for -1
    number[left] = np.arange(len(left))
    return number[into]


def _host(score: Tensor) -> np.ndarray:
    return score.detach().float().cpu().numpy()


def _trace(image: ImageTokens, depth: int, cuts: list[Cut]) -> Trace:
    grid = image.grid_on_host
    rows, columns = (side // image.merge for side in image.patches)
    if not rows:  # frames, which the model pools after the tower
        rows = columns = int(grid[:, 1:].max()) + 1
    return Trace(image.views.detach().float().cpu(), grid, (rows, columns), image.tiles, image.video, depth, cuts)
