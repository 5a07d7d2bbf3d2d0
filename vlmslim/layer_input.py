"""A method's view of the tokens that enter a decoder layer, `LayerInput`, and its answer, a mask or `Retained`."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Protocol, Self

import torch
from torch import Tensor
from torch.nn import functional

from vlmslim.image_tokens import ImageTokens
from vlmslim.io.messages import described
from vlmslim.ops.attention import DecoderAttention, weighted_logits
from vlmslim.ops.ranking import rank_within_groups
from vlmslim.options.common import Keep, resolve_keep


class Attends(Protocol):
    """Queries, keys and positions with which a decoder layer attends: `vlmslim.engine.attention.LayerAttention`."""

    @property
    def rotary(self) -> Tensor | tuple[Tensor, ...] | None:
        """Cosine and sine of the rotary positions, (B or 1, S, head_dim) each, in most models."""

    def attend(
        self, mask: Tensor, keys: Tensor | None, prefix: int = 0, blocks: Tensor | None = None
    ) -> DecoderAttention:
        """Return the attention of the layer."""

    def first(self, count: int) -> Self:
        """Return the same without the tokens after the first `count` of every row."""


@dataclass
class LayerInput:
    """The tokens about to enter decoder layer `layer`, in a prefill that brought images.

    hidden   : (B, S, d) hidden states
    mask     : (B, S)    False at padding
    image    : (B, S)    i at the visual tokens of the row's i-th image, from 1; 0 at text and padding
    slot     : (B, S)    position of a visual token among its image's n, from 0; -1 at text, at padding, and at tokens
                         that a stage before the language model made without saying which slots they take
    origin   : (B, S)    index of each token in the caller's sequence
    last     : (B,)      index of the last token of each row that is not padding
    entered  : per row, how many visual tokens of each image entered the language model
    present  : per row, how many visual tokens of each image there are now; their sum alone, if no more is known
    image_last : per row, whether a visual token ends the prompt; None if tokens after the prompt are left out
    text_after : per row, how many text tokens stand after each image
    images   : per row, the images themselves
    weight   : (B, S)    how strongly each token may be attended to at this layer; None if all count in full
    previous : what the layer before attends with; None before layer 0
    coming   : finds out with what `layer` itself is about to attend, when a method asks for it
    in_cache : (B, kv heads, P + S, head_dim) rotated keys of the layer before; None if the KV cache does not have them
    cached   : (B, P)    False at padding, of tokens that the KV cache held before this forward; None if it was empty
    size     : (B, P + S) how many tokens each key stands for in attention; None if each stands for one
    blocks   : (B, S)    tokens of one block see each other both ways, -1 for none; None if all see only what is before
    score    : (B, S)    by which a method ranked the tokens, higher is better; pictures show it. None if it did not say
    into     : for methods that merge, a function that returns (B, S), the place of the token into which each token
               went: its own if it stays, and anything if it goes. Pictures call it. None if the method did not say
    """

    layer: int
    hidden: Tensor
    mask: Tensor
    image: Tensor
    slot: Tensor
    origin: Tensor
    last: Tensor
    entered: list[list[int]]
    present: list[list[int]]
    image_last: list[bool] | None
    text_after: list[list[int]]
    images: list[list[ImageTokens]]
    weight: Tensor | None = None
    previous: Attends | None = None
    coming: Callable[[], Attends] | None = None
    in_cache: Tensor | None = None
    cached: Tensor | None = None
    size: Tensor | None = None
    blocks: Tensor | None = None
    score: Tensor | None = None
    into: Callable[[], Tensor] | None = None

    def without_last(self, count: int) -> "LayerInput":
        """Return the same input without the last `count` tokens of every row, which the caller's prompt does not have.

        They are guesses of speculative decoding, or an answer that the caller scores.
        """
        if not count:
            return self
        end = self.hidden.shape[1] - count
        cut = {name: getattr(self, name)[:, :end] for name in ("hidden", "mask", "image", "slot", "origin")}
        held, coming = 0 if self.cached is None else self.cached.shape[1], self.coming
        return replace(
            self,
            **cut,
            image_last=None,
            last=self.last.clamp(max=end - 1),
            weight=None if self.weight is None else self.weight[:, :end],
            previous=None if self.previous is None else self.previous.first(end),
            coming=None if coming is None else lambda: coming().first(end),
            in_cache=None if self.in_cache is None else self.in_cache[:, :, : held + end],
            size=None if self.size is None else self.size[:, : held + end],
            blocks=None if self.blocks is None else self.blocks[:, :end],
        )

    @property
    def keys(self) -> Tensor:
        """(B, kv heads, S, head_dim) rotated keys of the layer before in fp32, cached or computed anew."""
        return self._attention.keys[:, :, self._attention.prefix :].to(self.hidden.device)

    @property
    def rotary(self) -> tuple[Tensor, ...] | None:
        """Cosine and sine of the tokens' rotary positions in the layer before, (B or 1, S, rotated channels) each.

        None where the layer does not turn, or turns by something else.
        """
        turned = None if self.previous is None else self.previous.rotary
        return turned if isinstance(turned, tuple) and len(turned) == 2 else None

    @cached_property
    def _attention(self) -> DecoderAttention:
        if self.previous is None:
            raise RuntimeError("there is no attention before decoder layer 0; use layer >= 1")
        return self._attended(self.previous, self.in_cache)

    @cached_property
    def _coming(self) -> DecoderAttention:
        if self.coming is None:
            raise RuntimeError("what this layer is about to attend with is unknown; make the input with coming=...")
        return self._attended(self.coming())

    def _attended(self, attends: Attends, keys: Tensor | None = None) -> DecoderAttention:
        if self.cached is None:
            return attends.attend(self.mask, keys, blocks=self.blocks)
        mask, prefix = torch.cat([self.cached, self.mask], dim=1), self.cached.shape[1]
        blocks = None if self.blocks is None else functional.pad(self.blocks, (prefix, 0), value=-1)
        return attends.attend(mask, keys, prefix, blocks)

    def attention(self, rows: Tensor, temperature: float = 1.0, end: int | None = None) -> Tensor:
        """Compute the attention that query tokens paid in layer `layer - 1`.

        It is recomputed for these rows alone, so that every attention back end serves and no full map exists. Tokens
        that were in the KV cache before this forward take their share, which is not returned.

        Args:
            rows: (B, q) indices of the query tokens.
            temperature: of the softmax.
            end: look at the tokens before `end` only, which is all that rows before `end` can see; None for all.

        Returns:
            (B, heads, q, S) in fp32, or (B, heads, q, end).
        """
        if end is not None and self.blocks is not None:  # tokens before `end` may see tokens of their block after it
            return self.attention(rows, temperature)[..., :end]
        return self._paid(self._attention, rows, temperature, end)

    def coming_attention(self, rows: Tensor) -> Tensor:
        """Compute the attention that query tokens are about to pay in layer `layer` itself, before anything is dropped.

        The layer's own norm and projections are applied to `hidden`, with the rotary positions that the tokens have
        now. Arguments and result are those of `attention`.

        Raises:
            RuntimeError: the layer has its weights only while it runs (FSDP, offloading).
        """
        return self._paid(self._coming, rows)

    def _paid(
        self, attention: DecoderAttention, rows: Tensor, temperature: float = 1.0, end: int | None = None
    ) -> Tensor:
        rows = rows.to(attention.mask.device)
        logits = attention.logits(rows, end)
        if self.size is not None:
            logits = logits + self.size.to(logits.device)[:, None, None, : logits.shape[-1]].log()
        if self.weight is not None:
            logits = weighted_logits(logits, self.weight[:, :end].to(logits.device), rows)
        return attention.softmax(logits, temperature).to(self.hidden.device)

    def top(self, score: Tensor, keep: Keep | Callable[[int], int]) -> Tensor:
        """Choose for every image the `keep` tokens of highest `score` (B, S), the lower index first on ties.

        A share counts from what entered the language model; a function turns that number into a count.

        Returns:
            (B, S) bool, True at the chosen visual tokens.

        Raises:
            ValueError: `keep` is a count larger than an image, or there is not one score for each token.
        """
        if score.shape != self.mask.shape:
            raise ValueError(
                f"top(score, keep) was given {described(score)} for scores: give one to each token, (B, S), here "
                f"{tuple(self.mask.shape)}"
            )
        count = keep if callable(keep) else partial(resolve_keep, keep)
        counts = [[0] + [count(n) for n in row] for row in self.entered]  # 0 of text and padding
        width = max(map(len, counts))
        self.score = score
        budget = torch.tensor([row + [0] * (width - len(row)) for row in counts]).to(score.device, non_blocking=True)
        return (rank_within_groups(score, self.image) < budget.gather(1, self.image)) & (self.image > 0)

    def count_of_top(self, keep: Keep | Callable[[int], int]) -> list[list[int]] | None:
        """Return how many tokens of each image `top` chooses, per row; None where that depends on earlier drops."""
        count = keep if callable(keep) else partial(resolve_keep, keep)
        rows = list(zip(self.entered, self.present, strict=True))
        if any(len(entered) != len(present) for entered, present in rows):
            return None
        return [[min(count(n), left) for n, left in zip(*row, strict=True)] for row in rows]


@dataclass
class Retained:
    """The answer of a `retain` that changes the states of visual tokens: the places that stay, and the new states.

    A token that the method made, such as a mean of dropped ones, takes the place of one of them. It then is a token
    like any other: it has the slot and the rotary position of that place, and counts in caches, receipts and drops.

    keep   : (B, S) bool, True at the places that stay
    hidden : (B, S, d) the states that enter the layer, read at visual tokens only, because text stays as it is
    """

    keep: Tensor
    hidden: Tensor
