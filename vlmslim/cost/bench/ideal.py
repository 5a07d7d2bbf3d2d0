"""The ideal: a lower bound on the time of every method that leaves the same number of visual tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.engine.families import added_layers, language_model, layer_type
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
    hooks = _PlannedDrops(core, prompt, visual).attach()
    try:
        yield prompt.inputs(visual[0])
    finally:
        del core.get_image_features
        for hook in hooks:
            hook.remove()


def _sliced(encode: Any, prompt: SyntheticPrompt, visual_tokens: int) -> Any:
    """Wrap `get_image_features`, so that the images of each prompt keep their first tokens, as evenly as possible."""
    keep = prompt.kept(visual_tokens)[prompt.image > 0].repeat(prompt.batch)

    def shortened(entries: Any) -> Any:
        """Shorten what the encoder made of images or of views: a list of features, or one tensor of all of them."""
        if isinstance(entries, Tensor) and entries.ndim == 2:
            return entries[keep]  # what DeepStack adds, in transformers 5.17: the tokens of all images in a row
        stay = keep.split([len(entry) for entry in entries])
        parts = [entry[mine] for entry, mine in zip(entries, stay, strict=True)]
        return torch.cat(parts)[None] if isinstance(entries, Tensor) else parts

    @wraps(encode)  # generate() reads the names of arguments
    def get_image_features(*args: Any, **kwargs: Any) -> Any:
        out = encode(*args, **kwargs)
        out.pooler_output = shortened(out.pooler_output)
        if getattr(out, "deepstack_features", None):
            out.deepstack_features = [shortened(features) for features in out.deepstack_features]
        return out

    return get_image_features


class _PlannedDrops:
    """Shortens the sequence between decoder layers by precomputed indices."""

    def __init__(self, core: Any, prompt: SyntheticPrompt, visual: Sequence[int]):
        self.lm, self.batch, self.first = language_model(core), prompt.batch, visual[0]
        self.drops = [i for i in range(1, len(visual)) if visual[i] < visual[i - 1]]
        self.added = added_layers(core) if self.drops else 0
        kept = {count: prompt.kept(count) for count in set(visual)}

        def among(count: int, present: int) -> Tensor:
            """Index the tokens that stay, all words and `count` visual tokens, in a sequence with `present` of them."""
            return kept[count][kept[present]].nonzero()[:, 0]

        self.of_layer = {i: among(visual[i], visual[i - 1]) for i in self.drops}  # in what enters the layer
        self.of_prompt = {i: among(visual[i], visual[0]) for i in self.drops}  # in what enters layer 0
        self.rotary: dict[str, tuple[Tensor, ...]] = {}  # by the type of the layer
        there = prompt.image > 0
        self.visual = [there[kept[visual[i]]].nonzero()[:, 0] for i in range(self.added)]
        self.among_visual = [kept[visual[i]][there & kept[visual[0]]].nonzero()[:, 0] for i in range(self.added)]

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks that shorten."""
        layers = list(self.lm.layers)
        first = self.drops[0] if self.drops else len(layers)
        hooks = [
            layer.register_forward_pre_hook(partial(self.before_layer, i), with_kwargs=True)
            for i, layer in enumerate(layers)
            if i >= first
        ]
        if self.added:
            hooks.append(self.lm.register_forward_pre_hook(self.before_lm, with_kwargs=True))
            hooks += [layers[i].register_forward_hook(partial(self.after_layer, i)) for i in range(self.added)]
        return hooks

    def before_lm(self, lm: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Take what the model adds to visual tokens after its first layers (DeepStack), because it knows no drops."""
        self.features = kwargs.get("deepstack_visual_embeds")
        return args, kwargs | {"deepstack_visual_embeds": None}

    def after_layer(self, i: int, layer: Any, args: tuple, hidden: Tensor) -> Tensor | None:
        """Add to the visual tokens that are left what the model adds after layer i."""
        if not self.features:
            return None  # decoding
        added = self.features[i].to(hidden).unflatten(0, (self.batch, self.first))[:, self.among_visual[i]]
        return hidden.index_add(1, self.visual[i], added)

    def before_layer(self, i: int, layer: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Drop tokens before layer i; later layers get the shorter mask and rotary embeddings."""
        hidden = args[0]
        if hidden.shape[1] == 1:  # decoding: the cache of this layer is shorter than that of layer 0, without padding
            return args, kwargs | {"attention_mask": None}
        if i in self.of_layer:
            hidden = hidden.index_select(1, self.of_layer[i])
            self.left, self.rotary = self.of_prompt[i], {}
        if (kind := layer_type(self.lm, i)) not in self.rotary:  # layers of one type share them
            self.rotary[kind] = tuple(x.index_select(-2, self.left) for x in kwargs["position_embeddings"])
        mask, size = kwargs.get("attention_mask"), hidden.shape[1]
        if mask is not None:  # without padding, the causal mask of a shorter sequence is a corner of the longer one
            mask = mask[..., :size, :size] if mask.ndim == 4 else mask[:, :size]
        changed = {"position_embeddings": self.rotary[kind], "attention_mask": mask, "position_ids": None}
        return (hidden, *args[1:]), kwargs | changed
