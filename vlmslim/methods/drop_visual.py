"""drop_visual: drop every visual token late in the decoder; the second stage of ToDRE (arXiv 2505.18757)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlmslim.compressor import Compressor, LayerInput, check_choices, check_layer, resolve_layer


@dataclass
class DropVisual(Compressor):
    """Before a late decoder layer, drop all visual tokens of a prompt whose text has stopped looking at them.

    With T the text after the first visual token, V the visual tokens and A the attention of the layer before, averaged
    over heads, two shares are measured at prefill: what T's queries pay to V and what V's queries pay to T. If both
    are under `tau`, V goes: the remaining layers compute text alone and cache text alone, at the rotary positions it
    had. Each prompt of a batch decides for itself; the receipt's `visual_tokens_per_layer` tells how often it fired.
    A prompt that ends in a visual token keeps them: its next token is predicted from there.

    Under a causal mask the second share is exactly zero unless text stands between images, so for one image the first
    share decides. `tau` is no protection against an early `layer`: in the paper's ablation GQA falls from 64 to 39
    at half depth although the test passes there.

    layer : decoder layer before which they are dropped, a number from 1 or a share of the depth, rounded down (the
            attention measured is that of the layer before). A list asks at each layer until it fires
    tau   : threshold of both shares, in [0, 1]; None drops unconditionally. The paper uses 0.1
    text  : what T is: "after" the first visual token, or "all" text, system prompt included
    """

    budget_options: ClassVar = ("layer",)

    layer: int | float | Sequence[int | float] = 7 / 8
    tau: float | None = 0.1
    text: str = "after"

    def __post_init__(self):
        if not self.layers:
            raise ValueError("layer=[] names no decoder layer; give at least one")
        for layer in self.layers:
            check_layer(layer)
        if self.tau is not None:
            number = isinstance(self.tau, int | float) and not isinstance(self.tau, bool)
            if not number or not 0 <= self.tau <= 1:
                raise ValueError(f"tau={self.tau!r}: give a share of attention in [0, 1], or None to drop regardless")
        check_choices(self, text=("after", "all"))

    def setup(self, model: nn.Module) -> None:
        """Turn shares of the depth into layers."""
        depth = len(model.model.language_model.layers)
        self.layer = tuple(resolve_layer(layer, depth) for layer in self.layers)

    @property
    def layers(self) -> tuple[int | float, ...]:
        """The layers before which the question is asked."""
        return tuple(self.layer) if isinstance(self.layer, Sequence) else (self.layer,)

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """None from the first layer on, if the test passes there."""
        first = min(resolve_layer(layer, depth) for layer in self.layers)
        return [n] * first + [0] * (depth - first)

    def retain(self, tokens: LayerInput) -> Tensor:
        """All or nothing, prompt by prompt."""
        visual = tokens.image > 0
        drop = ~visual.gather(1, tokens.last[:, None])
        if self.tau is not None:
            text = tokens.mask & ~visual
            if self.text == "after":
                text &= visual.cumsum(1) > 0
            share = attention_mass(tokens.attention, text, visual) / text.sum(1).clamp(min=1)
            drop &= (share < self.tau)[:, None]
            sighted = visual & (text.cumsum(1) > 0)  # the visual tokens that have text to look back at
            if (sighted & drop).any():
                share = attention_mass(tokens.attention, sighted, text) / visual.sum(1).clamp(min=1)
                drop &= (share < self.tau)[:, None]
        return tokens.mask & ~(visual & drop)


@torch.no_grad()
def attention_mass(attend: Callable[[Tensor], Tensor], source: Tensor, target: Tensor, chunk: int = 128) -> Tensor:
    """Attention that the `source` tokens pay to the `target` tokens: mean over heads, sum over tokens.

    Divided by the number of source tokens this is a share, because a softmax row sums to one.

    Args:
        attend: softmax attention of query rows (B, q) -> (B, heads, q, S), such as `LayerInput.attention`.
        source: (B, S) bool, the queries.
        target: (B, S) bool, the keys.
        chunk: query rows computed at a time; memory is B x heads x chunk x S.

    Returns:
        (B,) fp32.
    """
    width = int(source.sum(1).max())
    rows = source.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    mass = torch.zeros(len(source), device=source.device)
    for part in rows.split(chunk, dim=1) if width else ():
        paid = attend(part).float().mean(1).masked_fill(~target[:, None], 0).sum(-1)  # (B, q)
        mass += (paid * source.gather(1, part)).sum(1)
    return mass
