"""FastV: "An Image is Worth 1/2 Tokens After Layer 2" (ECCV 2024, arXiv 2403.06764)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmslim.compressor import Compressor, Keep, LayerInput, check_keep, check_layer


@dataclass
class FastV(Compressor):
    """Before decoder layer K, keep the visual tokens that the last prompt token attends to most in layer K - 1.

    The score is the softmax attention of layer K - 1, averaged over heads (section 4.1 of the paper). Kept tokens
    keep their rotary positions, and text always stays. The layers before K see all tokens, so the cost is that of
    `equivalent_tokens` in the receipt, not that of `keep`.

    Differs from the release: each image of each sample is ranked by itself, wherever it stands in the prompt, and
    only the last row of the attention is computed.

    keep  : visual tokens to keep per image from layer K on, a count or a share
    layer : K, a number from 1 or a share of the depth, rounded down; the paper uses 2
    """

    budget_options: ClassVar = ("keep", "layer")

    keep: Keep
    layer: int | float = 2

    def __post_init__(self) -> None:
        check_keep(self.keep)
        check_layer(self.layer)
        self.layers = (self.layer,)

    def retain(self, tokens: LayerInput) -> Tensor:
        """Rank by the last token's attention."""
        score = tokens.attention(tokens.last[:, None]).mean(1)[:, 0]  # (B, S)
        return tokens.top(score, self.keep)

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return the budgets."""
        return tokens.count_of_top(self.keep)
