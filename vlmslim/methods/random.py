"""random: keep a random subset of the visual tokens. A strong baseline that many published methods lose to."""

from dataclasses import dataclass

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

    keep: Keep
    seed: int = 0

    def compress(self, image: ImageTokens) -> Compressed:
        """Draw k of n tokens."""
        n = len(image.features)
        order = image.uniform(self.seed, n).argsort(stable=True)
        return image.pick(order[: self.budget(image)].sort().values)
