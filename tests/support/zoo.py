"""Tiny random models of the families beyond LLaVA, prompts for them, and a reference computed without vlmslim.

Each configuration is small and awkward on purpose: attention windows that permute patches, pictures that are not
square, features added inside the decoder, a window that is shorter than the prompt.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.glm4v.configuration_glm4v import Glm4vTextConfig, Glm4vVisionConfig
from transformers.models.idefics3.configuration_idefics3 import Idefics3VisionConfig
from transformers.models.ovis2.configuration_ovis2 import Ovis2VisionConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig, Qwen2VLVisionConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.smolvlm.configuration_smolvlm import SmolVLMVisionConfig

PAD, BOS, FAKE, START, END, VIDEO, IMAGE = 0, 1, 2, 3, 4, 98, 99
INDICATORS = [90, 91, 92, 93, 94]
DEPTH = 4


# --- configurations ---------------------------------------------------------------------------------------------------


def _text(kind, **options) -> dict:
    base = dict(
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
    )
    return kind(**base | options).to_dict()


def _vision(kind=hf.CLIPVisionConfig, **options) -> dict:
    base = dict(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return kind(**base | options).to_dict()


def _mrope(*section: int, **more) -> dict:
    return {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)} | more


_QWEN_TOWER = dict(num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
_QWEN_TOKENS = dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
_PINPOINTS = [[32, 64], [64, 32], [64, 64]]


def _qwen2_vl():
    tower = Qwen2VLVisionConfig(depth=3, embed_dim=16, hidden_size=32, mlp_ratio=2, **_QWEN_TOWER)
    text = _text(Qwen2VLTextConfig, rope_parameters=_mrope(1, 1, 2))
    return hf.Qwen2VLConfig(text_config=text, vision_config=tower.to_dict(), **_QWEN_TOKENS)


def _qwen2_5_vl():
    tower = Qwen2_5_VLVisionConfig(
        depth=3,
        hidden_size=16,
        intermediate_size=32,
        out_hidden_size=32,
        window_size=16,
        fullatt_block_indexes=[2],
        tokens_per_second=2,
        **_QWEN_TOWER,
    )
    text = _text(Qwen2_5_VLTextConfig, rope_parameters=_mrope(1, 1, 2))
    return hf.Qwen2_5_VLConfig(text_config=text, vision_config=tower.to_dict(), **_QWEN_TOKENS)


def _qwen3_vl():
    tower = Qwen3VLVisionConfig(
        depth=4,
        hidden_size=16,
        intermediate_size=32,
        out_hidden_size=32,
        num_position_embeddings=16,
        deepstack_visual_indexes=[0, 1, 2],
        **_QWEN_TOWER,
    )
    text = _text(Qwen3VLTextConfig, head_dim=8, rope_parameters=_mrope(2, 1, 1, mrope_interleaved=True))
    return hf.Qwen3VLConfig(text_config=text, vision_config=tower.to_dict(), **_QWEN_TOKENS)


def _glm4v():
    tower = Glm4vVisionConfig(
        depth=2, hidden_size=16, intermediate_size=32, out_hidden_size=32, image_size=32, **_QWEN_TOWER
    )
    text = _text(Glm4vTextConfig, rope_parameters=_mrope(1, 1, 2, partial_rotary_factor=1.0))
    return hf.Glm4vConfig(
        text_config=text,
        vision_config=tower.to_dict(),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=5,
        video_end_token_id=6,
    )


def _internvl():
    tower = _vision(hf.InternVLVisionConfig, image_size=[32, 32], patch_size=[8, 8])
    return hf.InternVLConfig(
        vision_config=tower, text_config=_text(hf.Qwen2Config), image_token_id=IMAGE, image_seq_length=4
    )


def _mosaic(config, vision):
    text = _text(hf.LlamaConfig)
    return config(
        vision_config=_vision(vision), text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=PAD
    )


def _vipllava():
    return hf.VipLlavaConfig(
        vision_config=_vision(projection_dim=16),
        text_config=_text(hf.LlamaConfig),
        image_token_id=IMAGE,
        vision_feature_layers=[-2, -1, 1],
    )


def _deepseek_vl():
    return hf.DeepseekVLConfig(
        vision_config=_vision(hf.SiglipVisionConfig),
        text_config=_text(hf.LlamaConfig),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )


def _llava_next_video():
    return hf.LlavaNextVideoConfig(
        vision_config=_vision(projection_dim=16),
        text_config=_text(hf.LlamaConfig),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        image_grid_pinpoints=_PINPOINTS,
        spatial_pool_stride=2,
    )


def _gemma3(window: int = 512):
    text = _text(
        hf.Gemma3TextConfig,
        head_dim=8,
        sliding_window=window,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
    )
    return hf.Gemma3Config(
        text_config=text,
        vision_config=_vision(hf.SiglipVisionConfig),
        mm_tokens_per_image=4,
        image_token_id=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )


def _mistral3():
    tower = _vision(hf.PixtralVisionConfig, image_size=64, head_dim=8)
    text = _text(hf.MistralConfig, sliding_window=None, head_dim=8)
    return hf.Mistral3Config(
        vision_config=tower, text_config=text, image_token_id=IMAGE, spatial_merge_size=2, vision_feature_layer=-1
    )


def _cohere2() -> dict:
    return _text(hf.Cohere2Config, sliding_window=512, layer_types=["full_attention"] * DEPTH)


def _aya_vision():
    return hf.AyaVisionConfig(
        vision_config=_vision(hf.SiglipVisionConfig),
        text_config=_cohere2(),
        image_token_id=IMAGE,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )


def _cohere2_vision():
    return hf.Cohere2VisionConfig(
        vision_config=_vision(hf.SiglipVisionConfig),
        text_config=_cohere2(),
        image_token_id=IMAGE,
        downsample_factor=2,
        alignment_intermediate_size=64,
    )


def _ovis2():
    tower = _vision(
        Ovis2VisionConfig, num_hidden_layers=2, vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5
    )
    return hf.Ovis2Config(
        vision_config=tower,
        text_config=_text(hf.Qwen2Config),
        image_token_id=IMAGE,
        visual_indicator_token_ids=INDICATORS,
        vocab_size=100,
        hidden_size=32,
    )


ZOO: dict[str, tuple[Callable, str]] = {
    "qwen2_vl": (_qwen2_vl, "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": (_qwen2_5_vl, "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": (_qwen3_vl, "Qwen3VLForConditionalGeneration"),
    "glm4v": (_glm4v, "Glm4vForConditionalGeneration"),
    "internvl": (_internvl, "InternVLForConditionalGeneration"),
    "smolvlm": (lambda: _mosaic(hf.SmolVLMConfig, SmolVLMVisionConfig), "SmolVLMForConditionalGeneration"),
    "idefics3": (lambda: _mosaic(hf.Idefics3Config, Idefics3VisionConfig), "Idefics3ForConditionalGeneration"),
    "vipllava": (_vipllava, "VipLlavaForConditionalGeneration"),
    "deepseek_vl": (_deepseek_vl, "DeepseekVLForConditionalGeneration"),
    "llava_next_video": (_llava_next_video, "LlavaNextVideoForConditionalGeneration"),
    "gemma3": (_gemma3, "Gemma3ForConditionalGeneration"),
    "mistral3": (_mistral3, "Mistral3ForConditionalGeneration"),
    "aya_vision": (_aya_vision, "AyaVisionForConditionalGeneration"),
    "cohere2_vision": (_cohere2_vision, "Cohere2VisionForConditionalGeneration"),
    "ovis2": (_ovis2, "Ovis2ForConditionalGeneration"),
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")  # packed pictures, positions of several numbers
STAMPED = ("qwen3_vl", "glm4v")  # text between the frames of a video
MOSAIC = ("smolvlm", "idefics3")


@cache
def _model(name: str, backend: str) -> nn.Module:
    make, kind = ZOO[name]
    torch.manual_seed(0)
    config = make()
    config._attn_implementation = backend
    model = getattr(hf, kind)(config).eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5, generator=generator)
            else:
                p.add_(torch.randn(p.shape, generator=generator) * 0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = [PAD, BOS, FAKE, START, END, VIDEO, IMAGE, *INDICATORS]
    return model


def build(name: str, backend: str = "sdpa") -> nn.Module:
    """A fresh tiny model of a family; two calls with the same arguments have the same weights."""
    return deepcopy(_model(name, backend))


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pic:
    """A picture of a height and a width whose pixels follow from `seed`; a video if it has frames."""

    seed: int = 0
    height: int = 32
    width: int = 48
    frames: int = 0


def words(seed: int, count: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(7, 90, (count,), generator=generator).tolist()


def _pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass
class _Prompt:
    """What a batch of prompts consists of, while it is written. A token's type is 1 in a picture, 2 in a video."""

    model: nn.Module
    name: str
    ids: list[list[int]] = field(default_factory=list)
    types: list[list[int]] = field(default_factory=list)
    lists: dict[str, list] = field(default_factory=dict)

    def text(self, *ids: int) -> None:
        self.ids[-1] += ids
        self.types[-1] += [0] * len(ids)

    def placeholders(self, count: int, token: int = IMAGE, kind: int = 1) -> None:
        self.ids[-1] += [token] * count
        self.types[-1] += [kind] * count

    def add(self, name: str, value) -> None:
        self.lists.setdefault(name, []).append(value)


