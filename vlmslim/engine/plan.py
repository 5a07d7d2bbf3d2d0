"""What a prefill decided: which tokens each run of layers sees, and what the KV cache holds.

A `Plan` is an attribute of the KV cache that it describes, so it dies with the cache, two conversations cannot mix,
and there is no state to forget to reset.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

_ATTRIBUTE = "_vlmslim_plan"


@dataclass
class Layout:
    """Which tokens of the caller's sequence a run of decoder layers sees, and where they stand.

    It lives on the host, where placeholders are counted anyway: the many small steps of this bookkeeping take a
    fraction of what launching them on a device would.

    mask     : (B, S) False at padding
    position : (B, S) rotary position
    tags     : (3, B, S), also as `image`, `place` and `origin`, (B, S) each: 0 at text and padding, i at the tokens of
               the row's i-th image; 1 + its place in that image, or 0; its index in the caller's sequence. None where
               nothing is pruned between layers, because nobody asks for them then
    source   : (B, L) which token here stands for each of the caller's: the last one kept up to there, or -1. None while
               nothing has been dropped: rows then stand as the caller padded them, later they are padded on the left
    """

    mask: np.ndarray
    position: np.ndarray
    tags: np.ndarray | None = None
    source: np.ndarray | None = None

    def __post_init__(self):
        if self.tags is not None:
            self.image, self.place, self.origin = self.tags

    @classmethod
    def of(cls, mask: Tensor, position: Tensor, tagged: bool) -> "Layout":
        """Of a whole sequence, as text alone: (B, L) each. Waits for the device."""
        layout = cls(mask.cpu().numpy(), position.cpu().numpy(), np.zeros((3, *mask.shape), int) if tagged else None)
        if tagged:
            layout.origin[:] = np.arange(mask.shape[1])
        return layout

    @cached_property
    def upto(self) -> np.ndarray:
        """(B, S) how many tokens, padding not counted, each row has up to there."""
        return self.mask.cumsum(1)

    @property
    def last(self) -> np.ndarray:
        """(B,) index of each row's last token."""
        return (self.mask * np.arange(1, self.mask.shape[1] + 1)).argmax(1)

    def select(self, keep: np.ndarray, renumber: bool = False) -> "Selection | None":
        """Drop all but the `keep` tokens (B, S); None if everything stays.

        With `renumber` the rotary position of a kept token falls by the tokens dropped before it in its row.
        """
        keep = keep & self.mask
        upto = keep.cumsum(1)
        dropped = self.upto - upto
        if not dropped[:, -1].any():
            return None
        counts = upto[:, -1]
        size = counts.max()
        rows, index = np.arange(len(keep))[:, None], keep.argsort(axis=1, kind="stable")[:, keep.shape[1] - size :]
        mask = keep[rows, index]
        position = (self.position - dropped if renumber else self.position)[rows, index]
        tags = None if self.tags is None else self.tags[:, rows, index]
        if tags is not None and not mask.all():
            tags[:2] *= mask  # a padded slot is some other token's leftover: clear its tags
        target = np.where(upto > 0, upto + (size - 1 - counts)[:, None], -1)
        source = target
        if self.source is not None:
            source = np.where(self.source < 0, -1, np.take_along_axis(target, self.source.clip(min=0), axis=1))
        return Selection(Layout(mask, position, tags, source), index, target, counts, dropped[:, -1:])


@dataclass
class Selection:
    """The outcome of `Layout.select`.

    layout  : the kept tokens
    index   : (B, S') picks them from the old sequence
    target  : (B, S) where in the new one each kept token went
    counts  : (B,) tokens of each row, padding not counted
    dropped : (B, 1) tokens that each row lost
    """

    layout: Layout
    index: np.ndarray
    target: np.ndarray
    counts: np.ndarray
    dropped: np.ndarray


