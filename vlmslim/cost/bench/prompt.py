"""Made-up prompts of an exact size: random words around images of noise."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmslim.engine.families import FAMILIES, anyres_tiles


@dataclass(frozen=True)
class SyntheticPrompt:
    """A batch of prompts of one size; each prompt has its own words and images.

    before, after : (B, t) ids of the words before and after the images
    pixels        : the other inputs of the model: pixel values, and what a family needs with them
    batch, images : prompts, and images in each prompt
    tokens        : visual tokens of each image
    crops         : crops of each image, as they enter the vision tower
    image_token   : id of the placeholder
    """

    before: Tensor
    after: Tensor
    pixels: dict[str, Tensor]
    batch: int
    images: int
    tokens: int
    crops: int
    image_token: int

    @classmethod
    def make(
        cls,
        model: Any,
        *,
        batch: int = 1,
        images: int = 1,
        image_size: tuple[int, int] | None = None,
        text_tokens: int = 46,
        seed: int = 0,
    ) -> "SyntheticPrompt":
        """Make a batch of prompts for a model, and encode its images once to count their tokens.

        Args:
            model: an unpatched LLaVA.
            batch: prompts.
            images: images in each prompt.
            image_size: height and width in pixels, which decide the tiles of an anyres model; by default two tiles
                a side. Families without tiles scale every image to the size of the vision tower.
            text_tokens: words of each prompt, before and after the images together. By default 46, because most papers
                count 622 tokens: 576 visual tokens and 46 words.
            seed: seed of words and noise.

        Raises:
            ValueError: fewer than 2 text tokens, or a family whose pictures are not square.
        """
        if text_tokens < 2:
            raise ValueError(f"text_tokens={text_tokens}: use at least 2, one before the images and one after them")
        generator = torch.Generator().manual_seed(seed)
        config, device = model.config, model.device
        side, family = getattr(config.vision_config, "image_size", None), FAMILIES[config.model_type]
        if family.units not in ("crops", "anyres") or not isinstance(side, int):
            raise ValueError(
                f"bench makes up prompts for families of square pictures and anyres mosaics only, and {family.name} "
                "takes others; measure it on your own prompts with `vlmslim run` and its timing"
            )
        count = batch * images
        pixels, crops = {}, 1
        if FAMILIES[config.model_type].anyres:
            size = image_size or (2 * side, 2 * side)
            onevision = config.model_type == "llava_onevision"
            if not onevision or images == 1:  # OneVision cuts no tiles if a prompt has several images
                crops = 1 + math.prod(anyres_tiles(config, size))
            pixels["image_sizes"] = torch.tensor([size] * count, device=device)
            if onevision:
                pixels["batch_num_images"] = torch.tensor([images] * batch, device=device)
        noise = torch.randn(count, crops, 3, side, side, generator=generator)
        pixels["pixel_values"] = (noise if "image_sizes" in pixels else noise[:, 0]).to(device, model.dtype)
        with torch.inference_mode():
            encoded = model.model.get_image_features(**pixels).pooler_output
        special = {config.image_token_id, getattr(config, "video_token_id", None)}
        ids = torch.tensor([i for i in range(3, config.text_config.vocab_size) if i not in special])
        words = ids[torch.randint(len(ids), (batch, text_tokens), generator=generator)]
        before, after = words.to(device).split([text_tokens // 2, text_tokens - text_tokens // 2], dim=1)
        return cls(before, after, pixels, batch, images, len(encoded[0]), crops, config.image_token_id)

    @property
    def text_tokens(self) -> int:
        """Words of each prompt."""
        return self.before.shape[1] + self.after.shape[1]

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of each prompt."""
        return self.images * self.tokens

    def inputs(self, visual_tokens: int | None = None) -> dict[str, Tensor]:
        """Return the inputs of `forward` and `generate`, with `visual_tokens` placeholders a prompt instead of all."""
        placeholders = self.visual_tokens if visual_tokens is None else visual_tokens
        ids = torch.cat(
            [self.before, self.before.new_full((self.batch, placeholders), self.image_token), self.after], dim=1
        )
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.pixels
