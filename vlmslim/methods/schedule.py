"""schedule: token counts for each of several decoder layers; the control for methods that spread tokens over depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import (
    Compressor,
    Keep,
    LayerInput,
    check_choices,
    check_keep,
    check_layer,
    resolve_keep,
    resolve_layer,
)


@dataclass
class Schedule(Compressor):
    """Before each of several decoder layers, keep a given number of visual tokens.

    A method that decides how many tokens each layer sees has two merits, how many and which. Give its own counts to
    this one to tell them apart: what it gains over the `schedule` is owed to its choice of tokens. Kept tokens keep
    their rotary positions; text always stays.

    layer  : decoder layers, ascending: numbers from 1, or shares of the depth, rounded down
    counts : for each of them, visual tokens to keep per image from there on, counts or shares, not ascending
    by     : "attention" that the last prompt token pays in the layer before, as `fastv`; or "random", fixed by seed and
             pixels, each layer's tokens among those of the layer before
    seed   : of "random"
    """

    budget_options: ClassVar[tuple[str, ...]] = ()

    layer: Sequence[int | float] = (0.25, 0.5, 0.75)
    counts: Sequence[Keep] = (0.5, 0.25, 0.125)
    by: str = "attention"
    seed: int = 0

    def __post_init__(self):
        self.layer, self.counts = tuple(self.layer), tuple(self.counts)
        check_choices(self, by=("attention", "random"))
        if not self.layer or len(self.layer) != len(self.counts):
            raise ValueError(f"layer={self.layer} and counts={self.counts}: give one count for each layer")
        for layer, count in zip(self.layer, self.counts, strict=True):
            check_layer(layer)
            check_keep(count, "counts")
        for a, b in zip(self.counts, self.counts[1:], strict=False):
            if type(a) is type(b) and a < b:
                raise ValueError(f"counts={self.counts}: a later layer cannot see more tokens than an earlier one")

    @property
    def layers(self) -> tuple[int | float, ...]:
        """The layers before which tokens are dropped."""
        return self.layer

    def setup(self, model: torch.nn.Module) -> None:
        """Turn shares of the depth into layers."""
        depth = len(model.model.language_model.layers)
        self.layer = tuple(resolve_layer(layer, depth) for layer in self.layer)
        if list(self.layer) != sorted(set(self.layer)):
            raise ValueError(f"layer={self.layer}: in a decoder of {depth} layers these do not ascend; give others")

    def requested(self, n: int) -> int:
        """What the last layer sees."""
        return min(resolve_keep(count, n) for count in self.counts)

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """A staircase."""
        seen = [n] * depth
        for layer, count in zip(self.layer, self.counts, strict=True):
            at = resolve_layer(layer, depth)
            seen[at:] = [min(seen[at], resolve_keep(count, n))] * (depth - at)
        return seen

    def retain(self, tokens: LayerInput) -> Tensor:
        """Keep the count of this layer."""
        score = self._drawn(tokens) if self.by == "random" else tokens.attention(tokens.last[:, None]).mean(1)[:, 0]
        return tokens.top(score, self.counts[self.layer.index(tokens.layer)])

    def _drawn(self, tokens: LayerInput) -> Tensor:
        """A random number for each visual token, (B, S), the same at every layer."""
        score = torch.zeros(tokens.image.shape, device=tokens.image.device)
        for row, images in enumerate(tokens.images):
            for number, image in enumerate(images, 1):
                drawn = torch.rand(len(image.features), generator=image.generator(self.seed)).to(score.device)
                here = tokens.image[row] == number
                place = tokens.slot[row][here]
                if (place < 0).any():
                    raise ValueError("by='random' draws among an image's own tokens, and a method before merged them")
                score[row, here] = drawn[place]
        return score
