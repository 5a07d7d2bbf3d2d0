"""An unpatched model, run by hand on shortened rows: a reference that knows nothing of vlmslim."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from prompts import visual
from tiny import DEPTH, IMAGE, VIDEO
from torch import Tensor, nn


def merged_embeddings(model: nn.Module, inputs: dict) -> Tensor:
    """(1, L, d): what the language model of an unpatched model would be fed for one unpadded row."""
    ids = inputs["input_ids"]
    assert len(ids) == 1
    embeds = model.get_input_embeddings()(ids)
    core = model.model
    if "pixel_values" in inputs:
        extra = {k: inputs[k] for k in ("image_sizes", "batch_num_images") if k in inputs}
        features = torch.cat(list(core.get_image_features(inputs["pixel_values"], **extra).pooler_output))
        embeds = embeds.masked_scatter((ids == IMAGE)[..., None], features.to(embeds))
    if "pixel_values_videos" in inputs:
        videos = core.get_video_features(inputs["pixel_values_videos"]).pooler_output
        if videos[0].numel() * len(videos) < int((ids == VIDEO).sum()) * videos[0].shape[-1]:
            videos = [torch.cat([v, core.image_newline[None]]) for v in videos]  # 5.17 adds the newline in `forward`
        features = torch.cat(list(videos))
        embeds = embeds.masked_scatter((ids == VIDEO)[..., None], features.to(embeds))
    return embeds


@contextmanager
def hidden_keys(
    layers: Sequence[nn.Module], hidden: dict[int, Tensor], size: int, dtype: torch.dtype = torch.float32
) -> Iterator[None]:
    """Hide tokens as keys while the context lasts. hidden: layer -> (S,) bool, hidden from that layer on."""
    hooks = []
    for i, layer in enumerate(layers):
        gone = torch.zeros(size, dtype=torch.bool)
        for first, mask in hidden.items():
            if i >= first:
                gone |= mask
        if gone.any():
            hooks.append(layer.register_forward_pre_hook(partial(_hide, gone, dtype), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _hide(gone: Tensor, dtype: torch.dtype, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    size, low = len(gone), torch.finfo(dtype).min
    mask = kwargs.get("attention_mask")
    if mask is None:
        mask = torch.full((size, size), low, dtype=dtype).triu(1)[None, None]
    elif mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, low)
    mask = mask.clone()
    mask[..., gone] = low
    mask[..., range(size), range(size)] = 0  # a hidden query sees itself: its output is thrown away, but is no NaN
    return args, kwargs | {"attention_mask": mask}


@dataclass
class Reference:
    """The language model of an unpatched model, run by hand on a shortened row.

    embeds    : (1, S, d)  the shortened embeddings
    position  : (S,)       their rotary positions
    origin    : (S,)       where each sits in the caller's row
    hidden    : (1, S, d)  what the language model made of them
    dropped   : layer -> (S,) bool, tokens whose keys are hidden from that layer on
    """

    model: nn.Module
    length: int
    embeds: Tensor
    position: Tensor
    origin: Tensor
    hidden: Tensor = None
    dropped: dict[int, Tensor] = field(default_factory=dict)

    def logits(self) -> Tensor:
        """(S, V) at the shortened row."""
        return self.model.lm_head(self.hidden)[0]

    def alive(self, layer: int = DEPTH) -> Tensor:
        """(S,) bool: what layer `layer` still sees; by default, what comes out at the end."""
        alive = torch.ones(len(self.origin), dtype=torch.bool)
        for start, gone in self.dropped.items():
            if layer >= start:
                alive &= ~gone
        return alive

    def full_logits(self) -> Tensor:
        """(L, V) at the caller's row: a dropped position shows the last kept token before it."""
        alive = self.alive()
        origin = self.origin[alive]
        last = torch.searchsorted(origin, torch.arange(self.length), right=True) - 1
        return self.logits()[alive][last.clamp(min=0)]


def reference(
    model: nn.Module,
    inputs: dict,
    kept: Tensor | None = None,
    *,
    positions: str = "renumbered",
    embeds: Tensor | None = None,
    drops: dict[int, Tensor] | None = None,
) -> Reference:
    """Run one unpadded row on an unpatched model.

    kept   : (S,) the caller's positions that enter the language model, ascending; None means all
    embeds : (1, S, d) instead of the model's own embeddings at `kept`
    drops  : layer -> (S,) bool, among the kept: hidden as keys from that layer on (positions stay)
    """
    assert not hasattr(model, "_vlmslim")
    length = inputs["input_ids"].shape[1]
    kept = torch.arange(length) if kept is None else kept
    short = merged_embeddings(model, inputs)[:, kept] if embeds is None else embeds
    position = torch.arange(len(kept)) if positions == "renumbered" else kept
    drops = drops or {}
    lm = model.model.language_model
    ones = torch.ones(1, len(kept), dtype=torch.long)  # without a mask, transformers takes a gap for a packed sequence
    with hidden_keys(lm.layers, drops, len(kept), short.dtype):
        out = lm(inputs_embeds=short, attention_mask=ones, position_ids=position[None], use_cache=False)
    return Reference(model, length, short, position, kept, out.last_hidden_state, drops)


def keep_only(inputs: dict, chosen: list[Tensor]) -> Tensor:
    """Caller's positions left when image i keeps its tokens `chosen[i]`."""
    length = inputs["input_ids"].shape[1]
    alive = torch.ones(length, dtype=torch.bool)
    for place, index in zip(visual(inputs), chosen, strict=True):
        alive[place] = False
        alive[place[index]] = True
    return alive.nonzero()[:, 0]
