"""What differs between the model families, and between versions of transformers, in one place.

Models are typed `Any`, because `nn.Module` declares every submodule as `Tensor | Module`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, Gemma3Processor, Idefics3Processor, SmolVLMProcessor
from transformers.masking_utils import (
    blockwise_overlay,
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_overlay,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from vlmslim.engine.attention import attention_of
from vlmslim.engine.unsupported import UNSUPPORTED
from vlmslim.ops.attention import tower_attention, tower_norm

#: What the KV cache is called among a forward's arguments and on its output; transformers 5.24 renamed it.
KV_CACHE = "cache" if "cache" in {f.name for f in fields(BaseModelOutputWithPast)} else "past_key_values"


@dataclass(frozen=True)
class Family:
    """One family of vision-language models: where its parts are, and how its encoder hands out images.

    A new family is a row of `FAMILIES`. Paths are attributes joined by dots.

    model_type     : `config.model_type`
    name           : the transformers class that a user loads
    units          : how the encoder's output is cut into images. "crops": each entry is one square view. "anyres": a
                     thumbnail and tiles, unpadded and joined by newline tokens. "packed": images of any size, one after
                     the other. "samples": each entry holds all views of one prompt
    video          : takes `pixel_values_videos`
    video_token    : the field of the configuration that holds the placeholder of videos
    language_model : from the core model, as are `tower` and `projector`
    layers         : the encoder layers, from the tower
    grid           : of packed images, the argument that holds (frames,) rows and columns
    merge          : patches along each side of a token, a number or a path from the configuration
    joins          : tells from the ids between two views whether they belong to one picture; None if views never do
    thumbnail      : which of a picture's views shows the whole picture, 0 for the first one and -1 for the last one
    masks_by_type  : the core model makes the attention masks, one for each type of decoder layer
    slides         : decoder layers may use sliding windows
    """

    model_type: str
    name: str
    units: str = "crops"
    video: bool = False
    video_token: str = "video_token_id"
    language_model: str = "language_model"
    tower: str = "vision_tower"
    projector: str = "multi_modal_projector"
    layers: str = "encoder.layers"
    grid: str = ""
    merge: str | int = 1
    joins: Callable[[np.ndarray], bool] | None = None
    thumbnail: int = -1
    masks_by_type: bool = False
    slides: bool = False

    @property
    def anyres(self) -> bool:
        """Whether images become a thumbnail and tiles, unpadded and joined by newline tokens."""
        return self.units == "anyres"


def touching(between: np.ndarray) -> bool:
    """Tell whether two views belong to one picture, where nothing stands between its views."""
    return len(between) == 0


def one_apart(between: np.ndarray) -> bool:
    """Tell whether two views belong to one picture, where a single token, such as `<IMG_COL>`, parts its views.

    Between two pictures there are at least the end of one and the beginning of the other.
    """
    return len(between) == 1


def same_mosaic(between: np.ndarray) -> bool:
    """Tell whether two views belong to one picture in prompts of Idefics3 and SmolVLM.

    A view begins with a marker and its place, such as `<fake><row_1_col_2>`. A row of views ends in a newline, and a
    picture ends in another marker. So between views of one picture there are these two tokens alone, or a newline in
    front of them.
    """
    return len(between) == 2 or (len(between) > 2 and between[0] != between[-2])


_QWEN: dict[str, Any] = dict(
    units="packed",
    tower="visual",
    projector="visual.merger",
    layers="blocks",
    grid="grid_thw",
    merge="vision_config.spatial_merge_size",
)
_IDEFICS: dict[str, Any] = dict(
    units="samples",
    language_model="text_model",
    tower="vision_model",
    projector="connector",
    merge="scale_factor",
    joins=same_mosaic,
)

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llava", "LlavaForConditionalGeneration"),
        Family("llava_next", "LlavaNextForConditionalGeneration", "anyres"),
        Family("llava_onevision", "LlavaOnevisionForConditionalGeneration", "anyres", video=True),
        Family("llava_next_video", "LlavaNextVideoForConditionalGeneration", "anyres", video=True),
        Family("vipllava", "VipLlavaForConditionalGeneration"),
        Family("deepseek_vl", "DeepseekVLForConditionalGeneration", tower="vision_model", projector="aligner"),
        Family("qwen2_vl", "Qwen2VLForConditionalGeneration", video=True, **_QWEN),
        Family("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", video=True, **_QWEN),
        Family("qwen3_vl", "Qwen3VLForConditionalGeneration", video=True, **_QWEN),
        Family("glm4v", "Glm4vForConditionalGeneration", video=True, video_token="image_token_id", **_QWEN),
        Family("internvl", "InternVLForConditionalGeneration", layers="encoder.layer", merge=2, joins=touching),
        Family("smolvlm", "SmolVLMForConditionalGeneration", **_IDEFICS),
        Family("idefics3", "Idefics3ForConditionalGeneration", **_IDEFICS),
        Family("gemma3", "Gemma3ForConditionalGeneration", merge=4, masks_by_type=True, slides=True),
        Family(
            "mistral3",
            "Mistral3ForConditionalGeneration",
            "packed",
            layers="transformer.layers",
            grid="image_sizes",
            merge="spatial_merge_size",
        ),
        Family(
            "aya_vision",
            "AyaVisionForConditionalGeneration",
            merge="downsample_factor",
            joins=one_apart,
            slides=True,
        ),
        Family(
            "cohere2_vision",
            "Cohere2VisionForConditionalGeneration",
            merge="downsample_factor",
            joins=one_apart,
            slides=True,
        ),
        Family(
            "ovis2",
            "Ovis2ForConditionalGeneration",
            tower="vision_tower.transformer",
            projector="visual_embeddings_table",
            merge="vision_config.hidden_stride",
            joins=one_apart,
            thumbnail=0,
        ),
    )
}


def family_of(model: Any) -> Family:
    """Return the family of a loaded model.

    Raises:
        TypeError: the model is not one of the supported classes, or its language model uses sliding windows.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", "")
    family = FAMILIES.get(model_type)
    core = getattr(model, "model", None)
    if family is None or not hasattr(model, "lm_head") or not hasattr(core, family.language_model):
        name, known = type(model).__name__, [f.name for f in FAMILIES.values()]
        nearest = get_close_matches(name, known, n=1, cutoff=0.75)
        hint = f"the nearest supported class is {nearest[0]}; " if nearest and nearest[0] != name else ""
        reason = f": {UNSUPPORTED[model_type]}" if model_type in UNSUPPORTED else ""
        raise TypeError(
            f"cannot patch {name}{reason}; {hint}vlmslim supports {', '.join(known)} (of a PEFT model, pass "
            "`model.base_model.model`); docs/models.md tells how to add a family"
        )
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None) or ()
    if "chunked_attention" in types:
        raise TypeError(
            f"the language model of this {family.name} attends within chunks of the prompt, whose cache forgets by "
            "position; use a checkpoint with full attention"
        )
    if not family.slides and ("sliding_attention" in types or (getattr(text, "sliding_window", None) and not types)):
        raise TypeError(
            f"the language model of this {family.name} uses sliding-window attention, whose cache forgets by position; "
            "set `config.text_config.sliding_window = None` if the prompts are shorter than the window"
        )
    return family


