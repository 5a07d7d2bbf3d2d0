"""Tiny random models of every family, prompts for them, and a reference computed without vlmslim.

The weights are drawn with fan-in scale: at transformers' default initialisation attention is nearly flat, and a model
whose attention is flat doesn't notice a wrong rotary position.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

PAD, BOS, VIDEO, IMAGE = 0, 1, 98, 99
FAMILIES = ("llava", "siglip", "next", "onevision")
BACKENDS = ("eager", "sdpa")
DEPTH = 4
SIDE = 32  # pixels; 4 x 4 patches
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


def _text(config, **options):
    return config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=DEPTH,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
        **options,
    )


def _vision(config, **options):
    return config(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=8,
        **options,
    )


def _config(family: str):
    clip = dict(vision_config=_vision(CLIPVisionConfig, projection_dim=16), image_token_id=IMAGE)
    siglip = dict(
        vision_config=_vision(SiglipVisionConfig),
        image_token_id=IMAGE,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    if family == "llava":
        return LlavaConfig(text_config=_text(LlamaConfig), **clip), LlavaForConditionalGeneration
    if family == "siglip":
        return LlavaConfig(text_config=_text(LlamaConfig), **siglip), LlavaForConditionalGeneration
    if family == "next":
        text = _text(MistralConfig, sliding_window=None)
        config = LlavaNextConfig(text_config=text, image_grid_pinpoints=PINPOINTS, **clip)
        return config, LlavaNextForConditionalGeneration
    config = LlavaOnevisionConfig(
        text_config=_text(Qwen2Config),
        image_grid_pinpoints=PINPOINTS,
        video_token_id=VIDEO,
        vision_aspect_ratio="anyres_max_9",
        **siglip,
    )
    return config, LlavaOnevisionForConditionalGeneration


@cache
def _model(family: str, backend: str) -> nn.Module:
    torch.manual_seed(0)
    config, cls = _config(family)
    config._attn_implementation = backend
    model = cls(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5, generator=generator)
            else:  # biases, norms and the newline: none of them may be an identity
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, BOS, VIDEO, IMAGE]
    return model


def tiny(family: str, backend: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """A fresh tiny model; two calls with the same arguments have the same weights."""
    return deepcopy(_model(family, backend)).to(dtype)


# --- prompts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """An image of a given size (height, width) whose pixels follow from `seed`."""

    seed: int = 0
    size: tuple[int, int] = (60, 30)


@dataclass(frozen=True)
class Clip:
    """A video of some frames whose pixels follow from `seed`."""

    seed: int = 0
    frames: int = 3


Row = list  # of token ids, Pictures and Clips


def words(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(2, 90, (count,), generator=generator).tolist()


def _pixels(seed: int, crops: int) -> Tensor:
    """Patches of an image that differ in mean and contrast, so that tokens differ as those of real images do."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(crops, 3, SIDE, SIDE, generator=generator)
    coarse = torch.randn(crops, 3, 4, 4, generator=generator)
    return pixels + coarse.repeat_interleave(8, 2).repeat_interleave(8, 3)


@cache
def visual_tokens(family: str, size: tuple[int, int], alone: bool = True) -> int:
    """How many tokens a picture of `size` has, by asking the model itself. `alone`: the only image of its row."""
    if family in ("llava", "siglip"):
        return 16
    extra = {} if alone or family == "next" else dict(batch_num_images=torch.tensor([2]))
    n = 1 if alone or family == "next" else 2
    model = _model(family, "sdpa").model
    with torch.no_grad():
        out = model.get_image_features(torch.zeros(n, 5, 3, SIDE, SIDE), torch.tensor([size] * n), **extra)
    return len(out.pooler_output[0])


def clip_tokens(frames: int) -> int:
    return frames * 4 + 1


def family_of(model: nn.Module) -> str:
    names = {LlavaNextForConditionalGeneration: "next", LlavaOnevisionForConditionalGeneration: "onevision"}
    if type(model) in names:
        return names[type(model)]
    return "siglip" if model.config.vision_config.model_type == "siglip_vision_model" else "llava"


