"""Pictures in prompts, as each family's processor and model take them."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Gemma3Processor, Idefics3Processor, SmolVLMProcessor

from vlmslim.engine.families.rows import row_of


def placeholders(core: Any, kind: str, input_ids: np.ndarray | None, embeds: Tensor | None) -> np.ndarray:
    """Find the placeholders of the prompt's images (kind "image") or videos (kind "video"): (B, L) bool."""
    name = row_of(core).video_token if kind == "video" and input_ids is not None else f"{kind}_token_id"
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
