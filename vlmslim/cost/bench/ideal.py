"""The ideal: a lower bound on the time of every method that leaves the same number of visual tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.engine.families import language_model
from vlmslim.patching import check_unpatched


@contextmanager
def ideal(model: Any, prompt: SyntheticPrompt, visual: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Give the unpatched model only the first `visual[i]` visual tokens of each prompt in decoder layer i.

    This is a lower bound on prefill time: the model gets exactly as many visual tokens per layer as a method keeps, at
    no selection cost. The prompt is built shorter, image features are sliced, and drops between layers use precomputed
    indices. Vision tower and projector run in full, as under any method that prunes after them. Outputs are
    meaningless.

    Args:
        model: the unpatched model; it is restored at the end.
        prompt: the prompt to shorten.
        visual: visual tokens of a prompt in each decoder layer, never rising.

    Yields:
        The inputs of `generate` and `forward` to use inside.

    Raises:
        ValueError: a wrong number of layers, or lengths that rise or exceed those of the prompt.
        RuntimeError: the model is patched.
    """
    check_unpatched(model)
    core, layers = model.model, language_model(model.model).layers
    if len(visual) != len(layers) or any(after > before for before, after in pairwise([prompt.visual_tokens, *visual])):
        raise ValueError(
            f"{list(visual)}: give one number for each of the {len(layers)} decoder layers, never rising, and at most "
            f"{prompt.visual_tokens}, the visual tokens of the prompt"
        )
    core.get_image_features = _sliced(core.get_image_features, prompt, visual[0])
    drops = _PlannedDrops(prompt, visual)
    hooks = [
        layer.register_forward_pre_hook(partial(drops.before_layer, i), with_kwargs=True)
        for i, layer in enumerate(layers)
        if visual[i] < visual[0]
    ]
    try:
        yield prompt.inputs(visual[0])
    finally:
        del core.get_image_features
        for hook in hooks:
            hook.remove()


def _sliced(encode: Any, prompt: SyntheticPrompt, visual_tokens: int) -> Any:
    """Wrap `get_image_features`, so that the images of each prompt keep their first tokens, as evenly as possible."""
    counts = [len(part) for part in torch.arange(visual_tokens).tensor_split(prompt.images)] * prompt.batch

    @wraps(encode)  # generate() reads the names of arguments
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        out.pooler_output = [x[:k] for x, k in zip(out.pooler_output, counts, strict=True)]
        return out

    return get_image_features


class _PlannedDrops:
    """Shortens the sequence between decoder layers by precomputed indices."""

    def __init__(self, prompt: SyntheticPrompt, visual: Sequence[int]):
        device, start, end = prompt.before.device, prompt.before.shape[1], prompt.text_tokens

        def kept(count: int, present: int) -> Tensor:
            """Index all words and the first `count` visual tokens in a sequence with `present` visual tokens."""
            text_after = torch.arange(start + present, end + present, device=device)
            return torch.cat([torch.arange(start + count, device=device), text_after])

        drops = [i for i in range(1, len(visual)) if visual[i] < visual[i - 1]]
        self.of_layer = {i: kept(visual[i], visual[i - 1]) for i in drops}  # in the sequence that enters the layer
        self.of_prompt = {i: kept(visual[i], visual[0]) for i in drops}  # in the sequence that enters layer 0

    def before_layer(self, i: int, layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Drop tokens before layer i; later layers get the shorter mask and rotary embeddings."""
        hidden = args[0]
        if hidden.shape[1] == 1:  # decoding: the cache of this layer is shorter than that of layer 0, without padding
            return args, kwargs | {"attention_mask": None}
        if i in self.of_layer:
            hidden = hidden.index_select(1, self.of_layer[i])
            self.rotary = tuple(x.index_select(1, self.of_prompt[i]) for x in kwargs["position_embeddings"])
        mask, size = kwargs.get("attention_mask"), hidden.shape[1]
        if mask is not None:  # without padding, the causal mask of a shorter sequence is a corner of the longer one
            mask = mask[..., :size, :size] if mask.ndim == 4 else mask[:, :size]
        changed = {"position_embeddings": self.rotary, "attention_mask": mask, "position_ids": None}
        return (hidden, *args[1:]), kwargs | changed
