"""What a KV cache holds after a prefill that dropped tokens.

A `Plan` is an attribute of the cache that it describes. So it dies with the cache, two conversations cannot mix, and
there is no state to forget to reset.
"""

from dataclasses import dataclass

from torch import Tensor
from transformers import Cache

_ATTRIBUTE = "_vlmslim_plan"


@dataclass
class Plan:
    """What a KV cache holds after the last forward that dropped tokens.

    length : tokens of the caller's sequence that the cache accounts for
    shift  : (B, 1) how far the rotary positions of later tokens move down
    masks  : for each run of decoder layers, its first layer and (B, P), False at cached padding
    padded : whether some mask is not all True
    tail   : tokens at the end of the sequence, in every row, of which none was dropped
    """

    length: int
    shift: Tensor
    masks: list[tuple[int, Tensor]]
    padded: bool
    tail: int = 0

    @classmethod
    def of(cls, cache: Cache | None) -> "Plan | None":
        """Return the plan of a cache, if the cache has one and still holds what the plan describes.

        Speculative decoding prefills the prompt together with a guess, and crops the cache if the guess was wrong. The
        plan is then cropped too.

        Raises:
            ValueError: the cache was cropped into tokens of which some were dropped.
        """
        plan = getattr(cache, _ATTRIBUTE, None)
        if cache is None or plan is None or (held := cache.get_seq_length(0)) == 0:
            return None
        cropped = plan.held - held
        if cropped > plan.tail:
            raise ValueError(
                "the KV cache was cropped into its compressed prompt, of which no token boundary is left; crop only "
                "what came after the last image, or prefill again"
            )
        if cropped > 0:
            masks = [(first, mask[:, :-cropped]) for first, mask in plan.masks]
            plan = cls(plan.length - cropped, plan.shift, masks, plan.padded, plan.tail - cropped)
            plan.attach(cache)
        return plan

    @property
    def held(self) -> int:
        """Tokens that layer 0 had cached when the plan was made."""
        return self.masks[0][1].shape[1]

    def attach(self, cache: Cache) -> None:
        """Make this the plan of `cache`."""
        setattr(cache, _ATTRIBUTE, self)

    def seen(self, cache: Cache) -> int:
        """Count the caller's tokens that `cache` accounts for, those decoded after the plan was made included."""
        return self.length + cache.get_seq_length(0) - self.held
