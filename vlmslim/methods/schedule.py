"""schedule: given token counts, layer by layer; the control for methods that spread tokens over the depth."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import LayerInput, check_choices, check_keep, resolve_keep
from vlmslim.methods._layers import LayerDrops, check_layers


@dataclass
class Schedule(LayerDrops):
    """Before each of several decoder layers, keep a given number of visual tokens per image.

    A method that decides how many tokens each layer sees has two effects: how many tokens stay, and which. Give its
    counts to `schedule` to separate the two: the difference between the method and `schedule` is due to the choice of
    tokens. Kept tokens keep their rotary positions, and text always stays.

    layer  : decoder layers, ascending: numbers from 1, or shares of the depth, rounded down
    counts : for each of these layers, visual tokens to keep per image from there on, counts or shares, not ascending
    by     : "attention" keeps the tokens that the last prompt token attends to most in the layer before, as `fastv`
             does; "random" draws tokens by seed and pixels, at each layer from those that are left. A token has the
             same number at every layer, unless a method made it without saying which slot it takes
    seed   : seed of the random draw
    """

    budget_options: ClassVar = ()

    layer: Sequence[int | float] = (0.25, 0.5, 0.75)
    counts: Sequence[int | float] = (0.5, 0.25, 0.125)
    by: str = "attention"
    seed: int = 0

    def __post_init__(self) -> None:
        self.layer, self.counts = tuple(self.layer), tuple(self.counts)
        check_choices(self, by=("attention", "random"))
        check_layers(self.layer, self.counts, "counts")
        for count in self.counts:
            check_keep(count, "counts")
        for a, b in zip(self.counts, self.counts[1:], strict=False):
            if type(a) is type(b) and a < b:
                raise ValueError(f"counts={self.counts}: a later layer cannot see more tokens than an earlier one")
        self.layers = self.layer

    def after(self, n: int, there: int, drop: int) -> int:
        """Return the count of this layer."""
        return min(there, resolve_keep(self.counts[drop], n))

    def retain(self, tokens: LayerInput) -> Tensor:
        """Keep the count of this layer."""
        score = self._drawn(tokens) if self.by == "random" else tokens.attention(tokens.last[:, None]).mean(1)[:, 0]
        return tokens.top(score, self.counts[self.layers.index(tokens.layer)])

    def _drawn(self, tokens: LayerInput) -> Tensor:
        """Draw a random number for each visual token, (B, S)."""
        score = torch.zeros(tokens.image.shape, device=tokens.image.device)
        for row, images in enumerate(tokens.images):
            for number, image in enumerate(images, 1):
                drawn = image.uniform(self.seed, len(image.features)).to(score)
                here = tokens.image[row] == number
                slot = torch.where(tokens.slot[row] < 0, here.cumsum(0) - 1, tokens.slot[row])
                score[row] = torch.where(here, drawn[slot.clamp(0, len(drawn) - 1)], score[row])
        return score
