"""Made-up prompts of an exact size: random words around images of noise."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vlmslim.engine.families import FAMILIES


@dataclass(frozen=True)
class Prompt:
    """A batch of prompts, all alike in size and each with its own words and pictures.

    before, after : (B, t) ids of the words around the images
    pixels        : further inputs of the model: pixel values, and what a family needs with them
    batch, images : prompts, and images in each
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
        model: nn.Module,
        *,
        batch: int = 1,
        images: int = 1,
        image_size: tuple[int, int] | None = None,
        text_tokens: int = 46,
        seed: int = 0,
    ) -> "Prompt":
        """Make prompts for a model.

        Args:
            model: an unpatched LLaVA; it encodes the images once, to see how many tokens they have.
            batch: prompts.
            images: images in each prompt.
            image_size: height and width in pixels, which decide the tiles of an anyres model; by default two tiles
                a side. Families without tiles scale every picture to the tower's size anyway.
            text_tokens: words of each prompt, before and behind the images together; 46 besides 576 visual tokens
                are the 622 that most papers count.
            seed: of words and noise.

        Raises:
            ValueError: fewer than 2 text tokens.
        """
        if text_tokens < 2:
            raise ValueError(f"text_tokens={text_tokens}: at least 2, one before the images and one behind")
        generator = torch.Generator().manual_seed(seed)
        config, device = model.config, model.device
        side = config.vision_config.image_size
        count = batch * images
        pixels, crops = {}, 1
        if FAMILIES[config.model_type].anyres:
            from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

            size = image_size or (2 * side, 2 * side)
            onevision = config.model_type == "llava_onevision"
            if not onevision or images == 1:  # OneVision does without tiles where a prompt has several images
                crops = image_size_to_num_patches(size, config.image_grid_pinpoints, side)
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

    def inputs(self, visual: int | None = None) -> dict[str, Tensor]:
        """Inputs of `forward` and `generate`, with room for `visual` visual tokens a prompt instead of all."""
        visual = self.visual_tokens if visual is None else visual
        places = self.before.new_full((self.batch, visual), self.image_token)
        ids = torch.cat([self.before, places, self.after], dim=1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.pixels
