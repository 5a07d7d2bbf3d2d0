"""What differs between the model families, and between versions of transformers, in one place.

Models are typed `Any`, because `nn.Module` declares every submodule as `Tensor | Module`.
"""

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from vlmslim.engine.attention import attention_of

#: What the KV cache is called among a forward's arguments and on its output; transformers 5.24 renamed it.
KV_CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"


@dataclass(frozen=True)
class Family:
    """One family of LLaVA-style models.

    model_type : `config.model_type`
    name       : the transformers class a user loads
    anyres     : images become a thumbnail and tiles, unpadded and joined by newline tokens
    video      : takes `pixel_values_videos`
    """

    model_type: str
    name: str
    anyres: bool = False
    video: bool = False


FAMILIES = {
    family.model_type: family
    for family in (
        Family("llava", "LlavaForConditionalGeneration"),
        Family("llava_next", "LlavaNextForConditionalGeneration", anyres=True),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", anyres=True, video=True),
    )
}


def family_of(model: Any) -> Family:
    """Return the family of a loaded model.

    Raises:
        TypeError: the model is not one of the supported classes, or its language model uses sliding windows.
    """
    family = FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""))
    if family is None or not hasattr(model, "lm_head") or not hasattr(getattr(model, "model", None), "language_model"):
        known = ", ".join(f.name for f in FAMILIES.values())
        raise TypeError(
            f"cannot patch {type(model).__name__}; vlmslim supports {known} "
            "(of a PEFT model, pass `model.base_model.model`)"
        )
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None) or ()
    if "chunked_attention" in types:
        raise TypeError(
            f"the language model of this {family.name} attends within chunks of the prompt, whose cache forgets by "
            "position; use a checkpoint with full attention"
        )
    if "sliding_attention" in types or (getattr(text, "sliding_window", None) and not types):
        raise TypeError(
            f"the language model of this {family.name} uses sliding-window attention, whose cache forgets by position; "
            "set `config.text_config.sliding_window = None` if the prompts are shorter than the window"
        )
    return family


def check_decoder(core: Any, between_layers: str | None = None) -> None:
    """Refuse a language model into which the engine cannot look.

    Args:
        core: the model without its head.
        between_layers: a method that drops tokens between decoder layers, as messages name it; None without one.

    Raises:
        TypeError: the language model has no list of layers with rotary positions; or it has a layer whose attention
            cannot be recomputed, and a method drops tokens between layers.
    """
    lm = core.language_model
    name = type(lm).__name__
    if not isinstance(getattr(lm, "layers", None), nn.ModuleList) or not hasattr(lm, "rotary_emb"):
        raise TypeError(
            f"cannot patch a {name}: vlmslim needs a language model with `layers` and rotary positions, such as Llama, "
            "Mistral, Qwen2, Qwen3, Gemma, Phi-3, GLM, OLMo-2 or Cohere"
        )
    if between_layers is None:
        return
    for i, layer in enumerate(lm.layers):
        if attention_of(layer) is None:
            raise TypeError(
                f"{between_layers} drops tokens between the layers of {name}, and layer {i} does not attend through "
                "transformers' attention interface, so its attention cannot be recomputed; use a method that works "
                "before the language model"
            )


def check_tower(core: Any) -> None:
    """Refuse a vision tower that does not cut a picture into a square grid of patches, in layers as CLIP's.

    Raises:
        TypeError: the message names the tower.
    """
    tower, config = core.vision_tower, core.config.vision_config
    found = getattr(tower, "vision_model", tower)
    layers = getattr(getattr(found, "encoder", None), "layers", None)
    embeddings = getattr(found, "embeddings", None)
    sides = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    square = all(isinstance(side, int) for side in sides)
    if not isinstance(layers, nn.ModuleList) or embeddings is None or not square:
        raise TypeError(
            f"cannot patch a model with the vision tower {type(tower).__name__}: vlmslim needs a tower that sees a "
            "square picture as a grid of patches in `encoder.layers`, as CLIP and SigLIP towers do"
        )


