"""Tiny random models of the families beyond LLaVA, prompts for them, and a reference computed without vlmslim.

Each configuration is small and awkward on purpose: attention windows that permute patches, pictures that are not
square, features added inside the decoder.
"""

from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache, partial

import prompts
import torch
import transformers as hf
from tiny import BOS, DEPTH, IMAGE, PAD, PINPOINTS, TEXT, TOWER, VIDEO, random_model
from torch import Tensor, nn
from unpatched import hidden_keys

FAKE, START, END = 2, 3, 4
INDICATORS = [90, 91, 92, 93, 94]


# --- configurations ---------------------------------------------------------------------------------------------------


def _row(classes: str, text: dict, tower: dict, **options) -> tuple[str, dict]:
    return classes, dict(text_config=TEXT | text, vision_config=tower, image_token_id=IMAGE) | options


def _mrope(*section: int, **more) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)} | more}


_CLIP = TOWER | dict(model_type="clip_vision_model", projection_dim=16)
_SIGLIP = TOWER | dict(model_type="siglip_vision_model")
_PACKED = dict(hidden_size=16, num_heads=2, patch_size=4, spatial_merge_size=2, temporal_patch_size=2)
_WIDTHS = dict(intermediate_size=32, out_hidden_size=32)
_MARKS = dict(video_token_id=VIDEO, vision_start_token_id=START, vision_end_token_id=END)
_LLAMA = dict(model_type="llama")
_COHERE = dict(model_type="cohere2", sliding_window=512, layer_types=["full_attention"] * DEPTH)
_SLIDING, _FULL = "sliding_attention", "full_attention"

#: by name: the beginning of the names of its classes, and its configuration
ZOO: dict[str, tuple[str, dict]] = {
    "qwen2_vl": _row(
        "Qwen2VL",
        _mrope(1, 1, 2),
        _PACKED | dict(depth=3, embed_dim=16, hidden_size=32, mlp_ratio=2),
        **_MARKS,
    ),
    "qwen2_5_vl": _row(
        "Qwen2_5_VL",
        _mrope(1, 1, 2),
        _PACKED | _WIDTHS | dict(depth=3, window_size=16, fullatt_block_indexes=[2], tokens_per_second=2),
        **_MARKS,
    ),
    "qwen3_vl": _row(
        "Qwen3VL",
        _mrope(2, 1, 1, mrope_interleaved=True) | dict(head_dim=8),
        _PACKED | _WIDTHS | dict(depth=4, num_position_embeddings=16, deepstack_visual_indexes=[0, 1, 2]),
        **_MARKS,
    ),
    "glm4v": _row(
        "Glm4v",
        _mrope(1, 1, 2, partial_rotary_factor=1.0),
        _PACKED | _WIDTHS | dict(depth=2, image_size=32),
        video_token_id=VIDEO,
        image_start_token_id=START,
        image_end_token_id=END,
        video_start_token_id=5,
        video_end_token_id=6,
    ),
    "internvl": _row(
        "InternVL",
        dict(model_type="qwen2"),
        TOWER | dict(image_size=[32, 32], patch_size=[8, 8]),
        image_seq_length=4,
    ),
    "smolvlm": _row("SmolVLM", _LLAMA, TOWER, scale_factor=2, pad_token_id=PAD),
    "idefics3": _row("Idefics3", _LLAMA, TOWER, scale_factor=2, pad_token_id=PAD),
    "vipllava": _row("VipLlava", _LLAMA, _CLIP, vision_feature_layers=[-2, -1, 1]),
    "deepseek_vl": _row("DeepseekVL", _LLAMA, _SIGLIP, tie_word_embeddings=False),
    "llava_next_video": _row(
        "LlavaNextVideo",
        _LLAMA,
        _CLIP,
        video_token_id=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        spatial_pool_stride=2,
    ),
    "gemma3": _row(
        "Gemma3",
        dict(
            head_dim=8,
            sliding_window=512,
            query_pre_attn_scalar=8,
            layer_types=[_SLIDING, _SLIDING, _FULL, _SLIDING],
        ),
        _SIGLIP,
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
    ),
    "mistral3": _row(
        "Mistral3",
        dict(model_type="mistral", sliding_window=None, head_dim=8),
        TOWER | dict(model_type="pixtral", image_size=64, head_dim=8),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    ),
    "aya_vision": _row(
        "AyaVision",
        _COHERE,
        _SIGLIP,
        downsample_factor=2,
        adapter_layer_norm_eps=1e-6,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    ),
    "cohere2_vision": _row("Cohere2Vision", _COHERE, _SIGLIP, downsample_factor=2, alignment_intermediate_size=64),
    "ovis2": _row(
        "Ovis2",
        dict(model_type="qwen2"),
        TOWER | dict(num_hidden_layers=2, vocab_size=40, hidden_stride=2, num_visual_indicator_tokens=5),
        visual_indicator_token_ids=INDICATORS,
        vocab_size=100,
        hidden_size=32,
    ),
}
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v")  # packed pictures, positions of several numbers
STAMPED = ("qwen3_vl", "glm4v")  # text between the frames of a video
MOSAIC = ("smolvlm", "idefics3")


