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
from vlmslim.engine.families import family_of, language_model, layer_type, rotary
from vlmslim.patching import Slim


@dataclass(frozen=True)
class Sent:
    """The answer of a method to one image.

    before   : (n, d) the image's tokens
    features : (k, d) the tokens that the method sends to the language model
    index    : (k,) their slots among the image's n, ascending; None means the first k
    crops    : crops of the image, or frames of the video
    into     : `Compressed.into`, called
    size     : (k,) how many tokens each one stands for in attention; None if one each
    """

    before: Tensor
    features: Tensor
    index: Tensor | None
    crops: int
    into: Tensor | None = None
    size: Tensor | None = None

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
        into = None if result.into is None else result.into()
        if index is None:
            return cls(before, result.vectors(image).detach().clone(), None, crops, into)
        if result.features is None:
            return cls(before, before[index], index.sort().values, crops)
        return cls(before, result.features.detach().clone(), index.clone(), crops, into, result.size)


@dataclass
class Notes:
    """The answers of a method in one prefill.

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

    def ask(self, ask: Callable) -> Callable:
        """Wrap a stage's `ask`."""

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
            wrap(stage.method, "ask")
        if stage.layers:
            wrap(stage.method, "retain", "soft_retain")
    try:
        yield notes
    finally:
        for method, name in wrapped:
            delattr(method, name)


class _Entered(Exception):
    """Ends a forward at the entrance of the language model, whose layers need not run."""

    def __init__(self, arguments: dict[str, Any]):
        self.arguments = arguments


@dataclass(frozen=True)
class Prompt:
    """The L tokens of a prompt as they enter the language model, and the features that the model adds to them later.

    embeds   : (L, d)
    visual   : (L,) bool, True at visual tokens
    position : (axes, L) rotary positions, which have one number or several
    added    : of decoder layers 0, 1, ..., (L, d) what the model adds after the layer (DeepStack); 0 at text
    """

    embeds: Tensor
    visual: Tensor
    position: Tensor
    added: list[Tensor]

    @classmethod
    def of(cls, visual: Tensor, arguments: dict[str, Any]) -> "Prompt":
        """Read the arguments of a language model's forward."""
        embeds, position = arguments["inputs_embeds"][0].clone(), arguments.get("position_ids")
        if position is None:
            position = torch.arange(len(embeds), device=embeds.device)[None]
        position = position[:, 0] if position.ndim == 3 else position[:1]
        added = []
        for features in arguments.get("deepstack_visual_embeds") or []:
            everywhere = torch.zeros_like(embeds)
            everywhere[arguments["visual_pos_masks"][0]] = features.to(embeds)
            added.append(everywhere)
        return cls(embeds, visual, position, added)


class Reference:
    """An unpatched model that the doctor computes by hand.

    prompts : by row
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts):
        self.model: Any = model
        self.by_type = family_of(model).masks_by_type
        self.prompts = {row: self._prompt(prompts, row) for row in (*prompts.pictured, LONG)}

    @torch.no_grad()
    def _prompt(self, prompts: Prompts, row: int) -> Prompt:
        def stop(lm: nn.Module, args: tuple, kwargs: dict) -> None:
            raise _Entered(kwargs)

        hook = language_model(self.model.model).register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.model(**prompts.inputs((row,)), use_cache=False)
        except _Entered as entered:
            return Prompt.of(prompts.visual(row), entered.arguments)
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
        prompt, lm, steps = self.prompts[row], language_model(self.model.model), answer.shape[1]
        length = len(prompt.embeds)
        embeds, image, added = _entrance(prompt, notes)
        position, end = prompt.position, prompt.position.max() + 1
        if renumbered:
            position, fall = close_gaps(position, image >= 0, prompt.visual)
            end = end - fall
        steps_on = torch.arange(steps, device=image.device)
        origin = torch.cat([(image >= 0).nonzero()[:, 0], length + steps_on])
        position = torch.cat([position, (end + steps_on).expand(len(position), -1)], dim=1)[:, origin]
        image = torch.cat([image, image.new_zeros(steps)])[origin]
        x = torch.cat([embeds, lm.embed_tokens(answer[0])])[origin][None]
        blocks, size = self._blocks(prompt.visual, steps), _sizes(prompt, notes, steps)
        made: dict[str, tuple[Any, Any]] = {}  # masks and rotations, by the type of the layer
        for i, layer in enumerate(lm.layers):
            if i in notes.kept:
                stay = _stay(i, notes, origin[:-steps], image[:-steps])
                stay = torch.cat([stay, stay.new_ones(steps)])
                if i in notes.states:
                    states = torch.cat([notes.states[i].to(x), x[:, -steps:]], dim=1)
                    x = torch.where(image[:, None] > 0, states, x)
                if i in closing:
                    position, _ = close_gaps(position, stay, image > 0)
                x, position, origin, image = x[:, stay], position[:, stay], origin[stay], image[stay]
                made = {}
            if (kind := layer_type(lm, i)) not in made:
                at = position if len(position) == 1 else position[:, None]
                own = None if blocks is None else blocks[origin]
                mask = _mask(lm, kind, x, own, None if size is None else size[origin])
                made[kind] = mask, rotary(lm, i, x, at)
            mask, rope = made[kind]
            out = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None)
            x = out[0] if isinstance(out, tuple) else out
            if i < len(added):
                x = x + nn.functional.pad(added[i], (0, 0, 0, steps))[origin]
        places = torch.arange(int(origin[0]), length + steps, device=origin.device)
        source = torch.searchsorted(origin, places, right=True) - 1
        return places, self.model.lm_head(lm.norm(x))[0, source].float()

    def _blocks(self, visual: Tensor, steps: int) -> Tensor | None:
        """Return (L + T,) a number for each run of visual tokens, which see each other both ways, and -1 at text.

        None if all tokens see only what is before them.
        """
        if not self.by_type:
            return None
        begins = visual & ~nn.functional.pad(visual, (1, 0))[:-1]
        return nn.functional.pad((begins.cumsum(0) - 1).where(visual, -1), (0, steps), value=-1)


def _entrance(prompt: Prompt, notes: Notes) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Put the tokens that the method sent into the prompt's embeddings (L, d).

    Returns:
        The embeddings (L, d); (L,) -1 at dropped tokens, 0 at text, i at the tokens of the i-th image; and
        `Prompt.added`, of the tokens that the method sent.
    """
    embeds, image, added = prompt.embeds.clone(), prompt.visual.long(), [x.clone() for x in prompt.added]
    if not notes.sent:
        return embeds, image, added
    columns = prompt.visual.nonzero()[:, 0]
    sizes = [len(sent.before) for sent in notes.sent]
    if len(columns) != sum(sizes):
        raise ValueError(f"the engine showed the method {sum(sizes)} visual tokens, but the prompt has {len(columns)}")
    for i, (sent, own) in enumerate(zip(notes.sent, columns.split(sizes), strict=True), start=1):
        slots = own[: len(sent)] if sent.index is None else own[sent.index.to(own.device)]
        image[own] = -1
        image[slots] = i
        embeds[slots] = sent.features.to(embeds)
        if sent.into is not None:
            groups = [(sent.into == j).to(own.device) for j in range(len(sent))]
            for x in added:
                x[slots] = torch.stack([x[own[group]].sum(0) / max(1, int(group.sum())) for group in groups])
    return embeds, image, added


