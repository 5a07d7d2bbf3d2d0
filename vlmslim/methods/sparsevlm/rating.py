"""SparseVLM's raters: the words that a picture may show, and what they look at."""

import torch
from torch import Tensor

from vlmslim.compressor import LayerInput
from vlmslim.ops.ranking import full_precision


@full_precision
def visual_words(x: Tensor, words: Tensor) -> Tensor:
    """Find the words (t, d) that an image's tokens (n, d) are nearest to: (t,) bool, all if none stands out."""
    share = (x @ words.float().T).softmax(1).mean(0)
    found = share > share.mean()
    return found | ~found.any()


def rotary_gravity(tokens: LayerInput, row: int, text: Tensor, place: Tensor) -> Tensor | None:
    """Compute what rotary positions alone give words and visual tokens, (t, v); None where nothing turns."""
    if tokens.rotary is None:
        return None
    width = tokens.keys.shape[-1]
    cos, sin = (x[row if len(x) > 1 else 0].float().to(text.device) for x in tokens.rotary)
    turned = cos[text] @ cos[place].T + sin[text] @ sin[place].T  # a vector of ones against another
    return (turned + width - cos.shape[-1]) / width**0.5


@full_precision
def guided_score(
    paid: Tensor, gravity: Tensor | None = None, heads: int | None = None, rates: Tensor | None = None
) -> Tensor:
    """Average what raters pay to visual tokens.

    Args:
        paid: (heads, t, v) attention of text.
        gravity: (t, v) divides it; None for 1.
        heads: number of heads that count, those which look most at the image; None for all.
        rates: (t,) bool, True at the raters; None for all.

    Returns:
        (v,).
    """
    rates = torch.ones_like(paid[0, :, 0], dtype=torch.bool) if rates is None else rates.to(paid.device)
    paid = (paid if gravity is None else paid / gravity).masked_fill(~rates[:, None], 0)
    if heads is not None:
        paid = paid[paid.sum((1, 2)).argsort(descending=True, stable=True)[:heads]]
    return paid.sum((0, 1)) / (len(paid) * rates.sum())
