"""The patched model computed a second time without the engine: from what the method answered, layer by layer.

The doctor notes a method's answers while the patched model runs. It then computes another, unpatched model by hand,
layer by layer, with these features at these positions. No code of the engine takes part in that.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import create_causal_mask

from vlmslim.compressor import Compressed, Compressor, ImageTokens, LayerInput, Retained
from vlmslim.doctor.prompts import LONG, Prompts
from vlmslim.engine.families import language_model
from vlmslim.patching import Slim


@dataclass(frozen=True)
class Sent:
    """What a method made of one image.

    before   : (n, d) the image's tokens
    features : (k, d) the tokens that the method sends to the language model
    index    : (k,) their slots among the image's n, ascending; None means the first k
    crops    : crops of the image, or frames of the video
    """

    before: Tensor
    features: Tensor
    index: Tensor | None
    crops: int

    @property
    def copies(self) -> int:
        """Number of tokens that the method sends more often than the image has them.

        A token that the method made itself may come once for each crop, because blank crops are compressed alike.
        """
        _, number = torch.cat([self.before, self.features.to(self.before)]).unique(dim=0, return_inverse=True)
        had, sent = (
            part.bincount(minlength=int(number.max()) + 1) for part in number.split([len(self.before), len(self)])
        )
        return int((sent - had.where(had > 0, self.crops)).clamp(min=0).sum())

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def of(cls, image: ImageTokens, before: Tensor, result: Compressed) -> "Sent":
        """Copy what a method returned for an image whose features were `before` (n, d)."""
        crops, index = len(image.tower), result.index
        if index is None:
            return cls(before, result.vectors(image).detach().clone(), None, crops)
        if result.features is None:
            return cls(before, before[index], index.sort().values, crops)
        return cls(before, result.features.detach().clone(), index.clone(), crops)


@dataclass
class Notes:
    """What a method answered in one prefill.

    sent   : of each image, before the language model; empty if no stage acts there
    kept   : by layer, (B, S) bool, what stays by the answer of `retain`
    states : by layer, (B, S, d), the new states in the answer of `retain`, if there are any
    image  : by layer, (B, S), the `LayerInput.image` that `retain` was given
    origin : by layer, (B, S), the `LayerInput.origin` that `retain` was given
    hides  : the method is in training, and hides tokens instead of dropping them
    """

    sent: list[Sent] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    states: dict[int, Tensor] = field(default_factory=dict)
    image: dict[int, Tensor] = field(default_factory=dict)
    origin: dict[int, Tensor] = field(default_factory=dict)
    hides: bool = False

    def counts(self, layer: int, images: list[int]) -> list[list[int]]:
        """Return the tokens that each image keeps from `layer` on, row by row; row i has `images[i]` images."""
        kept = self.image[layer] * self.kept[layer]
        return [row.bincount(minlength=1 + n)[1:].tolist() for row, n in zip(kept, images, strict=True)]

    def compress_images(self, ask: Callable) -> Callable:
        """Wrap a stage's `compress_images`."""

        def asked(images: list[ImageTokens]) -> list[Compressed]:
            before = [image.features.detach().clone() for image in images]  # a method may edit them
            results = ask(images)
            self.sent += map(Sent.of, images, before, results)
            return results

        return asked

    def retain(self, ask: Callable) -> Callable:
        """Wrap a stage's `retain`."""

        def asked(tokens: LayerInput) -> Tensor | Retained:
            self.image[tokens.layer], self.origin[tokens.layer] = tokens.image.clone(), tokens.origin.clone()
            answer = ask(tokens)
            keep = answer.keep if isinstance(answer, Retained) else answer
            self.kept[tokens.layer] = keep.to(tokens.image.device, torch.bool, copy=True)
            if isinstance(answer, Retained):
                self.states[tokens.layer] = answer.hidden.clone()
            return answer

        return asked

    def soft_retain(self, ask: Callable) -> Callable:
        """Wrap a stage's `soft_retain`."""

        def asked(tokens: LayerInput) -> Tensor | None:
            weight = ask(tokens)
            self.hides |= weight is not None
            return weight

        return asked


@contextmanager
def noted(slim: Slim | None) -> Iterator[Notes]:
    """Note what the stages of a patch answer; without a patch there is nothing to note."""
    notes = Notes()
    wrapped: list[tuple[Compressor, str]] = []

    def wrap(method: Compressor, *names: str) -> None:
        for name in names:
            if name not in vars(method):
                setattr(method, name, getattr(notes, name)(getattr(method, name)))
                wrapped.append((method, name))

    for stage in () if slim is None else slim.stages:
        if stage.acts_before_llm:
            wrap(stage.method, "compress_images")
        if stage.layers:
            wrap(stage.method, "retain", "soft_retain")
    try:
        yield notes
    finally:
        for method, name in wrapped:
            delattr(method, name)


