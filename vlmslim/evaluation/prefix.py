"""One prefill of the tokens with which all prompts of a batch begin, such as the system prompt, for all methods."""

from typing import Any

import torch
from torch import Tensor
from transformers import BatchFeature, DynamicCache

from vlmslim.engine.families import KV_CACHE
from vlmslim.engine.prefix import PrefixCache
from vlmslim.originals.protocol import AUTHORS


class SharedPrefix:
    """A KV cache of the beginning of prompts, which batches go on from.

    Args:
        model: a LLaVA of transformers.

    Raises:
        ValueError: the model is of another family, or its KV cache forgets the beginning.
    """

    def __init__(self, model: Any):
        kind, layers = model.config.model_type, DynamicCache(config=model.config.get_text_config()).layers
        if kind not in AUTHORS:
            raise ValueError(f"share_prefix is for the families {', '.join(AUTHORS)}, and this is {kind}; leave it out")
        if any(getattr(layer, "is_sliding", False) for layer in layers):
            raise ValueError("share_prefix: the attention of this model slides, so its KV cache forgets; leave it out")
        self._model = model
        self._cache: PrefixCache | None = None
        names = ("image_token_id", "video_token_id")
        self._pictures = [token for name in names if (token := getattr(model.config, name, None)) is not None]

    def shortened(self, inputs: BatchFeature) -> BatchFeature:
        """Return a batch that goes on from the KV cache, with its padding after the shared tokens.

        The batch itself comes back where its prompts do not begin alike before the first picture, where there is no
        picture, and where the patch drops tokens inside the decoder, because it reads all states of the prompt there.

        Args:
            inputs: of `generate()`, padded on the left.
        """
        patch = getattr(self._model, "_vlmslim", None)
        if patch is not None and any(stage.layers for stage in patch.stages):
            return inputs
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        pictured = torch.isin(ids, torch.tensor(self._pictures, device=ids.device))
        padding = (mask == 0).sum(1).tolist()
        shared = _alike([row[n:] for row, n in zip(ids.masked_fill(pictured, -1), padding, strict=True)])
        if not pictured.any() or not len(shared):
            return inputs
        if self._cache is None or self._cache.ids.tolist() != shared.tolist():
            self._cache = PrefixCache.of(self._model, shared)
        moved = {
            name: torch.stack([_moved(row, n, len(shared)) for row, n in zip(x, padding, strict=True)])
            for name, x in inputs.items()
            if getattr(x, "shape", None) == ids.shape
        }
        return BatchFeature({**inputs, **moved, KV_CACHE: self._cache.rows(len(ids))})


def _alike(rows: list[Tensor]) -> Tensor:
    """Return the tokens with which all rows begin, before any picture (-1); not the last token of a row."""
    least = min(len(row) for row in rows) - 1
    first = torch.stack([row[:least] for row in rows])
    same = ((first == first[0]) & (first >= 0)).all(0)
    return first[0, : int(same.long().cumprod(0).sum())]


def _moved(row: Tensor, padding: int, shared: int) -> Tensor:
    """Move the padding of a row from its front to the place after the shared tokens."""
    front, tokens = row[:padding], row[padding:]
    return torch.cat([tokens[:shared], front, tokens[shared:]])