def _show_packed(prompt: _Prompt, pic: Pic) -> None:
    rows, columns, frames = pic.height // 8 * 2, pic.width // 8 * 2, pic.frames or 1
    count = frames * rows * columns
    coarse = _pixels(pic.seed + 7, count // 16 + 1, 96).repeat_interleave(16, 0)[:count]
    kind = "video" if pic.frames else "image"
    prompt.add("pixel_values_videos" if pic.frames else "pixel_values", _pixels(pic.seed, count, 96) + coarse)
    prompt.add(f"{kind}_grid_thw", torch.tensor([[frames, rows, columns]]))
    tokens = rows * columns // 4
    stamped = bool(pic.frames) and prompt.name in STAMPED
    for i, size in enumerate([tokens] * frames if stamped else [tokens * frames]):
        prompt.text(*([10 + i] if stamped else []), START)
        token = VIDEO if pic.frames and prompt.name != "glm4v" else IMAGE
        prompt.placeholders(size, token, 2 if pic.frames else 1)
        prompt.text(END)


def _tiles(pic: Pic) -> int:
    return 3 if pic.width > 40 else 1


def _show_tiles(prompt: _Prompt, pic: Pic) -> None:
    prompt.add("pixel_values", _pixels(pic.seed, _tiles(pic), 3, 32, 32))
    prompt.text(START)
    prompt.placeholders(4 * _tiles(pic))
    prompt.text(END)


def _show_parted(prompt: _Prompt, pic: Pic) -> None:
    """Tiles with a token between them."""
    coarse = _pixels(pic.seed + 7, _tiles(pic), 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    prompt.add("pixel_values", _pixels(pic.seed, _tiles(pic), 3, 32, 32) + coarse)
    prompt.text(START)
    for i in range(_tiles(pic)):
        prompt.text(*[INDICATORS[i]] * (i > 0))
        prompt.placeholders(4)
    prompt.text(END)


def _show_mosaic(prompt: _Prompt, pic: Pic) -> None:
    prompt.lists["samples"][-1].append(_pixels(pic.seed, _tiles(pic), 3, 32, 32))
    for i in range(_tiles(pic) - 1):
        prompt.text(FAKE, 20 + i)
        prompt.placeholders(4)
    if _tiles(pic) > 1:
        prompt.text(30)  # newline
    prompt.text(FAKE, 29)
    prompt.placeholders(4)
    prompt.text(FAKE)


def _show_anyres(prompt: _Prompt, pic: Pic) -> None:
    if pic.frames:
        prompt.add("pixel_values_videos", _pixels(pic.seed, 1, 2, 3, 32, 32))  # stacked: all have as many frames
        return prompt.placeholders(4 * 2, VIDEO, 2)
    pixels, size = _pixels(pic.seed, 1, 5, 3, 32, 32), torch.tensor([[pic.height, pic.width]])
    prompt.add("pixel_values", pixels)
    prompt.add("image_sizes", size)
    prompt.placeholders(len(prompt.model.model.get_image_features(pixels, size).pooler_output[0]))


def _show_pixtral(prompt: _Prompt, pic: Pic) -> None:
    pixels = torch.zeros(1, 3, 64, 64)
    pixels[:, :, : pic.height, : pic.width] = _pixels(pic.seed, 1, 3, pic.height, pic.width)
    prompt.add("pixel_values", pixels)
    prompt.add("image_sizes", torch.tensor([[pic.height, pic.width]]))
    rows = pic.height // 16
    for row in range(rows):
        prompt.placeholders(pic.width // 16)
        prompt.text(5 if row < rows - 1 else 6)


def _show_view(prompt: _Prompt, pic: Pic) -> None:
    coarse = _pixels(pic.seed + 7, 1, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    pixels = _pixels(pic.seed, 1, 3, 32, 32) + coarse
    prompt.add("pixel_values", pixels)
    prompt.text(START)
    prompt.placeholders(len(prompt.model.model.get_image_features(pixels).pooler_output[0]))
    prompt.text(END)


_SHOW = dict.fromkeys(QWEN, _show_packed) | dict.fromkeys(MOSAIC, _show_mosaic)
_SHOW |= dict.fromkeys(("aya_vision", "cohere2_vision", "ovis2"), _show_parted)
_SHOW |= {"internvl": _show_tiles, "llava_next_video": _show_anyres, "mistral3": _show_pixtral}


@torch.no_grad()
def batch(name: str, model: nn.Module, rows: list[list], padding: str = "left") -> dict:
    """Inputs of the model for rows of token ids and `Pic`s."""
    prompt = _Prompt(model, name)
    for row in rows:
        prompt.ids.append([])
        prompt.types.append([])
        prompt.add("samples", [])
        for x in row:
            if isinstance(x, Pic):
                _SHOW.get(name, _show_view)(prompt, x)
            else:
                prompt.text(x)
    width = max(map(len, prompt.ids))

    def padded(lines: list[list[int]], fill: int) -> Tensor:
        fills = [[fill] * (width - len(line)) for line in lines]
        return torch.tensor([f + x if padding == "left" else x + f for f, x in zip(fills, lines, strict=True)])

    inputs = {
        "input_ids": padded(prompt.ids, PAD),
        "attention_mask": padded([[1] * len(line) for line in prompt.ids], 0),
    }
    types = padded(prompt.types, 0)
    if name in QWEN:
        inputs["mm_token_type_ids"] = types
    if name == "gemma3":
        inputs["token_type_ids"] = (types == 1).long()
    samples = prompt.lists.pop("samples")
    if name in MOSAIC and any(samples):
        views = [torch.cat(x) if x else torch.zeros(0, 3, 32, 32) for x in samples]
        most = max(map(len, views))
        inputs["pixel_values"] = torch.stack([torch.cat([x, torch.zeros(most - len(x), 3, 32, 32)]) for x in views])
    return inputs | {key: torch.cat(values) for key, values in prompt.lists.items()}


ROWS = [[BOS, Pic(0, 32, 48), *words(0, 5)], [BOS, *words(1, 4), Pic(1, 32, 32), *words(2, 9)]]
SEVERAL = [
    [BOS, Pic(3, 32, 48), *words(6, 2), Pic(4, 32, 32), *words(7, 4)],
    [BOS, *words(8, 3), Pic(5, 48, 32), *words(9, 5)],
]
FILM = [
    [BOS, Pic(6, 32, 32, frames=2), *words(3, 4), Pic(0, 32, 48), *words(4, 3)],
    [BOS, *words(5, 3), Pic(8, 32, 48, frames=3), *words(6, 6)],
]


def film(name: str) -> list[list]:
    """Rows with videos, and with pictures beside them where a family can tell them apart."""
    both = name != "glm4v"  # its frames have the placeholder of pictures
    return [[x for x in row if both or not isinstance(x, Pic) or x.frames] for row in FILM]


def visual(inputs: dict, row: int = 0) -> Tensor:
    """(L,) bool: the caller's positions of visual tokens."""
    ids = inputs["input_ids"][row]
    return (ids == IMAGE) | (ids == VIDEO)


# --- a reference that knows nothing of vlmslim ------------------------------------------------------------------------


class Reference:
    """The language model of an unpatched model, run by hand on some tokens of one unpadded row."""

    def __init__(self, name: str, model: nn.Module, inputs: dict):
        self.name, self.model, self.inputs = name, model, inputs
        self.lm = getattr(model.model, "language_model", None) or model.model.text_model
        self.seen: dict = {}
        note = self.lm.register_forward_pre_hook(lambda m, args, kwargs: self.seen.update(kwargs), with_kwargs=True)
        with torch.no_grad():
            model(**inputs)
        note.remove()

    def position(self) -> Tensor:
        """Rotary positions of the row: (1, L), or (axes, 1, L)."""
        position = self.seen.get("position_ids")
        length = self.inputs["input_ids"].shape[1]
        return torch.arange(length)[None] if position is None else position

    @torch.no_grad()
    def logits(self, kept: Tensor, position: Tensor | None = None, hidden: dict[int, Tensor] | None = None) -> Tensor:
        """Logits (S, V) of the tokens `kept` (S,).

        position: of them; by default, those that they had in the row.
        hidden: layer -> (S,) bool, tokens whose keys are hidden from that layer on.
        """
        call = {k: v for k, v in self.seen.items() if k not in ("input_ids", "cache", "past_key_values")}
        embeds = call.pop("inputs_embeds")[:, kept]
        call["position_ids"] = self.position()[..., kept] if position is None else position
        call |= {"attention_mask": torch.ones(1, len(kept), dtype=torch.long), "use_cache": False}
        if call.get("visual_pos_masks") is not None:
            there = call["visual_pos_masks"][0]
            chosen = (there.cumsum(0) - 1)[kept][there[kept]]
            call["visual_pos_masks"] = there[kept][None]
            call["deepstack_visual_embeds"] = [x[chosen] for x in call["deepstack_visual_embeds"]]
        hooks = self._hide(hidden or {}, len(kept), embeds.dtype)
        try:
            if self.name == "gemma3":  # the core makes the masks
                types = self.inputs["token_type_ids"][:, kept]
                names = ("attention_mask", "position_ids", "use_cache")
                out = self.model.model(
                    inputs_embeds=embeds, token_type_ids=types, **{name: call[name] for name in names}
                )
            else:
                out = self.lm(inputs_embeds=embeds, **call)
        finally:
            for hook in hooks:
                hook.remove()
        return self.model.lm_head(out.last_hidden_state)[0]

    def _hide(self, hidden: dict[int, Tensor], size: int, dtype: torch.dtype) -> list:
        hooks = []
        low = torch.finfo(dtype).min
        for i, layer in enumerate(self.lm.layers):
            gone = torch.zeros(size, dtype=torch.bool)
            for first, mask in hidden.items():
                if i >= first:
                    gone |= mask

            def hide(module, args, kwargs, gone=gone):
                mask = kwargs.get("attention_mask")
                if mask is None:
                    mask = torch.full((size, size), low).triu(1)[None, None]
                elif mask.dtype == torch.bool:
                    mask = torch.zeros(mask.shape).masked_fill(~mask, low)
                mask = mask.clone()
                mask[..., gone] = low
                mask[..., range(size), range(size)] = 0
                return args, kwargs | {"attention_mask": mask}

            if gone.any():
                hooks.append(layer.register_forward_pre_hook(hide, with_kwargs=True))
        return hooks


def renumbered(position: Tensor, kept: Tensor, there: Tensor) -> Tensor:
    """Close the gaps in positions (1, L) or (axes, 1, L) by hand, run by run of the visual tokens `there` (L,) bool."""
    p = position[:, 0] if position.ndim == 3 else position
    length = p.shape[1]
    keep = torch.zeros(length, dtype=torch.bool)
    keep[kept] = True
    if position.ndim == 2:
        return (p - (~keep).cumsum(0))[:, kept]
    out, shift, start = p.clone(), 0, 0
    while start < length:
        end = start
        while end < length and there[end] == there[start]:
            end += 1
        run = slice(start, end)
        out[:, run] = p[:, run] - shift
        if there[start]:
            before = int(p[-2:, run].max())
            for axis in range(len(p)):
                values = sorted(set(p[axis, run].tolist()))
                held = set(p[axis, run][keep[run]].tolist())
                fall, gone = {}, 0
                for i, value in enumerate(values):
                    fall[value] = gone
                    if value not in held:
                        gone += values[i + 1] - value if i + 1 < len(values) else 1
                out[axis, run] -= torch.tensor([fall[x] for x in p[axis, run].tolist()])
            stays = keep[run]
            after = int(out[-2:, run][:, stays].max()) if stays.any() else int(p[-2:, run].min()) - shift - 1
            shift = before - after
        start = end
    return out[:, kept][:, None]
