"""The patched model computed a second time without the engine: from what the method answered, layer by layer.

A method's answers are noted while the patched model runs. Another model, which nobody has patched, is then led through
its decoder layers by hand with these features, at these places. No code of the engine takes part in that.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from vlmslim.compressor import Compressed, Compressor, ImageTokens, LayerInput
from vlmslim.doctor.prompts import LONG, Prompts
from vlmslim.doctor.runs import Witness
from vlmslim.patching import Slim


@dataclass(frozen=True)
class Sent:
    """What a method made of one image.

    before   : (n, d) the image's tokens
    features : (k, d) what it sends
    index    : (k,) the slots it takes, ascending; None: the first k
    crops    : of the image, or its frames
    """

    before: Tensor
    features: Tensor
    index: Tensor | None
    crops: int

    @property
    def copies(self) -> int:
        """Tokens that it sends more often than the image has them; than it has crops, if it made them itself.

        What is made of one blank crop is what is made of another.
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
        """Copy what a method returned for `image`, whose features were `before` (n, d)."""
        crops, index = len(image.tower), result.index
        if result.features is None:
            return cls(before, before[index], index.sort().values, crops)
        return cls(before, result.features.detach().clone(), None if index is None else index.clone(), crops)


@dataclass
class Notes:
    """What a method answered in one prefill.

    sent    : of each image, at the entrance of the language model; empty if the method does not work there
    kept    : per pruned layer, (B, S) bool, its answer
    image   : per pruned layer, (B, S) which image each token was said to be of
    origin  : per pruned layer, (B, S) where in the caller's sequence each token was said to be
    hides   : it is in training and hides tokens instead of dropping them
    """

    sent: list[Sent] = field(default_factory=list)
    kept: dict[int, Tensor] = field(default_factory=dict)
    image: dict[int, Tensor] = field(default_factory=dict)
    origin: dict[int, Tensor] = field(default_factory=dict)
    hides: bool = False

    def counts(self, layer: int) -> list[list[int]]:
        """Per row and image, the tokens that stayed from a pruned layer on."""
        kept = self.image[layer] * self.kept[layer]
        return [row.bincount(minlength=2)[1:].tolist() for row in kept]

    def compress_images(self, ask: Callable) -> Callable:
        """In place of a stage's method of that name."""

        def asked(images: list[ImageTokens]) -> list[Compressed]:
            before = [image.features.detach().clone() for image in images]  # a method may edit them
            results = ask(images)
            self.sent += map(Sent.of, images, before, results)
            return results

        return asked

    def retain(self, ask: Callable) -> Callable:
        """In place of a stage's method of that name."""

        def asked(tokens: LayerInput) -> Tensor:
            self.image[tokens.layer], self.origin[tokens.layer] = tokens.image.clone(), tokens.origin.clone()
            keep = ask(tokens)
            self.kept[tokens.layer] = keep.to(tokens.image.device, torch.bool, copy=True)
            return keep

        return asked

    def soft_retain(self, ask: Callable) -> Callable:
        """In place of a stage's method of that name."""

        def asked(tokens: LayerInput) -> Tensor | None:
            weight = ask(tokens)
            self.hides |= weight is not None
            return weight

        return asked


@contextmanager
def noted(slim: Slim) -> Iterator[Notes]:
    """Note what the stages of a patch answer. They are copies of the user's objects, and are left as they were."""
    notes, covered = Notes(), []

    def cover(stage: Compressor, *names: str) -> None:
        for name in names:
            if name not in vars(stage):
                setattr(stage, name, getattr(notes, name)(getattr(stage, name)))
                covered.append((stage, name))

    for stage in slim.stages:
        if stage.acts_before_llm:
            cover(stage.method, "compress_images")
        if stage.layers:
            cover(stage.method, "retain", "soft_retain")
    try:
        yield notes
    finally:
        for stage, name in covered:
            delattr(stage, name)


