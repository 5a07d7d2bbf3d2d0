"""Tiny LLaVAs around other language models than Llama's, each with random weights of some size."""

import torch
import transformers
from prompts import padded, words
from tiny import BOS, IMAGE, PAD, SIDE, TEXT, TOWER
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

#: language models that rotate, normalise, scale, squeeze or pack differently, and what their configurations need
DECODERS: dict[str, dict] = {
    "Llama": {},
    "Qwen3": {},  # normalises queries and keys
    "Gemma": {},
    "Gemma2": {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 4},
    "Granite": {"attention_multiplier": 0.1},
    "Phi3": {},  # one matrix for queries, keys and values
    "Phi": {},  # rotates a part of each head
    "Glm": {},  # rotates pairs in a part of each head
    "Olmo2": {},  # no norm before attention
    "Cohere": {},  # rotates pairs; attention and MLP side by side
    "Ernie4_5": {},
    "Helium": {},
    "GPTNeoX": {},  # calls its attention module otherwise
    "GptOss": {"max_position_embeddings": 4096 * 32},  # a sink takes attention
    "SmolLM3": {},  # some layers do not rotate
}
_EAGER_ONLY = ("Gemma2", "GptOss")
_FULL = {"layer_types": ["full_attention"] * 4}
_LAYER_TYPES = {"Gemma2": _FULL, "GptOss": _FULL, "SmolLM3": _FULL}


def llava_around(name: str, backend: str | None = None, **options) -> nn.Module:
    """Make a LLaVA with a CLIP tower and the language model `name`, such as "Cohere"."""
    backend = backend or ("eager" if name in _EAGER_ONLY else "sdpa")
    torch.manual_seed(0)
    options = DECODERS.get(name, {}) | _LAYER_TYPES.get(name, {}) | options
    heads = {"num_key_value_heads": 4} if name in ("Phi", "GPTNeoX") else {"head_dim": 8}
    text = getattr(transformers, f"{name}Config")(**TEXT | heads | options)
    vision = CLIPVisionConfig(**TOWER, projection_dim=16)
    return with_weights(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE), backend)


def with_weights(config: LlavaConfig, backend: str = "sdpa") -> nn.Module:
    """Make the model of a configuration, with weights large enough for attention that is not flat."""
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation=backend).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.2)
    return model


def two_rows(padding: str) -> dict[str, torch.Tensor]:
    """Inputs of two prompts of different lengths, one picture each."""
    rows = [[BOS, *[IMAGE] * 16, *words(0, 5)], [BOS, 3, *[IMAGE] * 16, *words(1, 2)]]
    ids = padded(rows, PAD, padding)
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": (ids != PAD).long(), "pixel_values": pixels}