@dataclass
class Segment:
    """The tokens of one forward that a run of decoder layers sees, on the device.

    mask     : (B, S) False at padding
    position : (B, S) rotary position
    padded   : some row has padding
    layout   : the same on the host; None in a forward that brought no images
    source   : (B * L,) what `restore` picks from the rows of all samples; None while nothing has been dropped
    empty    : (B, L, 1) places of which nothing is left; None where there are none
    """

    mask: Tensor
    position: Tensor
    padded: bool = True
    layout: Layout | None = None
    source: Tensor | None = None
    empty: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Segment":
        """Bring a layout of which something has been dropped to the device.

        What `restore` will need too: behind a forward none of this is in the processor's caches any more.
        """
        source, empty = layout.source, layout.source < 0
        gaps = empty.any()
        flat = flat_rows(source.clip(min=0) if gaps else source, layout.mask.shape[1])
        mask, position, flat = upload(device, layout.mask, layout.position, flat)
        segment = cls(mask, position, not layout.mask.all(), layout, flat)
        if gaps:
            (segment.empty,) = upload(device, empty[..., None])
        return segment

    @property
    def whole(self) -> bool:
        """Nothing has been dropped."""
        return self.layout is None or self.layout.source is None

    def restore(self, hidden: Tensor) -> Tensor:
        """Put hidden states (B, S, d) back where the caller expects them: (B, L, d).

        A dropped token's place takes the state of the last kept token before it, because that is the one which
        predicts the next token: so a loss or a log-likelihood over the caller's labels is the one of the shortened
        sequence. Places before the first kept token are zero.
        """
        if self.whole:
            return hidden
        source = self.source.to(hidden.device)
        restored = hidden.flatten(0, 1).index_select(0, source).unflatten(0, self.layout.source.shape)
        return restored if self.empty is None else restored.masked_fill_(self.empty.to(hidden.device), 0)


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Bring arrays from the host to a device."""
    return [torch.from_numpy(array).to(device) for array in arrays]


def flat_rows(index: np.ndarray, size: int) -> np.ndarray:
    """Where tokens stand among those of all rows: (B, q), of rows of `size`, to (B * q,)."""
    return (index + np.arange(0, len(index) * size, size)[:, None]).ravel()


def pick_rows(x: Tensor, index: np.ndarray) -> Tensor:
    """Take tokens, x (B, S, d), that the host has chosen, (B, q): (B, q, d)."""
    (flat,) = upload(x.device, flat_rows(index, x.shape[1]))
    return x.flatten(0, 1).index_select(0, flat).unflatten(0, index.shape)


def joined(before: Tensor | None, mask: Tensor) -> Tensor:
    """One mask after the other, (B, P) and (B, S) -> (B, P + S); None stands for an empty one."""
    return mask if before is None else torch.cat([before, mask], dim=1)


@dataclass
class Plan:
    """What a KV cache holds after the last forward that dropped something.

    length : tokens of the caller's sequence that the cache accounts for
    shift  : (B, 1) how far the rotary positions of later tokens move down
    masks  : per decoder layer, (B, P) False at cached padding; neighbours share
    padded : some mask is not all True
    tail   : tokens at the end of the sequence, in every row, of which none was dropped
    """

    length: int
    shift: Tensor
    masks: list[Tensor]
    padded: bool
    tail: int = 0

    @classmethod
    def of(cls, cache: Cache | None) -> "Plan | None":
        """The plan of a cache, if it has one and still holds what it describes.

        Speculative decoding prefills the prompt together with a guess, and crops the cache when the guess was wrong;
        the plan is then cut likewise.

        Raises:
            ValueError: the cache was cropped into tokens of which some were dropped.
        """
        plan = getattr(cache, _ATTRIBUTE, None)
        if plan is None or (held := cache.get_seq_length(0)) == 0:
            return None
        cropped = plan.masks[0].shape[1] - held
        if cropped > plan.tail:
            raise ValueError(
                "the KV cache was cropped into its compressed prompt, of which no token boundary is left; crop only "
                "what came after the last image, or prefill again"
            )
        if cropped > 0:
            cut = {id(mask): mask[:, :-cropped] for mask in plan.masks}
            masks = [cut[id(mask)] for mask in plan.masks]
            plan = cls(plan.length - cropped, plan.shift, masks, plan.padded, plan.tail - cropped)
            plan.attach(cache)
        return plan

    def attach(self, cache: Cache) -> None:
        """Make this the plan of `cache`."""
        setattr(cache, _ATTRIBUTE, self)

    def seen(self, cache: Cache) -> int:
        """Tokens of the caller's sequence behind `cache`, those decoded since the plan was made included."""
        return self.length + cache.get_seq_length(0) - self.masks[0].shape[1]
