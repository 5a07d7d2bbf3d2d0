"""The way of an image's visual tokens through the layers: all that a picture of kept tokens shows."""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass
class Cut:
    """The visual tokens of an image that some consecutive decoder layers see.

    first   : the first of these layers
    stage   : the name of the stage that acted before it; "" where none did
    count   : how many tokens these layers see
    into    : (n,) the one of these tokens into which each of the image's own n tokens went, -1 for none; None if a
              stage did not say what it made its tokens of
    score   : (n,) by which the stage ranked, NaN at tokens that it did not see; None if it did not say
    made_of : (count, n) how much of each of the image's tokens is in each of these, where these share them. `into` then
              has the one of which the token makes up the largest share. None where nothing is shared
    """

    first: int
    stage: str
    count: int
    into: np.ndarray | None
    score: np.ndarray | None = None
    made_of: np.ndarray | None = None

    @property
    def shown(self) -> np.ndarray:
        """(n,) bool, True at the image's tokens that these layers see, by themselves or merged.

        Raises:
            ValueError: a stage did not say what it made its tokens of.
        """
        if self.into is None:
            raise ValueError(
                f"{self.stage} does not say which patches it made its tokens of, so no picture can show them; "
                "return Compressed with `into` or `made_of` from its `compress`, or draw a method that selects"
            )
        return self.into >= 0

    @property
    def rank(self) -> np.ndarray | None:
        """(n,) place of each token in the order of scores, from 0 (lowest) to 1 (highest), NaN where there is none.

        Pictures show it, because one score is often so high that all others would look alike. None without `score`.
        """
        if self.score is None:
            return None
        finite, rank = np.isfinite(self.score), np.full(len(self.score), np.nan)
        found, place = np.unique(self.score[finite], return_inverse=True)
        rank[finite] = place / max(1, len(found) - 1)
        return rank

    @property
    def nowhere(self) -> int:
        """Number of these tokens that hold no patch, such as a CLS token: no picture can show them."""
        if self.made_of is not None:
            return int((self.made_of.sum(1) == 0).sum())
        return 0 if self.into is None else self.count - len(np.unique(self.into[self.into >= 0]))

    @property
    def merged(self) -> bool:
        """True if some token was made of several."""
        return self.into is not None and int((self.into >= 0).sum()) > self.count


@dataclass
class Trace:
    """One image of a prefill, and where its n visual tokens went.

    views : (c, 3, h, w) its crops or frames, normalised as the vision tower read them
    grid  : (n, 3) crop, row and column of every token; -1 where it has no place, such as newlines
    cells : rows and columns of tokens of one crop
    tiles : rows and columns of tiles in the anyres mosaic; (0, 0) without one
    video : True if the crops are the frames of a video
    depth : number of decoder layers
    cuts  : what runs of decoder layers see, in order; the first begins at layer 0
    """

    views: Tensor
    grid: np.ndarray
    cells: tuple[int, int]
    tiles: tuple[int, int]
    video: bool
    depth: int
    cuts: list[Cut]

    def at(self, layer: int) -> Cut:
        """Return what decoder layer `layer` sees; negative layers count from the end.

        Raises:
            ValueError: there is no such layer.
        """
        if not -self.depth <= layer < self.depth:
            raise ValueError(f"layer={layer}: the language model has {self.depth} decoder layers")
        return next(cut for cut in reversed(self.cuts) if cut.first <= layer % self.depth)

    def layers(self, cut: Cut) -> tuple[int, int]:
        """Return the first and the last decoder layer of a cut."""
        after = [other.first for other in self.cuts if other.first > cut.first]
        return cut.first, min(after, default=self.depth) - 1
