"""blind: no visual token at all, a baseline."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmslim.compressor import Compressed, Compressor, ImageTokens


@dataclass
class Blind(Compressor):
    """Drop every visual token before the language model, which then answers from the question alone.

    A task on which it scores as the unpatched model does tells nothing about what was kept of a picture. Text that
    stands around a picture in the prompt stays.

    positions : "renumbered" or "original" rotary positions
    """

    budget_options: ClassVar = ()
    may_keep_none: ClassVar = True

    positions: str = "renumbered"

    def requested(self, n: int) -> int:
        """Return 0."""
        return 0

    def compress(self, image: ImageTokens) -> Compressed:
        """Keep nothing."""
        return image.pick(torch.arange(0, device=image.features.device))