def language_model(core: Any) -> Any:
    """Return the decoder."""
    return getattr(core, _family(core).language_model)


def final_norm(core: Any) -> Any:
    """Return the norm between the last decoder layer and the LM head."""
    lm = language_model(core)
    return next(getattr(lm, name) for name in ("norm", "final_layernorm", "final_layer_norm") if hasattr(lm, name))


def tower(core: Any) -> Any:
    """Return the vision tower."""
    return attrgetter(_family(core).tower)(core)


def encoder(core: Any) -> Any:
    """Return the module that holds the vision tower and what stands between it and the projector."""
    return getattr(core, _family(core).tower.partition(".")[0])


def projector(core: Any) -> Any:
    """Return what maps the tower's features to the language model's width."""
    return attrgetter(_family(core).projector)(core)


def merge(core: Any) -> int:
    """Return how many patches along each side make one visual token."""
    given = _family(core).merge
    return given if isinstance(given, int) else attrgetter(given)(core.config)


def check_decoder(core: Any, between_layers: str | None = None) -> None:
    """Refuse a language model into which the engine cannot look.

    Args:
        core: the model without its head.
        between_layers: a method that drops tokens between decoder layers, as messages name it; None without one.

    Raises:
        TypeError: the language model has no list of layers with rotary positions; or it has a layer whose attention
            cannot be recomputed, and a method drops tokens between layers.
    """
    lm = language_model(core)
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
    family, config = _family(core), core.config.vision_config
    if family.layers != Family.layers or family.units not in ("crops", "anyres"):
        return  # a family with a tower of its own kind
    found = _inner(tower(core))
    layers = getattr(getattr(found, "encoder", None), "layers", None)
    embeddings = getattr(found, "embeddings", None)
    sides = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    square = all(isinstance(side, int) for side in sides)
    if not isinstance(layers, nn.ModuleList) or embeddings is None or not square:
        raise TypeError(
            f"cannot patch a model with the vision tower {type(tower(core)).__name__}: vlmslim needs one that sees a "
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
        probed = _family(core).units == "packed" and attention_of(layer) is not None
        if not probed and not has_plain_heads(layer):
            raise TypeError(
                f"{method} reads the attention of the vision tower, and vlmslim cannot recompute it for "
                f"{type(tower(core)).__name__}; use a method without it, such as divprune or fastv"
            )


def has_plain_heads(layer: nn.Module) -> bool:
    """Tell whether queries and keys of a tower layer depend on its input alone, as in CLIP, and not on positions."""
    attention = tower_attention(layer)
    plain = attention is not None and all(hasattr(attention, name) for name in ("num_heads", "q_proj", "k_proj"))
    turns = "position_embeddings" in inspect.signature(type(attention).forward).parameters if plain else True
    return plain and not turns and tower_norm(layer) is not None


def attending_layer(core: Any, layer: int) -> int:
    """Return the first layer of the tower from `layer` on in which all patches of a picture see each other.

    In the other layers of Qwen2.5-VL's tower patches see their window only, which tells nothing of the picture.
    """
    depth = len(encoder_layers(core))
    everywhere = getattr(core.config.vision_config, "fullatt_block_indexes", None) or range(depth)
    return min((i for i in everywhere if i >= layer % depth), default=max(everywhere))


def sees_whole(core: Any, layer: int) -> bool:
    """Tell whether all patches of a picture see each other in a layer of the tower."""
    return attending_layer(core, layer) == layer % len(encoder_layers(core))


def check_patches(core: Any, method: str) -> None:
    """Refuse a family whose visual tokens are not single patches of the tower, projected one by one.

    Raises:
        TypeError: the message names the family and the method.
    """
    if not projects_patches(core):
        raise TypeError(
            f"{method} works on patches of the vision tower that the projector maps one by one, and in "
            f"{_family(core).name} several patches make a visual token; use another method, such as divprune or fastv"
        )


def projects_patches(core: Any) -> bool:
    """Tell whether visual tokens are single patches of the tower, which the projector maps one by one."""
    family = _family(core)
    return family.units in ("crops", "anyres") and family.merge == 1


def feature_layers(config: Any) -> tuple[int, ...]:
    """Return which hidden states of the tower the projector reads side by side; none where it reads the tower's output.

    Hidden state i is the output of layer i - 1, and -1 is that of the last layer.
    """
    names = ("vision_feature_layer", "vision_feature_layers")  # VipLlava's, before transformers 5.25
    given = next((x for name in names if (x := getattr(config, name, None)) is not None), ())
    return (given,) if isinstance(given, int) else tuple(given)


def encoder_layers(core: Any) -> nn.ModuleList:
    """Return the encoder layers of the vision tower, wherever this version of transformers keeps them."""
    return attrgetter(_family(core).layers)(_inner(tower(core)))


def has_cls(core: Any) -> bool:
    """Tell whether the vision tower has a CLS token."""
    embeddings = getattr(_inner(tower(core)), "embeddings", None)
    return hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")


def added_layers(core: Any) -> int:
    """Count the decoder layers after which the model adds features of its tower to visual tokens (DeepStack)."""
    return len(getattr(tower(core), "deepstack_visual_indexes", ()))


def _family(core: Any) -> Family:
    return FAMILIES[core.config.model_type]


def _inner(tower: Any) -> Any:
    return getattr(tower, "vision_model", tower)


def layer_type(lm: Any, layer: int) -> str:
    """Return the type of a decoder layer, such as "full_attention". Layers of one type share masks and positions."""
    types = getattr(lm.config, "layer_types", None)
    return types[layer] if types else "full_attention"


def rotary(lm: Any, layer: int, hidden: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Compute cosine and sine of rotary positions for a decoder layer; its frequencies may depend on its type."""
    if "layer_type" in inspect.signature(type(lm.rotary_emb).forward).parameters:
        return lm.rotary_emb(hidden, position, layer_type(lm, layer))
    return lm.rotary_emb(hidden, position_ids=position)


def causal_mask(
    lm: Any, layer: int, hidden: Tensor, mask: Tensor, cache: Cache | None, blocks: Tensor | None = None
) -> Any:
    """Make the attention mask of a decoder layer, in the form that its attention back end takes.

    Args:
        lm: the language model.
        layer: number of the decoder layer, which may have a sliding window.
        hidden: (B, S, d) its input.
        mask: (B, P + S) False at padding.
        cache: the KV cache, of P tokens.
        blocks: (B, S) tokens of one block see each other both ways; -1 for none.
    """
    window = layer_type(lm, layer) == "sliding_attention"
    if blocks is None:
        make = create_sliding_window_causal_mask if window else create_causal_mask
        return make(lm.config, hidden, mask, cache, layer_idx=layer)
    if not window:
        return create_causal_mask(lm.config, hidden, mask, cache, layer_idx=layer, block_sequence_ids=blocks)
    everywhere = nn.functional.pad(blocks, (mask.shape[1] - blocks.shape[1], 0), value=-1)
    return create_causal_mask(
        lm.config,
        hidden,
        mask,
        cache,
        layer_idx=layer,
        or_mask_function=blockwise_overlay(everywhere),
        and_mask_function=sliding_window_overlay(lm.config.sliding_window),
    )


def blocks_of(kwargs: dict) -> np.ndarray | None:
    """Find the tokens that see each other both ways: (B, L) the block of each, -1 for none; None without any."""
    types = kwargs.get("token_type_ids")
    if types is None or not bool(types.any()):
        return None
    starts = (types == 1) & (nn.functional.pad(types, (1, 0), value=0)[:, :-1] != 1)
    blocks = starts.long().cumsum(1) - 1
    return blocks.masked_fill(types != 1, -1).cpu().numpy()


def anyres_tiles(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Return the rows and columns of tiles that an image of `size` (height, width) is cut into, in an anyres model."""
    from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return rows, columns


def window_order(core: Any, grids: Tensor) -> Tensor | None:
    """Return where each token's patches stand among those that the projector reads; None where they stand in order.

    Qwen2.5-VL's tower sorts patches by attention window.
    """
    config = core.config.vision_config
    if not hasattr(config, "fullatt_block_indexes"):
        return None
    from transformers.vision_utils import get_vision_window_index

    window, _ = get_vision_window_index(grids, config.spatial_merge_size, config.window_size, config.patch_size)
    return window.argsort()


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
    name = _family(core).video_token if kind == "video" and input_ids is not None else f"{kind}_token_id"
    token = getattr(core.config, name, None)
    if input_ids is not None:
        return np.equal(input_ids, -1 if token is None else token)
    assert embeds is not None  # transformers demands one of the two
    if token is None:
        return np.zeros(embeds.shape[:2], dtype=bool)
    table = core.get_input_embeddings()
    return (embeds == table(torch.tensor(token, device=embeds.device))).all(-1).cpu().numpy()


def images_of_prompts(processor: Any, images: Sequence[list]) -> list[list]:
    """Return the images of a batch of prompts as a processor takes them; an empty list for a batch without images.

    They are nested by prompt, because LLaVA-OneVision tiles an image only if it is the only one of its prompt. Some
    processors count the prompts, and take an empty list for one without images; the others take no empty list.
    """
    shown = [of_prompt for of_prompt in images if of_prompt]
    counts_prompts = isinstance(processor, Idefics3Processor | SmolVLMProcessor | Gemma3Processor)
    return list(images) if shown and counts_prompts else shown


def with_newlines(core: Any, videos: Sequence[Tensor], frames: int) -> list[Tensor]:
    """Return the tokens of each video as the language model reads them: square frames, and a newline at the end.

    Newer transformers return them so from `get_video_features`; in 5.17 `forward` adds the newline.
    """

    def bare(video: Tensor) -> bool:
        if core.config.model_type != "llava_onevision":
            return False
        return frames * math.isqrt(len(video) // frames) ** 2 == len(video)

    flat = [video.flatten(0, -2) for video in videos]  # LLaVA-NeXT-Video in 5.17 keeps frames apart
    return [torch.cat([v, core.image_newline[None].to(v)]) if bare(v) else v for v in flat]
