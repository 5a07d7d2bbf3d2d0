"""pagerank_prune: drop visual tokens layer by layer; stage 2 of AIM (ICCV 2025, arXiv 2412.03248)."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlmslim.compressor import Compressor, LayerInput
from vlmslim.engine.families import language_model
from vlmslim.ops.ranking import full_precision, rank_within_groups

ROWS = 256  # query rows of an attention map that are in memory at once


@dataclass
class PageRankPrune(Compressor):
    """Drop visual tokens layer by layer, least important first, until none is left.

    Layer l sees r(l) of the visual tokens that entered the language model: all up to layer `start`, then linearly
    fewer, none from layer `stop` on. The tokens of highest importance stay. Importance is the PageRank of the sharpened
    attention of layer l - 1: every token, text included, hands its importance on to the tokens that it looks at. The
    images of a prompt share its budget. Text always stays, and so does a prompt's last token, because it predicts the
    next one. Kept tokens keep their rotary positions.

    Differs from the release, which only hides pruned tokens as keys: they still take part in the graph and cost what
    they did. Here they are removed, so the graph is that of the surviving tokens (the kept sets differ by about one
    token a layer). Also, every sample has its own budget, decoding sees what prefill kept, and ties go to the lower
    index.

    start       : last layer that sees everything, a number or a share of the depth. The default is the paper's 14 of
                  28 layers and 13 of 32, and half of any other depth
    stop        : first layer that sees nothing. The default is 22 of 28 and 21 of 32, and 11/14 of any other depth
    temperature : of the softmax of the graph; below 1 sharpens
    iterations  : steps from the uniform distribution
    damping     : share of each step that is spread evenly
    """

    budget_options: ClassVar = ("stop", "start")

    start: int | float | None = None
    stop: int | float | None = None
    temperature: float = 0.1
    iterations: int = 5
    damping: float = 0.0

    def __post_init__(self) -> None:
        for name in ("start", "stop"):
            layer = getattr(self, name)
            if layer is None:
                continue
            if layer < 0 or isinstance(layer, float) and layer > 1:
                raise ValueError(f"{name}={layer}: a layer is not negative, and a share of the depth lies in [0, 1]")
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature!r}: give a positive number; the paper uses 0.1")
        if not 1 <= self.iterations <= 1000:
            raise ValueError(f"iterations={self.iterations!r}: give an integer from 1 to 1000; the paper uses 5")
        if not 0 <= self.damping < 1:
            raise ValueError(f"damping={self.damping!r}: give a share in [0, 1); the release uses 0")

    def setup(self, model: Any) -> None:
        """Turn the schedule into layers of this model."""
        depth = len(language_model(model.model).layers)
        self.span = self.span_of(depth)
        self.layers = tuple(range(self.span[0] + 1, min(self.span[1], depth - 1) + 1))

    def span_of(self, depth: int) -> tuple[int, int]:
        """Return the last layer that sees everything and the first that sees nothing, in a decoder of `depth` layers.

        Raises:
            ValueError: the second is not after the first.
        """
        usual = (13, 21) if depth == 32 else (1 / 2, 11 / 14)
        start, stop = usual[0] if self.start is None else self.start, usual[1] if self.stop is None else self.stop
        first, none = (round(layer * depth) if isinstance(layer, float) else layer for layer in (start, stop))
        if isinstance(stop, float) and stop * depth > (start * depth if isinstance(start, float) else start):
            none = max(none, first + 1)  # in a shallow decoder, rounding must not make one layer of two shares
        if first >= none:
            raise ValueError(f"start={first} and stop={none} of {depth} decoder layers: give a stop after the start")
        return first, none

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """Return the schedule."""
        return [scheduled(n, layer, *self.span_of(depth)) for layer in range(depth)]

    def retain(self, tokens: LayerInput) -> Tensor:
        """Keep the most important tokens of every sample."""
        visual = tokens.image > 0
        place = torch.arange(visual.shape[1], device=visual.device)
        visual &= place != tokens.last[:, None]
        budget = [scheduled(sum(row), tokens.layer, *self.span) for row in tokens.entered]
        if not any(budget):
            return ~visual
        score = pagerank(
            tokens.mask, previous_attention(tokens, self.temperature), iterations=self.iterations, damping=self.damping
        )
        tokens.score = score
        rank = rank_within_groups(score.to(visual.device), visual.long())
        return ~visual | (rank < torch.tensor(budget).to(visual.device, non_blocking=True)[:, None])

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return the schedule, and one token more where a visual token ends the prompt."""
        if tokens.image_last is None:
            return None
        return [
            [min(scheduled(sum(row), tokens.layer, *self.span), sum(present) - last) + last]
            for row, present, last in zip(tokens.entered, tokens.present, tokens.image_last, strict=True)
        ]


def scheduled(n: int, layer: int, start: int, stop: int) -> int:
    """Count how many of `n` visual tokens decoder layer `layer` sees: all up to `start`, none from `stop` on."""
    return n * min(max(stop - layer, 0), stop - start) // (stop - start)


def previous_attention(tokens: LayerInput, temperature: float = 1.0, rows: int = ROWS) -> Iterator[Tensor]:
    """Compute the attention of layer `tokens.layer - 1`, some rows at a time, the last rows first.

    Yields:
        (B, heads, q, end) in fp32: what rows end - q .. end - 1 pay to tokens 0 .. end - 1, which is all they can see.
    """
    batch, size = tokens.mask.shape
    rows = min(rows, -(-size // 2))  # never the whole map at once, however short the prompt
    for end in range(size, 0, -rows):
        row = torch.arange(max(0, end - rows), end, device=tokens.mask.device).expand(batch, -1)
        yield tokens.attention(row, temperature, end)


@full_precision
def pagerank(real: Tensor, attention: Iterable[Tensor], *, iterations: int = 5, damping: float = 0.0) -> Tensor:
    """Compute the importance of tokens: where a uniform distribution goes in a few steps along causal attention.

    Every head is a graph of its own; the results of the heads are combined by the root mean square. A token hands
    importance on only to itself and to tokens before it. So, going from the last row to the first, a row's importance
    is final in all steps once the rows after it are done, and one pass over the rows makes all steps.

    Args:
        real: (B, S) 1 at tokens, 0 at padding.
        attention: blocks (B, heads, q, end) of rows end - q .. end - 1; the last rows come first, and all rows come.
        iterations: number of steps.
        damping: share of every step that is spread evenly.

    Returns:
        (B, S).
    """
    uniform = real / real.sum(1, keepdim=True)
    rank: list[Tensor] = []  # (B, heads, S) after each number of steps
    for block in attention:
        heads, q, end = block.shape[1:]
        if not rank:
            start = uniform.to(block.device)[:, None].repeat(1, heads, 1)
            rank = [start, *(damping * start for _ in range(iterations))]
        for now, then in zip(rank, rank[1:], strict=False):
            then[..., :end] += (1 - damping) * (now[..., None, end - q : end] @ block)[..., 0, :]
    last = rank[-1]
    scale = last.amax(1, keepdim=True).clamp(min=torch.finfo(last.dtype).tiny)  # squares of small ranks underflow
    return (scale * (last / scale).square().mean(1, keepdim=True).sqrt())[:, 0]
