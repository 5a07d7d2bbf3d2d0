"""drop_visual: drop all visual tokens late in the decoder; stage 2 of ToDRE (arXiv 2505.18757)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import Compressor, LayerInput, check_choices, check_layer, resolve_layer
from vlmslim.ops.attention import attention_rows


@dataclass
class DropVisual(Compressor):
    """Before a late decoder layer, drop all visual tokens of a prompt whose text has stopped looking at them.

    Let T be the text after the first visual token and V the visual tokens. At prefill, two shares of the attention of
    the layer before are measured, averaged over heads: what the queries of T pay to V, and what the queries of V pay
    to T. If both are below `tau`, V is dropped: the remaining layers compute and cache only text, at the rotary
    positions it had. Each prompt of a batch decides for itself; the receipt says how many prompts were affected. A
    prompt that ends in a visual token keeps them, because its next token is predicted from there.

    Under a causal mask the second share is zero unless text stands between images, so for one image the first share
    decides. `tau` does not protect against an early `layer`: in the paper's ablation GQA falls from 64 to 39 at half
    depth although the test passes there.

    layer : decoder layer before which the tokens are dropped, a number from 1 or a share of the depth, rounded down.
            With a list, each layer is tried until the test passes
    tau   : threshold of both shares, in [0, 1]; None drops unconditionally; the paper uses 0.1
    text  : what T is: "after" the first visual token, or "all" text, system prompt included
    """

    budget_options: ClassVar = ("layer",)

    layer: int | float | Sequence[int | float] = 7 / 8
    tau: float | None = 0.1
    text: str = "after"

    def __post_init__(self) -> None:
        self.layers = tuple(self.layer) if isinstance(self.layer, Sequence) else (self.layer,)
        if not self.layers:
            raise ValueError("layer=[] names no decoder layer; give at least one")
        for layer in self.layers:
            check_layer(layer)
        if self.tau is not None and not 0 <= self.tau <= 1:
            raise ValueError(f"tau={self.tau!r}: give a share of attention in [0, 1], or None to drop regardless")
        check_choices(self, text=("after", "all"))
        if self.tau is not None:
            self.reads_back = "whether the tokens are dropped depends on attention"

    def requested(self, n: int) -> int | None:
        """Return None because the prompts decide, or 0 without a threshold."""
        return 0 if self.tau is None else None

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """Expect no visual tokens from the first layer on, as if the test passed there."""
        first = min(resolve_layer(layer, depth) for layer in self.layers)
        return [n] * first + [0] * (depth - first)

    def retain(self, tokens: LayerInput) -> Tensor:
        """Keep all visual tokens of a prompt or none."""
        visual = tokens.image > 0
        drop = ~visual.gather(1, tokens.last[:, None])
        if self.tau is not None:
            text = tokens.mask & ~visual
            if self.text == "after":
                text &= visual.cumsum(1) > 0
            share = attention_mass(tokens.attention, text, visual) / text.sum(1).clamp(min=1)
            drop &= (share < self.tau)[:, None]
            sighted = visual & (text.cumsum(1) > 0)  # visual tokens that have text before them, which they may look at
            if (sighted & drop).any():
                share = attention_mass(tokens.attention, sighted, text) / visual.sum(1).clamp(min=1)
                drop &= (share < self.tau)[:, None]
        return tokens.mask & ~(visual & drop)

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return 0 without a threshold, except where a visual token ends the prompt."""
        if self.tau is not None or tokens.image_last is None:
            return None
        return [row if last else [0] * len(row) for row, last in zip(tokens.present, tokens.image_last, strict=True)]


@torch.no_grad()
def attention_mass(attend: Callable[[Tensor], Tensor], source: Tensor, target: Tensor, chunk: int = 128) -> Tensor:
    """Sum the attention that the `source` tokens pay to the `target` tokens, averaged over heads.

    Divided by the number of source tokens this is a share, because a softmax row sums to one.

    Args:
        attend: softmax attention of query rows: (B, q) -> (B, heads, q, S), such as `LayerInput.attention`.
        source: (B, S) bool, the queries.
        target: (B, S) bool, the keys.
        chunk: query rows computed at a time.

    Returns:
        (B,) fp32.
    """
    mass = torch.zeros(len(source), device=source.device)
    for _, paid in attention_rows(attend, source, chunk):  # (B, q, S)
        mass += paid.masked_fill(~target[:, None], 0).sum(-1).sum(1)
    return mass
