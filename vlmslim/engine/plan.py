"""The record of what a KV cache holds after a prefill that dropped tokens.

A `Plan` is an attribute of the cache that it describes. So it dies with the cache, two conversations cannot mix, and
there is no state to forget to reset.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from transformers import Cache

from vlmslim.engine.gate import RUNNING


@dataclass
class Plan:
    """The record of what a KV cache holds after the last forward that dropped tokens.

    length : tokens of the caller's sequence that the cache accounts for
    shift  : (B, 1) how far the rotary positions of later tokens move down
    masks  : for each run of decoder layers, its first layer and (B, P), False at cached padding
    lower  : for each run of decoder layers, (B, 1) how much further positions move down there; None if they do not
    sizes  : for each run of decoder layers, (B, P) how many tokens each cached key stands for; None if one each
    padded : whether some mask is not all True
    tail   : tokens at the end of the sequence, in every row, of which none was dropped
    delta  : (B, 1) rotary position minus number of tokens, where positions have several numbers; None elsewhere
    """

    length: int
    shift: Tensor
    masks: list[tuple[int, Tensor]]
    lower: list[Tensor | None]
    sizes: list[Tensor | None]
    padded: bool
    tail: int = 0
    delta: Tensor | None = None

    @classmethod
    def of(cls, cache: Cache | None) -> "Plan | None":
        """Return the plan of a cache, if the cache has one and still holds what the plan describes.

        Speculative decoding prefills the prompt together with a guess, and crops the cache if the guess was wrong. The
        plan is then cropped too.

        Raises:
            ValueError: the cache was cropped into tokens of which some were dropped.
        """
        if not isinstance(cache, CompressedCache) or (held := cache.get_seq_length(0)) == 0:
            return None
        plan = cache.plan
        cropped = plan.held - held
        if cropped > plan.tail:
            raise ValueError(
                "the KV cache was cropped into its compressed prompt, of which no token boundary is left; crop only "
                "what came after the last image, or prefill again"
            )
        if cropped > 0:
            masks = [(first, mask[:, :-cropped]) for first, mask in plan.masks]
            sizes = [None if size is None else size[:, :-cropped] for size in plan.sizes]
            length, tail = plan.length - cropped, plan.tail - cropped
            plan = cache.plan = replace(plan, length=length, masks=masks, sizes=sizes, tail=tail)
        return plan

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return len(self.shift)

    @property
    def held(self) -> int:
        """Tokens that layer 0 had cached when the plan was made."""
        return self.masks[0][1].shape[1]

    def seen(self, cache: Cache) -> int:
        """Count the caller's tokens that `cache` accounts for, those decoded after the plan was made included."""
        return self.length + cache.get_seq_length(0) - self.held

    def select(self, rows: Any) -> "Plan":
        """Return the plan of these `rows` of the cache, in this order."""
        return self._each_row(lambda x: x[rows.to(x.device) if isinstance(rows, Tensor) else rows])

    def repeat(self, times: int) -> "Plan":
        """Return the plan of a cache whose rows are repeated, each so many times in succession."""
        return self._each_row(lambda x: x.repeat_interleave(times, 0))

    def _each_row(self, change: Callable[[Tensor], Tensor]) -> "Plan":
        masks = [(first, change(mask)) for first, mask in self.masks]
        lower, sizes = ([None if x is None else change(x) for x in each] for each in (self.lower, self.sizes))
        delta = None if self.delta is None else change(self.delta)
        return replace(self, shift=change(self.shift), masks=masks, lower=lower, sizes=sizes, delta=delta)


class CompressedCache(Cache):
    """A KV cache that holds a shortened prompt. Its plan follows its rows.

    A model that does not know the plan cannot use the cache. `compressed` makes such a cache of another one, by a
    change of the class of this one instance.
    """

    plan: Plan
    kind: type[Cache]  # what it was before

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Append keys and values, in a forward that knows the plan.

        Raises:
            RuntimeError: the forward does not know it, because its model is not patched.
        """
        call = RUNNING.get()
        if call is None or call.cache is not self:
            raise RuntimeError(
                "this KV cache holds a prompt whose visual tokens were dropped, and the model that reads it now is not "
                "patched, so every position would be wrong; go on with the patched model, or prefill again"
            )
        return super().update(*args, **kwargs)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take other rows."""
        super().reorder_cache(beam_idx)  # type: ignore[arg-type]  # it asks for the older LongTensor
        self.plan = self.plan.select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self.plan = self.plan.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self.plan = self.plan.repeat(repeats)

    def reset(self) -> None:
        """Forget everything, the plan too."""
        super().reset()
        del self.plan
        self.__class__ = self.kind  # type: ignore[assignment]

    def __reduce__(self) -> tuple:
        return _restored, (self.kind,), vars(self)


def compressed(cache: Cache, plan: Plan) -> None:
    """Note in `cache` that it holds a shortened prompt."""
    if not isinstance(cache, CompressedCache):
        kind: Any = type(cache)
        cache.__class__ = _compressed_class(kind)
    assert isinstance(cache, CompressedCache)
    cache.plan = plan


@functools.cache
def _compressed_class(kind: Any) -> type[CompressedCache]:
    return type(
        f"Compressed{kind.__name__}", (CompressedCache, kind), {"kind": kind, "__doc__": CompressedCache.__doc__}
    )


def _restored(kind: Any) -> Cache:
    """Make an empty cache that `copy` or `pickle` fills."""
    cls = _compressed_class(kind)
    return cls.__new__(cls)