def check_tower_layers(core: Any, method: str) -> None:
    """Refuse a tower whose queries and keys `vlmslim.ops.attention.tower_qk` cannot compute.

    Args:
        core: the model without its head.
        method: the method that reads them, as messages name it.

    Raises:
        TypeError: the message names the tower and the method.
    """
    for layer in encoder_layers(core):
        attention = getattr(layer, "self_attn", None)
        plain = all(hasattr(attention, name) for name in ("num_heads", "q_proj", "k_proj"))
        # an attention module that is given positions rotates its queries and keys
        turns = "position_embeddings" in inspect.signature(type(attention).forward).parameters if plain else True
        if turns or not hasattr(layer, "layer_norm1"):
            raise TypeError(
                f"{method} reads the attention of the vision tower, and vlmslim cannot recompute it for "
                f"{type(core.vision_tower).__name__}; use a method without it, such as divprune or fastv"
            )


def encoder_layers(core: Any) -> nn.ModuleList:
    """Return the encoder layers of the vision tower, wherever this version of transformers keeps them."""
    return getattr(core.vision_tower, "vision_model", core.vision_tower).encoder.layers


def has_cls(core: Any) -> bool:
    """Tell whether the vision tower has a CLS token."""
    tower = getattr(core.vision_tower, "vision_model", core.vision_tower)
    return hasattr(tower.embeddings, "class_embedding")


def anyres_tiles(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of tiles that an image of `size` (height, width) is cut into, in an anyres model."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return rows, columns


def kv_cache(where: dict | ModelOutput) -> Cache | None:
    """Return the KV cache among a forward's keyword arguments, or on its output; None without one."""
    if isinstance(where, ModelOutput):
        return where.get(KV_CACHE)
    names = (KV_CACHE, "past_key_values", "layer_past")  # a caller may use the old name, and GPT-NeoX has its own
    return next((where[name] for name in names if where.get(name) is not None), None)


def cached_keys(cache: Cache | None, layer: int, hidden: Tensor, before: int = 0) -> Tensor | None:
    """Return the rotated keys of a layer that has just cached `hidden` (B, S, d): (B, kv heads, P + S, head_dim).

    `before` is P, the number of tokens that it held before. None if the cache does not have the keys as they were,
    because it quantises them or moves them to another device.
    """
    keys = getattr(cache.layers[layer], "keys", None) if cache is not None else None
    if keys is None or keys.ndim != 4 or keys.device != hidden.device or not keys.is_floating_point():
        return None
    return keys if keys.shape[::2] == (len(hidden), before + hidden.shape[1]) else None


def placeholders(core: Any, kind: str, input_ids: np.ndarray | None, embeds: Tensor | None) -> np.ndarray:
    """Find the placeholders of the prompt's images (kind "image") or videos (kind "video"): (B, L) bool."""
    token = getattr(core.config, f"{kind}_token_id", None)
    if input_ids is not None:
        return np.equal(input_ids, -1 if token is None else token)
    assert embeds is not None  # transformers demands one of the two
    if token is None:
        return np.zeros(embeds.shape[:2], dtype=bool)
    table = core.get_input_embeddings()
    return (embeds == table(torch.tensor(token, device=embeds.device))).all(-1).cpu().numpy()


def with_newlines(core: Any, videos: Sequence[Tensor], frames: int) -> list[Tensor]:
    """Return the tokens of each video as the language model reads them: square frames, and a newline at the end.

    Newer transformers return them so from `get_video_features`; in 5.17 `forward` adds the newline.
    """

    def bare(video: Tensor) -> bool:
        return frames * math.isqrt(len(video) // frames) ** 2 == len(video)

    return [torch.cat([v, core.image_newline[None].to(v)]) if bare(v) else v for v in videos]
