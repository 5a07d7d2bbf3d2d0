"""The families that vlmslim knows, one row each. docs/models.md tells how to add one."""

from typing import Any

import numpy as np

from vlmslim.engine.families.family import Family


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


def row_of(core: Any) -> Family:
    """Return the row of a supported model, given without its head."""
    return FAMILIES[core.config.model_type]