def batch(model: nn.Module, rows: list[Row], padding: str = "left") -> dict:
    """Inputs of the model for `rows`. padding: "left", "right", or "none" (equal rows, no attention mask)."""
    family = family_of(model)
    pictures, sizes, per_row, clips, ids = [], [], [], [], []
    for row in rows:
        seen = [x for x in row if isinstance(x, Picture)]
        per_row.append(len(seen))
        line = []
        for x in row:
            if isinstance(x, Picture):
                pictures.append(_pixels(x.seed, 5 if family in ("next", "onevision") else 1))
                sizes.append(x.size)
                line += [IMAGE] * visual_tokens(family, x.size, len(seen) == 1)
            elif isinstance(x, Clip):
                clips.append(_pixels(500 + x.seed, x.frames))
                line += [VIDEO] * clip_tokens(x.frames)
            else:
                line.append(x)
        ids.append(line)
    width = max(map(len, ids))
    if padding == "none":
        assert all(len(line) == width for line in ids), "rows of different lengths need padding"
        inputs = dict(input_ids=torch.tensor(ids))
    else:
        left = padding == "left"
        fill = [[PAD] * (width - len(line)) for line in ids]
        ones = [[1] * len(line) for line in ids]
        zero = [[0] * len(pad) for pad in fill]
        inputs = dict(
            input_ids=torch.tensor([p + x if left else x + p for p, x in zip(fill, ids, strict=True)]),
            attention_mask=torch.tensor([z + o if left else o + z for z, o in zip(zero, ones, strict=True)]),
        )
    if pictures:
        stacked = torch.stack(pictures)
        inputs["pixel_values"] = (stacked if family in ("next", "onevision") else stacked[:, 0]).to(model.dtype)
        if family in ("next", "onevision"):
            inputs["image_sizes"] = torch.tensor(sizes)
        if family == "onevision":
            inputs["batch_num_images"] = torch.tensor([n for n in per_row if n])
    if clips:
        inputs["pixel_values_videos"] = torch.stack(clips).to(model.dtype)
    return inputs


ROWS: list[Row] = [  # different images, different sizes, different text lengths
    [BOS, Picture(0, (60, 30)), *words(0, 5)],
    [BOS, *words(1, 4), Picture(1, (32, 64)), *words(2, 9)],
]
LONG_ROWS: list[Row] = [*ROWS, [BOS, *words(3, 7)], [BOS, *words(4, 2), Picture(2, (60, 60)), *words(5, 3)]]
SEVERAL: list[Row] = [
    [BOS, Picture(3, (60, 30)), *words(6, 2), Picture(4, (32, 64)), *words(7, 4)],
    [BOS, *words(8, 3), Picture(5, (64, 64)), *words(9, 5)],
]
EQUAL: list[Row] = [  # two rows of one length, so that no mask is needed
    [BOS, Picture(6), *words(10, 6)],
    [BOS, *words(11, 3), Picture(7), *words(12, 3)],
]


# --- a reference that knows nothing of vlmslim ----------------------------------------------------------------------


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
    n = len(kept)
    hooks = []
    for i, layer in enumerate(lm.layers):
        gone = torch.zeros(n, dtype=torch.bool)
        for start, mask in drops.items():
            if i >= start:
                gone |= mask
        if gone.any():
            lowest = torch.finfo(short.dtype).min
            causal = torch.full((n, n), lowest, dtype=short.dtype).triu(1)
            causal[:, gone] = lowest
            causal.fill_diagonal_(0)  # a dropped query sees itself: its output is thrown away, but must not be NaN

            def hide(module, args, kwargs, causal=causal):
                return args, kwargs | {"attention_mask": causal[None, None]}

            hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        ones = torch.ones(1, n, dtype=torch.long)  # without a mask, transformers takes a gap for a packed sequence
        out = lm(inputs_embeds=short, attention_mask=ones, position_ids=position[None], use_cache=False)
        hidden = out.last_hidden_state
    finally:
        for hook in hooks:
            hook.remove()
    return Reference(model, length, short, position, kept, hidden, drops)


def visual(inputs: dict, row: int = 0) -> list[Tensor]:
    """The caller's positions of each image or video of a row: runs of placeholders."""
    ids = inputs["input_ids"][row]
    place = ((ids == IMAGE) | (ids == VIDEO)).nonzero()[:, 0]
    if not len(place):
        return []
    breaks = (place.diff() != 1).nonzero()[:, 0] + 1
    return list(place.tensor_split(breaks.tolist()))


def all_visual(inputs: dict, row: int = 0) -> Tensor:
    """(L,) bool: the caller's positions of every image and video of a row."""
    ids = inputs["input_ids"][row]
    return (ids == IMAGE) | (ids == VIDEO)


def keep_only(inputs: dict, chosen: list[Tensor]) -> Tensor:
    """Caller's positions left when image i keeps its tokens `chosen[i]`."""
    length = inputs["input_ids"].shape[1]
    alive = torch.ones(length, dtype=torch.bool)
    for place, index in zip(visual(inputs), chosen, strict=True):
        alive[place] = False
        alive[place[index]] = True
    return alive.nonzero()[:, 0]


# --- looking at a model ---------------------------------------------------------------------------------------------


def lengths(cache) -> list[int]:
    """Tokens that each layer of a KV cache physically holds."""
    return [layer.keys.shape[-2] for layer in cache.layers]


GREEDY = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)


def greedy(model: nn.Module, inputs: dict, **options):
    """Greedy generation with the logits of every step, which are stacked to (B, T, V)."""
    out = model.generate(**inputs, **GREEDY | options)
    return out, torch.stack(out.logits, dim=1)


def same_cache(a, b) -> None:
    """Two KV caches hold the same tokens, bit for bit."""
    assert lengths(a) == lengths(b)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert torch.equal(x.keys, y.keys)
        assert torch.equal(x.values, y.values)


def valid(inputs: dict, row: int) -> Tensor:
    """(L,) bool: where row `row` is no padding."""
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"][row], dtype=torch.bool) if mask is None else mask[row].bool()


def close(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
