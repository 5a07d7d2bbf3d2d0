"""What a prefill decided, in two records: which tokens each run of layers sees, and what the KV cache holds.

A `Plan` is an attribute of the KV cache that it describes, so it dies with the cache, two conversations cannot mix,
and there is no state to forget to reset.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from vlmslim.attention import take

_ATTRIBUTE = "_vlmslim_plan"


@dataclass
class Segment:
    """The tokens of one forward that a run of decoder layers sees.

    mask     : (B, S) False at padding
    image    : (B, S) 0 at text and padding, i at the tokens of the row's i-th image
    position : (B, S) rotary position
    origin   : (B, S) index in the caller's sequence
    whole    : nothing has been dropped, so rows stand as the caller padded them; else they are padded on the left
    padded   : some row has padding
    """

    mask: Tensor
    image: Tensor
    position: Tensor
    origin: Tensor
    whole: bool = True
    padded: bool = True

    def select(self, keep: Tensor) -> "Selection":
        """Drop all but the `keep` tokens (B, S). Costs one synchronisation with the device."""
        keep = keep & self.mask
        counts, before = torch.stack([keep.sum(1), self.mask.sum(1)]).tolist()
        if counts == before:
            return Selection(self, None, counts, before)
        size = max(counts)
        index = keep.byte().argsort(dim=1, stable=True)[:, keep.shape[1] - size :]
        mask = keep.gather(1, index)  # a padded slot is some other token's leftover: clear its flags
        image = self.image.gather(1, index) * mask
        position, origin = (x.gather(1, index) for x in (self.position, self.origin))
        return Selection(Segment(mask, image, position, origin, False, min(counts) < size), index, counts, before)

    def restore(self, hidden: Tensor, length: int) -> Tensor:
        """Put hidden states (B, S, d) back where the caller expects them: (B, length, d).

        A dropped token's place takes the state of the last kept token before it, because that is the one which
        predicts the next token: so a loss or a log-likelihood over the caller's labels is the one of the shortened
        sequence. Places before the first kept token are zero.
        """
        if self.whole:
            return hidden
        size = self.mask.shape[1]
        mask, origin = self.mask.to(hidden.device), self.origin.to(hidden.device)
        kept = torch.zeros(len(mask), length, dtype=torch.long, device=hidden.device)
        kept.scatter_add_(1, origin, mask.long())  # padded slots add nothing
        number = kept.cumsum(1)  # of kept tokens so far
        source = number - 1 + size - mask.sum(1, keepdim=True)
        return take(hidden, source.clamp(min=0)).masked_fill_((number == 0)[..., None], 0)


@dataclass
class Selection:
    """The outcome of `Segment.select`.

    segment : the segment of the kept tokens; the old one if everything stays
    index   : (B, S') picks them from the old sequence; None if everything stays
    counts  : tokens of each row afterwards, padding not counted
    before  : and before
    """

    segment: Segment
    index: Tensor | None
    counts: list[int]
    before: list[int]


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
