"""The bound of every method: the same model fed directly with as few visual tokens, chosen for free."""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from vlmslim.cost.bench.prompt import Prompt
from vlmslim.patching import check_unpatched


@contextmanager
def ideal(model: nn.Module, prompt: Prompt, visual: Sequence[int]) -> Iterator[dict[str, Tensor]]:
    """Inside it the unpatched model sees only the first `visual[i]` visual tokens of each prompt in decoder layer i.

    Nobody chooses: the prompt has fewer placeholders to begin with, the encoded image is cut, a view, and between
    layers tokens are picked by an index made beforehand. Vision tower and projector run in full, as under any method
    that prunes behind them. The answers are worthless, the time is a bound.

    Args:
        model: the unpatched model, restored at the end.
        prompt: whose images are encoded.
        visual: visual tokens of a prompt for each decoder layer, never rising.

    Yields:
        The inputs of `generate` and `forward` to use inside.

    Raises:
        ValueError: a wrong number of layers, or lengths that rise or exceed the prompt's.
        RuntimeError: the model is patched.
    """
    core, layers = model.model, model.model.language_model.layers
    check_unpatched(model)
    lengths = [prompt.visual_tokens, *visual]
    if len(visual) != len(layers) or any(a < b for a, b in zip(lengths, visual, strict=False)):
        raise ValueError(
            f"{list(visual)}: give one number for each of the {len(layers)} decoder layers, never rising, and at most "
            f"{prompt.visual_tokens}, the visual tokens of the prompt"
        )
    encode = core.get_image_features
    shares = [len(part) for part in torch.arange(visual[0]).tensor_split(prompt.images)]

    def fewer(*args, **kwargs):
        out = encode(*args, **kwargs)
        out.pooler_output = [x[:k] for x, k in zip(out.pooler_output, shares * prompt.batch, strict=True)]
        return out

    fewer.__signature__ = inspect.signature(encode)  # generate() picks its arguments by name
    core.get_image_features = fewer
    pruned = _Pruned(prompt, visual)
    hooks = [
        layer.register_forward_pre_hook(partial(pruned.enter, i), with_kwargs=True)
        for i, layer in enumerate(layers)
        if visual[i] < visual[0]
    ]
    try:
        yield prompt.inputs(visual[0])
    finally:
        del core.get_image_features
        for hook in hooks:
            hook.remove()


class _Pruned:
    """Shortens the sequence between decoder layers by indices that are known beforehand."""

    def __init__(self, prompt: Prompt, visual: Sequence[int]):
        device, start, end = prompt.before.device, prompt.before.shape[1], prompt.text_tokens

        def kept(count: int, held: int) -> Tensor:
            """Places of all words and the first `count` visual tokens among `held`."""
            behind = torch.arange(start + held, end + held, device=device)
            return torch.cat([torch.arange(start + count, device=device), behind])

        self.drops = {
            i: kept(now, before)
            for i, (before, now) in enumerate(zip(visual, visual[1:], strict=False), start=1)
            if now < before
        }
        self.places = {i: kept(visual[i], visual[0]) for i in self.drops}

    def enter(self, i: int, layer: nn.Module, args: tuple, kwargs: dict):
        hidden = args[0]
        if hidden.shape[1] == 1:  # decoding: this layer's cache is shorter than the first layer's, all of it is real
            return args, kwargs | {"attention_mask": None}
        if i in self.drops:
            hidden = hidden.index_select(1, self.drops[i])
            self.rope = tuple(x.index_select(1, self.places[i]) for x in kwargs["position_embeddings"])
        mask, size = kwargs.get("attention_mask"), hidden.shape[1]
        if mask is not None:  # nothing is padded, so that a shorter causal mask is a corner of the longer one
            mask = mask[..., :size, :size] if mask.ndim == 4 else mask[:, :size]
        changed = {"position_embeddings": self.rope, "attention_mask": mask, "position_ids": None}
        return (hidden, *args[1:]), kwargs | changed
