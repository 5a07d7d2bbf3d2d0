"""The prompts of an examination: made-up pictures of several sizes in conversations of several lengths."""

from dataclasses import dataclass
from functools import cache

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ProcessorMixin


@dataclass(frozen=True)
class Turn:
    """What the user says: pictures, each (width, height) in sides of the vision tower's image, and a text."""

    text: str
    pictures: tuple[tuple[float, float], ...] = ()


#: A wide picture; pictures in two turns, one tall and one deep in the prompt; no picture; two pictures and much text.
ROWS: tuple[tuple[Turn, ...], ...] = (
    (Turn("What is in the middle?", ((1.5, 1.0),)),),
    (Turn("Describe this picture in a few words.", ((0.6, 1.4),)), Turn("And what is new in this one?", ((1.0, 1.0),))),
    (Turn("Name three colours."),),
    (Turn("Which of the two pictures is the brighter one?", ((1.0, 0.5), (0.9, 0.9))),),
)
BATCH, PICTURED, LONG = (0, 1, 2), (0, 1), 3
LONG_TEXT = 160  # tokens: more than the 128 rows of attention that a method may look at in one go


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Soft patches of colour under fine noise: every patch of it is different, and looks it."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 7, 7, generator=generator)
    soft = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
    noisy = soft + 0.15 * torch.randn(3, height, width, generator=generator)
    pixels = (noisy.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))


class Prompts:
    """`ROWS` as inputs of a model, on its device and in its dtype.

    Raises:
        ValueError: the tokenizer has no padding token.
    """

    def __init__(self, model: nn.Module, processor: ProcessorMixin):
        if processor.tokenizer.pad_token is None:
            raise ValueError(
                "the tokenizer has no padding token; set processor.tokenizer.pad_token = processor.tokenizer.eos_token"
            )
        self.model, self.processor = model, processor
        side = model.config.vision_config.image_size
        self._texts, self._pictures = [], []
        for turns in ROWS:
            sizes = [size for turn in turns for size in turn.pictures]
            seed = sum(map(len, self._pictures))
            self._pictures.append(
                [picture(seed + i, round(w * side), round(h * side)) for i, (w, h) in enumerate(sizes)]
            )
            self._texts.append(self._render(turns))
        placeholders = len(self._pictures[LONG])
        while len(processor.tokenizer(self._texts[LONG])["input_ids"]) < LONG_TEXT + placeholders:
            self._texts[LONG] = self._texts[LONG].replace("Which of", "Look at them closely. Which of", 1)
        self._encoded = cache(self._encode)

    def _render(self, turns: tuple[Turn, ...]) -> str:
        """The prompt as the checkpoint's chat template writes it, or as LLaVA-1.5's does."""
        messages = []
        for turn in turns:
            parts = [*({"type": "image"} for _ in turn.pictures), {"type": "text", "text": turn.text}]
            messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": _part("A quiet scene.")}]
        if getattr(self.processor, "chat_template", None):
            return self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        image = self.processor.image_token
        said = (f"USER: {len(turn.pictures) * (image + chr(10))}{turn.text} ASSISTANT:" for turn in turns)
        return " A quiet scene. ".join(said)

    def inputs(self, rows: tuple[int, ...] = BATCH, side: str = "left") -> dict[str, Tensor]:
        """Inputs of `rows`, padded on `side`; copies, which a method that edits in place does not spoil for others."""
        return {name: x.clone() for name, x in self._encoded(rows, side).items()}

    def _encode(self, rows: tuple[int, ...], side: str) -> dict[str, Tensor]:
        images = [self._pictures[i] for i in rows if self._pictures[i]]
        media = {"images": images} if images else {}
        text = [self._texts[i] for i in rows]
        encoded = self.processor(text=text, **media, padding=True, padding_side=side, return_tensors="pt")
        return dict(encoded.to(self.model.device, self.model.dtype))


def _part(text: str) -> list[dict]:
    return [{"type": "text", "text": text}]
