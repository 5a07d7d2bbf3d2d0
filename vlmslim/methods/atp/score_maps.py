"""Score maps: what attention says about each visual token, laid out on the patch grid of its image.

All images of a batch are laid out alike: (B, I, n), for up to I images a row, of n patches each. What a row lacks, and
what has been pruned, is not `alive` there.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmslim.compressor import LayerInput


def received_attention(
    attend: Callable[[Tensor], Tensor], image: Tensor, text: Tensor, chunk: int = 128
) -> tuple[Tensor, Tensor]:
    """Attention that each visual token receives, mean over heads and sum over queries.

    Args:
        attend: softmax attention of query rows (B, q) -> (B, heads, q, S), such as `LayerInput.attention`.
        image: (B, S) long, i at the tokens of the row's i-th image, 0 elsewhere.
        text: (B, S) bool, the text queries.
        chunk: query rows computed at a time; memory is B x heads x chunk x S.

    Returns:
        from the visual tokens of the same image, and from text: (B, S) fp32 each.
    """
    query = (image > 0) | text
    rows = query.byte().argsort(dim=1, descending=True, stable=True)[:, : int(query.sum(1).max())]
    from_image = from_text = torch.zeros(image.shape, device=image.device)
    for part in rows.split(chunk, dim=1):
        paid = attend(part).float().mean(1)  # (B, q, S)
        asking = image.gather(1, part)[..., None]
        from_image = from_image + (paid * ((asking == image[:, None]) & (asking > 0))).sum(1)
        from_text = from_text + (paid * text.gather(1, part)[..., None]).sum(1)
    return from_image * (image > 0), from_text * (image > 0)


def normalise(score: Tensor, alive: Tensor) -> Tensor:
    """Min-max to [0, 1] over the alive tokens of each image, (..., n); 0 at the others, and where all are equal."""
    low = score.masked_fill(~alive, float("inf")).amin(-1, keepdim=True)
    high = score.masked_fill(~alive, float("-inf")).amax(-1, keepdim=True)
    none = ~alive.any(-1, keepdim=True)
    low, high = low.masked_fill(none, 0), high.masked_fill(none, 0)
    return torch.where(alive, (score - low) / (high - low + 1e-9), 0)


@dataclass
class Maps:
    """The scores of a batch's images on their grids, and the way from the sequence to the grids and back.

    place      : (B, S)     where each token lies in (I + 1) grids of n, the first of which is for text and padding
    alive      : (B, I, n)  patches whose token is still there
    real       : (B, I)     images that exist
    from_image : (B, I, n)  mean attention received from the visual tokens of the same image
    from_text  : (B, I, n)  mean attention received from the text behind
    """

    place: Tensor
    alive: Tensor
    real: Tensor
    from_image: Tensor
    from_text: Tensor

    @classmethod
    def of(cls, tokens: LayerInput, side: int, normalised: bool, mean: str) -> "Maps":
        """Measure the attention of the layer just run.

        Args:
            tokens: what enters the next layer.
            side: of the patch grid.
            normalised: min-max normalise the maps.
            mean: divide by "all" visual tokens, or by the "visible", those that may look at a token.

        Raises:
            ValueError: an image is not a grid of side x side patches, or tokens were merged on the way.
        """
        n, visual = side * side, tokens.image > 0
        odd = {len(image.features) for row in tokens.images for image in row} - {n}
        if odd:
            raise ValueError(f"images have {n} visual tokens in this model, and here is one of {odd.pop()}")
        if (visual & (tokens.slot < 0)).any():
            raise ValueError(
                "the patch of each visual token is needed, and a method before the language model merged some without "
                "saying where they stand; put one there that selects, such as divprune"
            )
        held = [len(row) for row in tokens.entered]
        real = torch.arange(max(held), device=visual.device) < torch.tensor(held, device=visual.device)[:, None]
        maps = cls(torch.where(visual, tokens.image * n + tokens.slot, 0), None, real, None, None)
        maps.alive = torch.zeros(*real.shape, n, dtype=torch.bool, device=visual.device)
        there = visual if tokens.weight is None else visual & (tokens.weight > 0.5)
        maps.alive = maps.lay(there)
        text = tokens.mask & ~visual & (visual.cumsum(1) > 0)
        behind = text.flip(1).cumsum(1).flip(1).clamp(min=1)
        from_image, from_text = received_attention(tokens.attention, tokens.image * there, text)
        alive = maps.alive
        queries = alive.flip(-1).cumsum(-1).flip(-1) if mean == "visible" else alive.sum(-1, keepdim=True)
        maps.from_image, maps.from_text = maps.lay(from_image) / queries.clamp(min=1), maps.lay(from_text / behind)
        if normalised:
            maps.from_image, maps.from_text = normalise(maps.from_image, alive), normalise(maps.from_text, alive)
        return maps

    @property
    def redundancy(self) -> Tensor:
        """(B, I, n) mean of both scores."""
        return (self.from_image + self.from_text) / 2

    def lay(self, x: Tensor) -> Tensor:
        """Values of tokens on the grids: (B, S) -> (B, I, n), 0 where no token is."""
        images, n = self.alive.shape[1:]
        return x.new_zeros(len(x), (images + 1) * n).scatter(1, self.place, x).unflatten(1, (-1, n))[:, 1:]

    def read(self, grids: Tensor) -> Tensor:
        """Values of the grids at the tokens: (B, I, n) -> (B, S), those of no token at text and padding being 0."""
        return torch.cat([torch.zeros_like(grids[:, :1]), grids], dim=1).flatten(1).gather(1, self.place)
