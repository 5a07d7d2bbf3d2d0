"""Score maps: the attention that each visual token receives, laid out on the patch grid of its image.

All images of a batch have the same layout (B, I, n): up to I images a row, of n patches each. Images that a row lacks,
and patches whose token was pruned, are not `alive`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmslim.compressor import LayerInput
from vlmslim.ops.attention import attention_rows


@dataclass
class Maps:
    """The scores of a batch's images on their grids, and the way from the sequence to the grids and back.

    place      : (B, S)     place of each token in (I + 1) grids of n, the first of which is for text and padding
    alive      : (B, I, n)  bool, True at patches whose token is still there
    real       : (B, I)     bool, True at images that exist
    from_image : (B, I, n)  mean attention received from the visual tokens of the same image
    from_text  : (B, I, n)  mean attention received from the text after the token
    """

    place: Tensor
    alive: Tensor
    real: Tensor
    from_image: Tensor
    from_text: Tensor

    @classmethod
    def of(cls, tokens: LayerInput, side: int, normalised: bool, visible: bool) -> "Maps":
        """Measure the attention of the layer that has just run.

        Args:
            tokens: what enters the next layer.
            side: of the patch grid.
            normalised: apply min-max normalisation to the maps.
            visible: divide attention from the image by the visual tokens that may look at a token, not by all of them.

        Raises:
            ValueError: an image is not a grid of side x side patches, or tokens were merged before.
        """
        n, visual = side * side, tokens.image > 0
        other = {len(image.features) for row in tokens.images for image in row} - {n}
        if other:
            raise ValueError(
                f"atp needs images of {n} visual tokens, and one here has {other.pop()}; use another method"
            )
        if (visual & (tokens.slot < 0)).any():
            raise ValueError(
                "atp needs the patch of each visual token, and a method before the language model merged some without "
                "telling their slots; put one there that selects, such as divprune"
            )
        held = torch.tensor([len(row) for row in tokens.entered], device=visual.device)
        real = torch.arange(int(held.max()), device=visual.device) < held[:, None]
        place = torch.where(visual, tokens.image * n + tokens.slot, 0)
        present = visual if tokens.weight is None else visual & (tokens.weight > 0.5)
        alive = scatter_to_grids(present, place, real.shape[1], n)

        text = tokens.mask & ~visual & (visual.cumsum(1) > 0)
        from_image, from_text = attention_from_image_and_text(tokens.attention, tokens.image * present, text)
        texts_after = text.flip(1).cumsum(1).flip(1)
        patches_after = alive.flip(-1).cumsum(-1).flip(-1)  # those that a causal model lets see a patch, itself too
        queries = patches_after if visible else alive.sum(-1, keepdim=True)
        from_image = scatter_to_grids(from_image, place, real.shape[1], n) / queries.clamp(min=1)
        from_text = scatter_to_grids(from_text / texts_after.clamp(min=1), place, real.shape[1], n)
        if normalised:
            from_image, from_text = normalise(from_image, alive), normalise(from_text, alive)
        return cls(place, alive, real, from_image, from_text)

    def to_grid(self, x: Tensor) -> Tensor:
        """Lay values of tokens out on the grids: (B, S) -> (B, I, n), 0 where there is no token."""
        return scatter_to_grids(x, self.place, *self.alive.shape[1:])

    def from_grid(self, grids: Tensor) -> Tensor:
        """Read the grids at the tokens: (B, I, n) -> (B, S), 0 at text and padding."""
        return torch.cat([torch.zeros_like(grids[:, :1]), grids], dim=1).flatten(1).gather(1, self.place)


def redundancy(from_image: Tensor, from_text: Tensor, score: str, balance: Tensor | None = None) -> Tensor:
    """Combine the two score maps into the one by which tokens are kept.

    Args:
        from_image: (..., n) attention received from the image, divided as the score asks.
        from_text: (..., n) attention received from text.
        score: "literal" and "visible" take the mean of both, "text" the second alone, "learned" a convex mix.
        balance: (2,) of "learned", logits of the weights of image and text.

    Returns:
        (..., n).
    """
    if score == "text":
        return from_text
    if balance is None:
        return (from_image + from_text) / 2
    image, text = balance.softmax(0)
    return image * from_image + text * from_text


def scatter_to_grids(x: Tensor, place: Tensor, images: int, n: int) -> Tensor:
    """Lay values of tokens (B, S) out by `Maps.place`: (B, images, n), 0 where there is no token."""
    grids = x.new_zeros(len(x), (images + 1) * n).scatter(1, place, x)
    return grids.unflatten(1, (-1, n))[:, 1:]


def attention_from_image_and_text(
    attend: Callable[[Tensor], Tensor], image: Tensor, text: Tensor, chunk: int = 128
) -> tuple[Tensor, Tensor]:
    """Sum the attention that each visual token receives, averaged over heads.

    Args:
        attend: softmax attention of query rows: (B, q) -> (B, heads, q, S), such as `LayerInput.attention`.
        image: (B, S) long, i at the tokens of the row's i-th image, 0 elsewhere.
        text: (B, S) bool, the text queries.
        chunk: query rows computed at a time.

    Returns:
        From the visual tokens of the same image, and from text: (B, S) fp32 each.
    """
    from_image = from_text = torch.zeros(image.shape, device=image.device)
    for rows, paid in attention_rows(attend, (image > 0) | text, chunk):  # (B, q), (B, q, S)
        asking = image.gather(1, rows)[..., None]
        from_image = from_image + (paid * ((asking == image[:, None]) & (asking > 0))).sum(1)
        from_text = from_text + (paid * text.gather(1, rows)[..., None]).sum(1)
    return from_image * (image > 0), from_text * (image > 0)


def normalise(score: Tensor, alive: Tensor) -> Tensor:
    """Scale the alive tokens of each image to [0, 1] by min and max: (..., n); 0 at others, and if all are equal."""
    low = score.masked_fill(~alive, float("inf")).amin(-1, keepdim=True)
    high = score.masked_fill(~alive, float("-inf")).amax(-1, keepdim=True)
    none = ~alive.any(-1, keepdim=True)
    low, high = low.masked_fill(none, 0), high.masked_fill(none, 0)
    return torch.where(alive, (score - low) / (high - low + 1e-9), 0)
