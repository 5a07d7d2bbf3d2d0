"""What a prefill decided: which tokens each run of layers sees, and what the KV cache holds.

A `Plan` is an attribute of the KV cache that it describes, so it dies with the cache, two conversations cannot mix,
and there is no state to forget to reset.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from vlmslim.attention import take

_ATTRIBUTE = "_vlmslim_plan"


@dataclass
class Layout:
    """Which tokens of the caller's sequence a run of decoder layers sees, and where they stand.

    It lives on the host, where placeholders are counted anyway: the many small steps of this bookkeeping take a
    fraction of what launching them on a device would.

    mask     : (B, S) False at padding
    image    : (B, S) 0 at text and padding, i at the tokens of the row's i-th image
    position : (B, S) rotary position
    origin   : (B, S) index in the caller's sequence
    whole    : nothing has been dropped, so rows stand as the caller padded them; else they are padded on the left
    """

    mask: np.ndarray
    image: np.ndarray
    position: np.ndarray
    origin: np.ndarray
    whole: bool = True

    @classmethod
    def of(cls, mask: Tensor, position: Tensor) -> "Layout":
        """Of a whole sequence, as text alone: (B, L) each. Waits for the device."""
        mask, position = mask.cpu().numpy(), position.cpu().numpy()
        return cls(mask, np.zeros(mask.shape, int), position, np.tile(np.arange(mask.shape[1]), (len(mask), 1)))

    @property
    def last(self) -> np.ndarray:
        """(B,) index of each row's last token."""
        return (self.mask * np.arange(1, self.mask.shape[1] + 1)).argmax(1)

    def select(self, keep: np.ndarray) -> "Selection | None":
        """Drop all but the `keep` tokens (B, S); None if everything stays."""
        keep = keep & self.mask
        counts = keep.sum(1)
        if (counts == self.mask.sum(1)).all():
            return None
        size = counts.max()
        index = keep.argsort(axis=1, kind="stable")[:, keep.shape[1] - size :]
        mask, image, position, origin = (
            np.take_along_axis(x, index, axis=1) for x in (keep, self.image, self.position, self.origin)
        )  # a padded slot is some other token's leftover: clear its flags
        target = keep.cumsum(1) - 1 + (size - counts)[:, None]
        return Selection(Layout(mask, image * mask, position, origin, False), index, target, counts.tolist())

    def sources(self, length: int) -> np.ndarray:
        """(B, length): which token here stands for each of the caller's: the last one kept up to there, -1 before."""
        kept = np.zeros((len(self.mask), length), int)
        rows, columns = self.mask.nonzero()
        kept[rows, self.origin[rows, columns]] = 1
        number = kept.cumsum(1)
        return np.where(number > 0, number - 1 + self.mask.shape[1] - self.mask.sum(1, keepdims=True), -1)

    def shifted(self, down: np.ndarray) -> "Layout":
        """The same tokens at rotary positions that are lower by (B, S)."""
        return replace(self, position=self.position - down)


@dataclass
class Selection:
    """The outcome of `Layout.select`.

    layout : the kept tokens
    index  : (B, S') picks them from the old sequence
    target : (B, S) where in the new one each kept token went
    counts : tokens of each row, padding not counted
    """

    layout: Layout
    index: np.ndarray
    target: np.ndarray
    counts: list[int]


@dataclass
class Segment:
    """The tokens of one forward that a run of decoder layers sees, on the device.

    mask     : (B, S) False at padding
    position : (B, S) rotary position
    padded   : some row has padding
    layout   : the same on the host; None in a forward that brought no images
    """

    mask: Tensor
    position: Tensor
    padded: bool = True
    layout: Layout | None = None

    @classmethod
    def of(cls, layout: Layout, device: torch.device) -> "Segment":
        """Bring a layout to the device."""
        return cls(*upload(device, layout.mask, layout.position), not layout.mask.all(), layout)

    @property
    def whole(self) -> bool:
        """Nothing has been dropped."""
        return self.layout is None or self.layout.whole

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """Put hidden states (B, S, d) back where the caller expects them: (B, length, d).

        A dropped token's place takes the state of the last kept token before it, because that is the one which
        predicts the next token: so a loss or a log-likelihood over the caller's labels is the one of the shortened
        sequence. Places before the first kept token are zero.
        """
        if self.whole:
            return hidden
        source = self.layout.sources(length)
        restored = take(hidden, *upload(hidden.device, source.clip(min=0)))
        if source.min() < 0:
            (empty,) = upload(hidden.device, source < 0)
            restored = restored.masked_fill(empty[..., None], 0)
        return restored


def upload(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Bring arrays from the host to a device."""
    return [torch.from_numpy(array).to(device) for array in arrays]


def joined(before: Tensor, mask: Tensor) -> Tensor:
    """One mask after the other, (B, P) and (B, S) -> (B, P + S), without a copy where the first is empty."""
    return torch.cat([before, mask], dim=1) if before.shape[1] else mask


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
