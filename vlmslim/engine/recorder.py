"""The way of each token through a forward, kept for pictures if the patch was asked to record tokens."""

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from vlmslim.compressor import Compressed, ImageTokens, LayerInput
from vlmslim.engine.layout import Layout
from vlmslim.engine.stages import Stage
from vlmslim.pictures.trace import Cut, Trace


class Recorder:
    """Keeps, during one forward, what each stage sent and by which scores it ranked.

    sent   : of each prompt and image, its places in the prompt (n,), and what the stage before the language model sent
    scores : decoder layer -> the scores (B, S) by which a stage ranked before it
    joins  : decoder layer -> the places (B, S) of the tokens into which a stage before it merged each token
    """

    def __init__(self) -> None:
        self.sent: list[list[tuple[np.ndarray, Compressed | None]]] = []
        self.scores: dict[int, Tensor] = {}
        self.joins: dict[int, Tensor] = {}

    def note(self, layer: int, tokens: LayerInput) -> None:
        """Keep what the stage before a decoder layer said of the tokens that it saw."""
        if tokens.score is not None:
            self.scores[layer] = tokens.score
        if tokens.into is not None:
            self.joins[layer] = tokens.into()

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
        slots, into, made_of = _entered(entrance, sent, len(columns))
        score = None if image.score is None else _host(image.score)
        cuts = [Cut(0, entrance, len(slots), into, score, made_of)]
        between = {layer: stage.name for stage in stages for layer in stage.layers}
        before = layouts[0]
        for first in sorted(layouts.keys() & between.keys()):
            score = self._score(first, row, number, before, columns, slots, into)
            if into is not None and first in self.joins:
                moved = self._joined(first, row, number, before, columns, slots)
                into = moved[into]
                if made_of is not None:
                    made_of = _summed(made_of, moved[:-1])
            before = layouts[first]
            left = _tokens(before, row, number, columns, slots)
            parts = None if made_of is None else made_of[left]
            own = None if into is None else _renumbered(into, left) if parts is None else largest_share(parts)
            cuts.append(Cut(first, between[first], len(left), own, score, parts))
        return cuts

    def _score(
        self,
        layer: int,
        row: int,
        number: int,
        before: Layout,
        columns: np.ndarray,
        slots: np.ndarray,
        into: np.ndarray | None,
    ) -> np.ndarray | None:
        """Spread the scores of a stage, which saw the tokens `before`, over the image's own tokens: (n,)."""
        if layer not in self.scores or into is None:
            return None
        (place,) = (before.image[row] == number + 1).cpu().numpy().nonzero()
        each = np.full(len(slots) + 1, np.nan, np.float32)  # the last entry is for tokens that went nowhere
        each[_tokens(before, row, number, columns, slots)] = _host(self.scores[layer])[row, place]
        return each[into]

    def _joined(
        self, layer: int, row: int, number: int, before: Layout, columns: np.ndarray, slots: np.ndarray
    ) -> np.ndarray:
        """Return the token into which each of the k that entered went before a layer: (k + 1,), with -1 at the end."""
        (place,) = (before.image[row] == number + 1).cpu().numpy().nonzero()
        there = _tokens(before, row, number, columns, slots)
        token = np.full(before.image.shape[1], -1)  # at each place
        token[place] = there
        target = token[self.joins[layer][row].cpu().numpy()[place]]
        moved = np.append(np.arange(len(slots)), -1)
        moved[there] = np.where(target < 0, there, target)
        return moved


def _summed(made_of: np.ndarray, moved: np.ndarray) -> np.ndarray:
    """Add up what tokens are made of (k, n) where they went into one another (k,)."""
    summed = np.zeros_like(made_of)
    np.add.at(summed, moved, made_of)
    return summed


def _entered(stage: str, sent: Compressed | None, n: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Return the slots (k,) of the tokens that entered of an image of n, ascending; `Cut.into`; `Cut.made_of`.

    Raises:
        ValueError: `Compressed.into` or `Compressed.made_of` is not what it has to be.
    """
    if sent is None:
        return np.arange(n), np.arange(n), None
    k = len(sent)
    index = np.arange(k) if sent.index is None else sent.index.cpu().numpy()
    if sent.made_of is not None:
        made_of = sent.made_of().float().cpu().numpy()
        if made_of.shape != (k, n) or not np.isfinite(made_of).all() or (made_of < 0).any():
            raise ValueError(
                f"{stage} returned Compressed.made_of of shape {made_of.shape}: return ({k}, {n}), how much of each of "
                f"the image's {n} tokens is in each of the {k} tokens sent, from 0 on"
            )
        shared = ((made_of > 0).sum(0) > 1).any()
        return np.sort(index), largest_share(made_of), made_of if shared else None
    if sent.into is not None:
        into = sent.into().cpu().numpy()
        if into.shape != (n,) or not np.isin(into, np.arange(-1, k)).all():
            raise ValueError(
                f"{stage} returned Compressed.into of shape {into.shape}: return ({n},), for each token of the image "
                f"which of the {k} tokens sent it went into, 0 to {k - 1}, or -1"
            )
        return np.sort(index), into, None
    if sent.index is None:
        return index, None, None
    into = np.full(n, -1)
    into[index] = np.arange(k)
    return np.sort(index), into, None


def largest_share(made_of: np.ndarray) -> np.ndarray:
    """Find, for each of an image's n tokens, in which of k made tokens its share is largest: (k, n) -> (n,).

    The lower number on ties; -1 for a token that is in none of them.
    """
    total = made_of.astype(float).sum(1, keepdims=True)
    share = made_of / np.where(total, total, 1)
    return np.where((made_of > 0).any(0), share.argmax(0), -1)


def _tokens(layout: Layout, row: int, number: int, columns: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Return the numbers of the tokens that a layout still holds, among those that entered of an image."""
    origin = layout.origin[row, layout.image[row] == number + 1].cpu().numpy()
    return np.searchsorted(slots, np.searchsorted(columns, origin))


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
