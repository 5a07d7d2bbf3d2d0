"""random: keep a random subset of the visual tokens. A strong baseline that many published methods lose to."""

from dataclasses import dataclass

import torch

from vlmslim.compressor import Compressed, ImageTokens, Keep, Selector


@dataclass
class Random(Selector):
    """Keep a uniformly random subset of each image's tokens, in reading order.

    The draw depends on the seed and on the image's pixels. So an image keeps the same tokens in any batch and in any
    run, and different images keep different ones.

    keep      : visual tokens to keep per image, a count or a share
    seed      : seed of the draw
    positions : rotary positions: "auto", "original" or "renumbered"
    """

    reads_back = "the draw is seeded by a hash of the pixels"

    keep: Keep
    seed: int = 0

    def compress(self, image: ImageTokens) -> Compressed:
        """Draw k of n tokens."""
        n = len(image.features)
        index = torch.randperm(n, generator=image.generator(self.seed))[: self.budget(image)]
        return image.pick(index.sort().values.to(image.features.device))
