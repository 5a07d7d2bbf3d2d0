"""A KV cache of the first tokens of prompts, such as a system prompt, from which the prompts of a batch go on."""

import copy
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Cache, DynamicCache

from vlmslim.engine.families import KV_CACHE, language_model


class PrefixCache(DynamicCache):
    """The keys and values of the first tokens of prompts.

    A forward that goes on from it shows a method the words of the whole prompt, and its receipt counts the whole
    prompt, because a method and a cost must not depend on what was computed before.

    ids : (P,) the tokens
    """

    ids: np.ndarray

    @classmethod
    def of(cls, model: Any, ids: Tensor) -> "PrefixCache":
        """Prefill the tokens `ids` (P,), text alone. A patch of the model does not see them."""
        decoder = language_model(model.model)
        cache = cls(config=decoder.config)
        cache.ids = ids.cpu().numpy()
        decoder(inputs_embeds=model.get_input_embeddings()(ids[None]), use_cache=True, **{KV_CACHE: cache})
        return cache

    def rows(self, count: int) -> "PrefixCache":
        """Return a copy for a batch of so many prompts."""
        own = copy.deepcopy(self)
        own.batch_repeat_interleave(count)
        return own


def words_before(cache: Cache | None) -> np.ndarray:
    """Return the ids (P,) of the tokens of the prompt that a cache holds already; none without a `PrefixCache`."""
    if isinstance(cache, PrefixCache) and cache.get_seq_length() == len(cache.ids):
        return cache.ids
    return np.empty(0, dtype=np.int64)
