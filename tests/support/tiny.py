"""Tiny random models of the LLaVA families, and what every tiny model of these tests shares.

The weights are drawn with fan-in scale: at transformers' default initialisation attention is nearly flat, and a model
whose attention is flat does not notice a wrong rotary position.
"""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache

import torch
from torch import nn
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
    PretrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

PAD, BOS, VIDEO, IMAGE = 0, 1, 98, 99
FAMILIES = ("llava", "siglip", "next", "onevision")
BACKENDS = ("eager", "sdpa")
DEPTH = 4
SIDE = 32  # pixels; 4 x 4 patches
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
TEXT = dict(
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
TOWER = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=SIDE,
    patch_size=8,
)


def config_of(
    family: str, text: dict = TEXT, tower: dict = TOWER, image: int = IMAGE, video: int = VIDEO
) -> tuple[PretrainedConfig, type[nn.Module]]:
    """Make the configuration of a family, and return it with the class of its model."""
    clip = dict(vision_config=CLIPVisionConfig(**tower, projection_dim=16), image_token_id=image)
    siglip = dict(
        vision_config=SiglipVisionConfig(**tower),
        image_token_id=image,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    if family in ("llava", "siglip"):
        parts = clip if family == "llava" else siglip
        return LlavaConfig(text_config=LlamaConfig(**text), **parts), LlavaForConditionalGeneration
    if family == "next":
        mistral = MistralConfig(**text, sliding_window=None)
        config = LlavaNextConfig(text_config=mistral, image_grid_pinpoints=PINPOINTS, **clip)
        return config, LlavaNextForConditionalGeneration
    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**text),
        image_grid_pinpoints=PINPOINTS,
        video_token_id=video,
        vision_aspect_ratio="anyres_max_9",
        **siglip,
    )
    return config, LlavaOnevisionForConditionalGeneration


def random_model(
    cls: type[nn.Module], config: PretrainedConfig, backend: str, special: Sequence[int] = (PAD, BOS, VIDEO, IMAGE)
) -> nn.Module:
    """Make a model whose weights follow from its shapes, and which never generates a token of `special`."""
    torch.manual_seed(0)
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
    model.generation_config.suppress_tokens = [*special]
    return model


@cache
def shared_model(family: str, backend: str) -> nn.Module:
    """Make a tiny model once, for callers that do not change it."""
    config, cls = config_of(family)
    return random_model(cls, config, backend)


def tiny(family: str, backend: str = "sdpa", dtype: torch.dtype = torch.float32) -> nn.Module:
    """Make a fresh tiny model; two calls with the same arguments have the same weights."""
    return deepcopy(shared_model(family, backend)).to(dtype)


def family_of(model: nn.Module) -> str:
    names = {LlavaNextForConditionalGeneration: "next", LlavaOnevisionForConditionalGeneration: "onevision"}
    if type(model) in names:
        return names[type(model)]
    return "siglip" if model.config.vision_config.model_type == "siglip_vision_model" else "llava"
