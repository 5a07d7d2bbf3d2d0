"""The exact sizes of public models with random weights, which measure speed without a download."""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    InternVLConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen3VLConfig,
    SmolVLMConfig,
)


class Shape(NamedTuple):
    """The configuration of a public model: its class, its language model, its vision tower, and all else."""

    config: type[PreTrainedConfig]
    text: dict[str, Any]
    vision: dict[str, Any]
    rest: dict[str, Any]

    def build(self, layers: int | None = None) -> PreTrainedConfig:
        """Make the configuration, with `layers` decoder layers if they are given."""
        text = self.text if layers is None else self.text | {"num_hidden_layers": layers}
        own = deepcopy({"text_config": text, "vision_config": self.vision, **self.rest})  # for the caller to change
        return self.config(**own)


def _text(vocabulary: int, width: int, mlp: int, layers: int, heads: int, kv_heads: int, **rest: Any) -> dict[str, Any]:
    """Name the sizes of a language model."""
    return dict(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        **rest,
    )


def _vit(width: int, mlp: int, layers: int, heads: int, **rest: Any) -> dict[str, Any]:
    """Name the sizes of a vision tower."""
    return dict(hidden_size=width, intermediate_size=mlp, num_hidden_layers=layers, num_attention_heads=heads, **rest)


def _rope(theta: float, **rest: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta, **rest}}


_VICUNA = dict(max_position_embeddings=4096, rms_norm_eps=1e-5)
_MISTRAL = dict(model_type="mistral", max_position_embeddings=32768, rms_norm_eps=1e-5, sliding_window=None)
_QWEN2 = dict(model_type="qwen2", max_position_embeddings=32768, rms_norm_eps=1e-6)
_CLIP = _vit(1024, 4096, 24, 16, image_size=336, patch_size=14, projection_dim=768)
# LLaVA-OneVision leaves out the last layer and the head of its tower, SigLIP so400m.
_SIGLIP = _vit(1152, 4304, 26, 16, image_size=384, patch_size=14, vision_use_head=False)
_TILES = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]

SHAPES = {
    "llava-1.5-7b": Shape(
        LlavaConfig, _text(32064, 4096, 11008, 32, 32, 32, **_VICUNA), _CLIP, dict(image_token_index=32000)
    ),
    "llava-1.5-13b": Shape(
        LlavaConfig, _text(32064, 5120, 13824, 40, 40, 40, **_VICUNA), _CLIP, dict(image_token_index=32000)
    ),
    "llava-next-7b": Shape(  # llava-v1.6-mistral-7b
        LlavaNextConfig,
        _text(32064, 4096, 14336, 32, 32, 8, **_MISTRAL, **_rope(1e6)),
        _CLIP,
        dict(image_grid_pinpoints=_TILES, image_token_index=32000),
    ),
    "llava-onevision-7b": Shape(  # with the tiles of LlavaOnevisionConfig
        LlavaOnevisionConfig, _text(152000, 3584, 18944, 28, 28, 4, **_QWEN2, **_rope(1e6)), _SIGLIP, {}
    ),
    "qwen2.5-vl-7b": Shape(
        Qwen2_5_VLConfig,
        _text(152064, 3584, 18944, 28, 28, 4, max_position_embeddings=128000, rms_norm_eps=1e-6)
        | dict(use_sliding_window=False, **_rope(1e6, mrope_section=[16, 24, 24])),
        dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
        | dict(window_size=112, fullatt_block_indexes=[7, 15, 23, 31]),
        dict(tie_word_embeddings=False),
    ),
    "qwen3-vl-8b": Shape(
        Qwen3VLConfig,
        _text(151936, 4096, 12288, 36, 32, 8, head_dim=128, max_position_embeddings=262144, rms_norm_eps=1e-6)
        | _rope(5e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
        dict(depth=27, hidden_size=1152, intermediate_size=4304, num_heads=16, out_hidden_size=4096)
        | dict(patch_size=16, num_position_embeddings=2304, deepstack_visual_indexes=[8, 16, 24]),
        dict(tie_word_embeddings=False),
    ),
    "internvl3-8b": Shape(
        InternVLConfig,
        _text(151674, 3584, 18944, 28, 28, 4, **_QWEN2, **_rope(1e6)),
        _vit(1024, 4096, 24, 16, image_size=[448, 448], patch_size=[14, 14], attention_bias=True),
        dict(image_token_id=151667, tie_word_embeddings=False),
    ),
    "smolvlm-256m": Shape(
        SmolVLMConfig,
        _text(49280, 576, 1536, 30, 9, 3, head_dim=64, max_position_embeddings=8192, rms_norm_eps=1e-5, **_rope(1e5)),
        _vit(768, 3072, 12, 12, image_size=512, patch_size=16),
        dict(scale_factor=4, image_token_id=49190, tie_word_embeddings=False),
    ),
}


def shape_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """Make the configuration of a named shape, with `layers` decoder layers instead of all of them.

    Raises:
        ValueError: an unknown shape, or more layers than it has.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    depth = SHAPES[name].text["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= depth:
        raise ValueError(f"layers={layers}: {name} has {depth} decoder layers; use 1 to {depth}")
    return SHAPES[name].build(layers)


def random_model(
    config: PreTrainedConfig, *, dtype: torch.dtype, device: torch.device | str, attention: str = "sdpa", seed: int = 0
) -> nn.Module:
    """Make a model with random weights directly on its device.

    Args:
        config: configuration of a LLaVA.
        dtype: dtype of the weights.
        device: device of the weights.
        attention: attention implementation: eager, sdpa, flash_attention_2, ...
        seed: seed of the weights.

    Raises:
        ValueError: the weights alone do not fit; the message says how much they need and how much is free.
    """
    device = torch.device(device)
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    need = sum(tensor.nbytes for tensor in [*empty.parameters(), *empty.buffers()])
    free = free_bytes(device)
    if need > 0.95 * free:
        raise ValueError(
            f"the weights need {need / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')} and {device} has "
            f"{free / 2**30:.1f} GiB free; use a smaller dtype, fewer --layers or another device"
        )
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    return model.eval().requires_grad_(False)


def free_bytes(device: torch.device) -> int:
    """Count the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil

    return psutil.virtual_memory().available