class _Entered(Exception):
    """Ends a forward at the entrance of the language model, whose layers need not run."""

    def __init__(self, embeds: Tensor):
        self.embeds = embeds


class Reference:
    """An unpatched model that the doctor computes by hand.

    embeds : by row of the prompts, (L, d), the embeddings that enter its language model
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts):
        self.model: Any = model
        self.prompts = prompts
        self.embeds = {row: self._embeds(row) for row in (*prompts.pictured, LONG)}

    @torch.no_grad()
    def _embeds(self, row: int) -> Tensor:
        def stop(lm: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Entered(kwargs["inputs_embeds"][0].clone())

        hook = language_model(self.model.model).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**self.prompts.inputs((row,)), use_cache=False)
        except _Entered as entered:
            return entered.embeds
        finally:
            hook.remove()
        raise RuntimeError("the language model was not called")

    @torch.no_grad()
    def logits(
        self, row: int, answer: Tensor, notes: Notes, renumbered: bool, closing: Collection[int] = ()
    ) -> tuple[Tensor, Tensor]:
        """Compute the logits of a prompt and an answer after it, given what the method answered.

        The answer sees all that is kept of the prompt, and the prompt sees nothing of the answer. So one causal pass
        through each layer, over the tokens that this layer is left with, is the prefill and the decoding at once.

        Args:
            row: of the prompts.
            answer: (1, T).
            notes: what the method answered when the patched model prefilled this row.
            renumbered: the stage before the language model closes the gaps in the rotary positions.
            closing: layers before which a drop closes the gaps that it leaves.

        Returns:
            Places (P,) in the caller's sequence of L + T tokens, and their logits (P, V). The place of a dropped token
            has the logits of the last token before it that reached the last layer. Places before the first such token
            are left out.

        Raises:
            ValueError: the engine showed the method other tokens than there are.
        """
        lm, length, steps = language_model(self.model.model), len(self.embeds[row]), answer.shape[1]
        embeds, image = self._entrance(row, notes)
        origin = torch.cat([(image >= 0).nonzero()[:, 0], torch.arange(length, length + steps, device=image.device)])
        position = torch.arange(len(origin), device=origin.device) if renumbered else origin
        image = torch.cat([image, image.new_zeros(steps)])[origin]
        x = torch.cat([embeds, lm.embed_tokens(answer[0])])[origin][None]
        mask, rope = create_causal_mask(lm.config, x, None, None), lm.rotary_emb(x, position_ids=position[None])
        for i, layer in enumerate(lm.layers):
            if i in notes.kept:
                stay = _stay(i, notes, origin[:-steps], image[:-steps])
                stay = torch.cat([stay, stay.new_ones(steps)])
                if i in notes.states:
                    made = torch.cat([notes.states[i].to(x), x[:, -steps:]], dim=1)
                    x = torch.where(image[:, None] > 0, made, x)
                if i in closing:
                    position = position - (~stay).cumsum(0)
                x, position, origin, image = x[:, stay], position[stay], origin[stay], image[stay]
                mask = create_causal_mask(lm.config, x, None, None)
                rope = lm.rotary_emb(x, position_ids=position[None])
            out = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None)
            x = out[0] if isinstance(out, tuple) else out
        places = torch.arange(int(origin[0]), length + steps, device=origin.device)
        source = torch.searchsorted(origin, places, right=True) - 1
        return places, self.model.lm_head(lm.norm(x))[0, source].float()

    def _entrance(self, row: int, notes: Notes) -> tuple[Tensor, Tensor]:
        """Put the tokens that the method sent into the prompt's embeddings (L, d).

        Also returns (L,): -1 at dropped tokens, 0 at text, i at the tokens of the i-th image.
        """
        embeds, visual = self.embeds[row].clone(), self.prompts.visual(row)
        image = visual.long()
        if not notes.sent:
            return embeds, image
        columns = visual.nonzero()[:, 0]
        sizes = [len(sent.before) for sent in notes.sent]
        if len(columns) != sum(sizes):
            raise ValueError(
                f"the engine showed the method {sum(sizes)} visual tokens, but the prompt has {len(columns)}"
            )
        for i, (sent, own) in enumerate(zip(notes.sent, columns.split(sizes), strict=True), start=1):
            slots = own[: len(sent)] if sent.index is None else own[sent.index.to(own.device)]
            image[own] = -1
            image[slots] = i
            embeds[slots] = sent.features.to(embeds)
        return embeds, image


def _stay(layer: int, notes: Notes, origin: Tensor, image: Tensor) -> Tensor:
    """Return (S,) bool: which of the prompt's tokens stay from `layer` on."""
    shown, kept = notes.origin[layer][0].to(origin.device), notes.kept[layer][0].to(origin.device)
    if not torch.equal(shown, origin) or not torch.equal(notes.image[layer][0].to(image.device) > 0, image > 0):
        raise ValueError(f"before layer {layer} the engine showed the method other tokens than there are")
    return kept | (image == 0)