def close_gaps(position: Tensor, keep: Tensor, visual: Tensor) -> tuple[Tensor, Tensor]:
    """Close the gaps that dropped tokens leave in rotary positions.

    Where positions have one number, each token moves down by the number of tokens dropped before it; gaps that were
    there stay. Otherwise gaps close run by run of visual tokens and axis by axis: a coordinate that no kept token of
    the run has vanishes, and what follows the run moves down by what the run lost in height or in width, whichever is
    longer.

    Args:
        position: (axes, L).
        keep: (L,) True at tokens that stay.
        visual: (L,) True at visual tokens.

    Returns:
        The positions (axes, L), and how far what follows the prompt moves down.
    """
    if len(position) == 1:
        gone = (~keep).to(position)
        return position - (gone.cumsum(0) - gone), gone.sum()
    closed, fall, start = position.clone(), position.new_zeros(()), 0
    for is_visual, size in zip(*(x.tolist() for x in visual.unique_consecutive(return_counts=True)), strict=True):
        run = slice(start, start + size)
        closed[:, run] -= fall
        start += size
        if not is_visual:
            continue
        old, stays = position[:, run], keep[run]
        for axis, own in zip(closed, old, strict=True):
            values = own.unique()
            step = values.diff(append=values[-1:] + 1)
            vanished = step.where(~torch.isin(values, own[stays]), 0)
            axis[run] -= (vanished.cumsum(0) - vanished)[torch.searchsorted(values, own.contiguous())]
        last = closed[-2:, run][:, stays].max() if stays.any() else old[-2:].min() - fall - 1
        fall = old[-2:].max() - last
    return closed, fall


def _sizes(prompt: Prompt, notes: Notes, steps: int) -> Tensor | None:
    """Return (L + T,) how many tokens each one stands for in attention; None if all stand for one."""
    if all(sent.size is None for sent in notes.sent):
        return None
    size, columns = torch.ones(len(prompt.embeds) + steps), prompt.visual.nonzero()[:, 0].cpu()
    for sent, own in zip(notes.sent, columns.split([len(sent.before) for sent in notes.sent]), strict=True):
        if sent.size is not None and sent.index is not None:
            size[own[sent.index.cpu()]] = sent.size.cpu().float()
    return size.to(prompt.embeds.device)


def _mask(lm: Any, kind: str, x: Tensor, blocks: Tensor | None, size: Tensor | None) -> Any:
    """Make the attention mask of tokens x (1, S, d) in decoder layers of a type, in the form their back end takes.

    In a layer of the type "sliding_attention" a token sees a window of tokens. `blocks` (S,) are `Reference._blocks`.
    A key that stands for `size` (S,) tokens counts so often.
    """
    slides = kind == "sliding_attention"
    if blocks is None and size is None and not slides:
        return create_causal_mask(lm.config, x, None, None)
    i = torch.arange(x.shape[1], device=x.device)
    sees = i[:, None] >= i
    if blocks is not None:
        sees |= (blocks[:, None] == blocks) & (blocks >= 0)
    if slides:
        sees &= i[:, None] - i < lm.config.sliding_window
    counts = torch.zeros_like(sees, dtype=x.dtype) if size is None else size.log().to(x.dtype).expand_as(sees)
    return counts.masked_fill(~sees, torch.finfo(x.dtype).min)[None, None]


def _stay(layer: int, notes: Notes, origin: Tensor, image: Tensor) -> Tensor:
    """Return (S,) bool: which of the prompt's tokens stay from `layer` on."""
    shown, kept = notes.origin[layer][0].to(origin.device), notes.kept[layer][0].to(origin.device)
    if not torch.equal(shown, origin) or not torch.equal(notes.image[layer][0].to(image.device) > 0, image > 0):
        raise ValueError(f"before layer {layer} the engine showed the method other tokens than there are")
    return kept | (image == 0)