class Reference(Witness):
    """The other model, which can also be computed by hand.

    embeds : per row of the prompts, (L, d), what enters its language model
    """

    def __init__(self, model: nn.Module, prompts: Prompts):
        super().__init__(model, prompts)
        self.embeds = {row: self._embeds(row) for row in (*prompts.pictured, LONG)}

    @torch.no_grad()
    def _embeds(self, row: int) -> Tensor:
        seen = []
        note = self.model.model.language_model.register_forward_pre_hook(
            lambda lm, args, kwargs: seen.append(kwargs["inputs_embeds"][0].clone()), with_kwargs=True
        )
        try:
            self.model(**self.prompts.inputs((row,)), use_cache=False, logits_to_keep=1)
        finally:
            note.remove()
        return seen[0]

    @torch.no_grad()
    def logits(self, row: int, answer: Tensor, notes: Notes, renumbered: bool) -> tuple[Tensor, Tensor]:
        """What a prompt and an answer behind it must give, if the method answers as noted.

        An answer sees all that is kept of the prompt, and the prompt nothing of the answer; so one causal pass through
        each layer over what this layer is left with is the prefill and the decoding at once.

        Args:
            row: of the prompts.
            answer: (1, T).
            notes: of the patched model's prefill of this row.
            renumbered: whether what the entrance drops closes the gaps in the rotary positions.

        Returns:
            Places (P,) in the caller's sequence of L + T tokens, and their logits (P, V). A dropped token's place has
            those of the last token before it that reached the last layer; places before the first have none.

        Raises:
            ValueError: the method was shown other tokens than there are.
        """
        lm, length, steps = self.model.model.language_model, len(self.embeds[row]), answer.shape[1]
        embeds, image = self._entrance(row, notes)
        origin = torch.cat([(image >= 0).nonzero()[:, 0], torch.arange(length, length + steps, device=image.device)])
        position = torch.arange(len(origin), device=origin.device) if renumbered else origin
        image = torch.cat([image, image.new_zeros(steps)])[origin]
        x = torch.cat([embeds, lm.embed_tokens(answer[0])])[origin][None]
        mask, rope = create_causal_mask(lm.config, x, None, None), lm.rotary_emb(x, position_ids=position[None])
        for i, layer in enumerate(lm.layers):
            if i in notes.kept:
                stay = self._stay(i, notes, origin[:-steps], image[:-steps])
                stay = torch.cat([stay, stay.new_ones(steps)])
                x, position, origin, image = x[:, stay], position[stay], origin[stay], image[stay]
                mask = create_causal_mask(lm.config, x, None, None)
                rope = lm.rotary_emb(x, position_ids=position[None])
            out = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None)
            x = out[0] if isinstance(out, tuple) else out
        places = torch.arange(int(origin[0]), length + steps, device=origin.device)
        source = torch.searchsorted(origin, places, right=True) - 1
        return places, self.model.lm_head(lm.norm(x))[0, source].float()

    def _entrance(self, row: int, notes: Notes) -> tuple[Tensor, Tensor]:
        """Embeddings (L, d) with what the method sent, and (L,): -1 if dropped, 0 at text, i at the i-th image."""
        embeds, visual = self.embeds[row].clone(), self.prompts.visual(row)
        image = visual.long()
        if not notes.sent:
            return embeds, image
        columns = visual.nonzero()[:, 0]
        if len(columns) != sum(len(sent.before) for sent in notes.sent):
            raise ValueError(f"the method was not shown the {len(columns)} visual tokens that the prompt has")
        for i, (sent, own) in enumerate(
            zip(notes.sent, columns.split([len(sent.before) for sent in notes.sent]), strict=True), start=1
        ):
            at = own[: len(sent.features)] if sent.index is None else own[sent.index.to(own.device)]
            image[own] = -1
            image[at] = i
            embeds[at] = sent.features.to(embeds)
        return embeds, image

    @staticmethod
    def _stay(layer: int, notes: Notes, origin: Tensor, image: Tensor) -> Tensor:
        """(S,) bool: which of the prompt's tokens, as they are known here, stay from `layer` on."""
        shown, kept = notes.origin[layer][0].to(origin.device), notes.kept[layer][0].to(origin.device)
        if not torch.equal(shown, origin) or not torch.equal(notes.image[layer][0].to(image.device) > 0, image > 0):
            raise ValueError(f"before layer {layer} the method was shown other tokens than there are")
        return kept | (image == 0)
