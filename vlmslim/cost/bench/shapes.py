"""The exact sizes of public models with random weights, which measure speed without a download."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    InternVLConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2Config,
    Qwen3VLConfig,
    SiglipVisionConfig,
    SmolVLMConfig,
)


def _clip_large() -> CLIPVisionConfig:
    """Make the config of CLIP ViT-L/14 at 336 pixels."""
    return CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
        projection_dim=768,
    )


def _siglip_so400m() -> SiglipVisionConfig:
    """Make the config of SigLIP so400m/14 at 384 pixels, without its last layer and its head, as in LLaVA-OneVision."""
    return SiglipVisionConfig(
        hidden_size=1152,
        intermediate_size=4304,
        num_hidden_layers=26,
        num_attention_heads=16,
        image_size=384,
        patch_size=14,
        vision_use_head=False,
    )


def _vicuna(hidden: int, mlp: int, layers: int, heads: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=32064,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
    )


def _llava_15(text: LlamaConfig) -> LlavaConfig:
    return LlavaConfig(vision_config=_clip_large(), text_config=text, image_token_index=32000)


def _llava_next_7b() -> LlavaNextConfig:
    text = MistralConfig(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    pinpoints = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    return LlavaNextConfig(
        vision_config=_clip_large(), text_config=text, image_grid_pinpoints=pinpoints, image_token_index=32000
    )


def _qwen2_5_vl_7b() -> Qwen2_5_VLConfig:
    text = dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128000,
        rms_norm_eps=1e-6,
        use_sliding_window=False,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    )
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=3584,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
    )
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def _qwen3_vl_8b() -> Qwen3VLConfig:
    text = dict(
        vocab_size=151936,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=262144,
        rms_norm_eps=1e-6,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 5e6,
            "mrope_section": [24, 20, 20],
            "mrope_interleaved": True,
        },
    )
    vision = dict(
        depth=27,
        hidden_size=1152,
        intermediate_size=4304,
        num_heads=16,
        patch_size=16,
        out_hidden_size=4096,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[8, 16, 24],
    )
    return Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False)


def _internvl3_8b() -> InternVLConfig:
    text = Qwen2Config(
        vocab_size=151674,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    vision = dict(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=[448, 448],
        patch_size=[14, 14],
        attention_bias=True,
    )
    return InternVLConfig(
        text_config=text.to_dict(), vision_config=vision, image_token_id=151667, tie_word_embeddings=False
    )


def _smolvlm_256m() -> SmolVLMConfig:
    text = LlamaConfig(
        vocab_size=49280,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
    )
    vision = dict(
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=512,
        patch_size=16,
    )
    return SmolVLMConfig(
        text_config=text.to_dict(),
        vision_config=vision,
        scale_factor=4,
        image_token_id=49190,
        tie_word_embeddings=False,
    )


def _llava_onevision_7b() -> LlavaOnevisionConfig:
    text = Qwen2Config(
        vocab_size=152000,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    return LlavaOnevisionConfig(vision_config=_siglip_so400m(), text_config=text)  # tiles as by default


SHAPES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llava-1.5-7b": lambda: _llava_15(_vicuna(4096, 11008, 32, 32)),
    "llava-1.5-13b": lambda: _llava_15(_vicuna(5120, 13824, 40, 40)),
    "llava-next-7b": _llava_next_7b,  # llava-v1.6-mistral-7b
    "llava-onevision-7b": _llava_onevision_7b,
    "qwen2.5-vl-7b": _qwen2_5_vl_7b,
    "qwen3-vl-8b": _qwen3_vl_8b,
    "internvl3-8b": _internvl3_8b,
    "smolvlm-256m": _smolvlm_256m,
}


def shape_config(name: str, layers: int | None = None) -> PreTrainedConfig:
    """Make the configuration of a named shape, with `layers` decoder layers instead of all of them.

    Raises:
        ValueError: an unknown shape, or more layers than it has.
    """
    if name not in SHAPES:
        raise ValueError(f"unknown shape {name!r}; choose from {', '.join(SHAPES)}")
    config: Any = SHAPES[name]()
    depth = config.text_config.num_hidden_layers
    if layers is not None:
        if not 1 <= layers <= depth:
            raise ValueError(f"layers={layers}: {name} has {depth} decoder layers; use 1 to {depth}")
        config.text_config.num_hidden_layers = layers
        if getattr(config.text_config, "layer_types", None):
            config.text_config.layer_types = config.text_config.layer_types[:layers]
    return config


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