def parts(name: str) -> tuple[type[nn.Module], hf.PretrainedConfig]:
    """Return the class of a family's model and its tiny configuration."""
    classes, options = ZOO[name]
    config = getattr(hf, f"{classes}Config")(**deepcopy(options))
    return getattr(hf, f"{classes}ForConditionalGeneration"), config


@cache
def _model(name: str, backend: str) -> nn.Module:
    return random_model(*parts(name), backend, [PAD, BOS, FAKE, START, END, VIDEO, IMAGE, *INDICATORS])


def build(name: str, backend: str = "sdpa") -> nn.Module:
    """Make a fresh tiny model of a family; two calls with the same arguments have the same weights."""
    return deepcopy(_model(name, backend))


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pic:
    """A picture of a height and a width whose pixels follow from `seed`; a video if it has frames."""

    seed: int = 0
    height: int = 32
    width: int = 48
    frames: int = 0


words = partial(prompts.words, first=7)  # lower ones are special


def _pixels(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _views(seed: int, count: int) -> Tensor:
    """Draw square views whose patches differ in mean."""
    coarse = _pixels(seed + 7, count, 3, 4, 4).repeat_interleave(8, 2).repeat_interleave(8, 3)
    return _pixels(seed, count, 3, 32, 32) + coarse


@dataclass
class _Prompt:
    """A batch of prompts while it is written. A token's type is 1 in a picture, 2 in a video."""

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


def _show_tiles(prompt: _Prompt, pic: Pic, parted: bool = False) -> None:
    """Write a picture as tiles, with a token between them if they are `parted`."""
    prompt.add("pixel_values", _views(pic.seed, _tiles(pic)))
    prompt.text(START)
    for i in range(_tiles(pic)):
        prompt.text(*[INDICATORS[i]] * (parted and i > 0))
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
    pixels = _views(pic.seed, 1)
    prompt.add("pixel_values", pixels)
    prompt.text(START)
    prompt.placeholders(len(prompt.model.model.get_image_features(pixels).pooler_output[0]))
    prompt.text(END)


_SHOW = dict.fromkeys(QWEN, _show_packed) | dict.fromkeys(MOSAIC, _show_mosaic)
_SHOW |= dict.fromkeys(("aya_vision", "cohere2_vision", "ovis2"), partial(_show_tiles, parted=True))
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
    ones = [[1] * len(line) for line in prompt.ids]
    types = prompts.padded(prompt.types, 0, padding)
    inputs = {
        "input_ids": prompts.padded(prompt.ids, PAD, padding),
        "attention_mask": prompts.padded(ones, 0, padding),
    }
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
        with hidden_keys(self.lm.layers, hidden or {}, len(kept)):
            if self.name == "gemma3":  # the core makes the masks
                call = {key: call[key] for key in ("attention_mask", "position_ids", "use_cache")}
                types = self.inputs["token_type_ids"][:, kept]
                out = self.model.model(inputs_embeds=embeds, token_type_ids=types, **call)
            else:
                out = self.lm(inputs_embeds=embeds, **call)
        return self.model.lm_head(out.last_hidden_state)[0]


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
