"""The prompts of an examination: made-up pictures and a video in conversations of several lengths."""

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

from vlmslim.engine.families import family_of, images_of_prompts, merge


@dataclass(frozen=True)
class Turn:
    """The user's part of one turn.

    pictures : (width, height) of each, in units of `picture_side`
    frames   : of a video; 0 for none
    """

    text: str
    pictures: tuple[tuple[float, float], ...] = ()
    frames: int = 0


#: A wide picture; pictures in two turns, one tall and one deep in the prompt; no picture; two pictures and much text;
#: a video.
ROWS: tuple[tuple[Turn, ...], ...] = (
    (Turn("What is in the middle?", ((1.5, 1.0),)),),
    (Turn("Describe this picture in a few words.", ((0.6, 1.4),)), Turn("And what is new in this one?", ((1.0, 1.0),))),
    (Turn("Name three colours."),),
    (Turn("Which of the two pictures is the brighter one?", ((1.0, 0.5), (0.9, 0.9))),),
    (Turn("Name a season."), Turn("What moves in this video, and where to?", frames=3)),
)
LONG, VIDEO = 3, 4
LONG_TEXT = 160  # tokens: more than the 128 rows of attention that a method may compute at a time


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Draw soft patches of colour under fine noise, so that every patch is different from the others."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 7, 7, generator=generator)
    soft = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=False)[0]
    noisy = soft + 0.15 * torch.randn(3, height, width, generator=generator)
    pixels = (noisy.clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous()
    return Image.frombytes("RGB", (width, height), bytes(pixels.flatten().tolist()))


def video(seed: int, frames: int, width: int, height: int) -> np.ndarray:
    """Move a window over a wide picture: (frames, height, width, 3) uint8."""
    step = width // 4
    wide = np.asarray(picture(seed, width + (frames - 1) * step, height))
    return np.stack([wide[:, i * step : i * step + width] for i in range(frames)])


def why_no_video(model: PreTrainedModel, processor: ProcessorMixin) -> str | None:
    """Return the reason why a checkpoint takes no videos, or None if it takes them."""
    if not family_of(model).video:
        return f"{type(model).__name__} takes no videos"
    if getattr(processor, "video_processor", None) is None:
        return f"{type(processor).__name__} was loaded without a video processor"
    if family_of(model).video_token == "image_token_id":
        return f"{type(model).__name__} takes no batch with pictures and videos, because both have one placeholder"
    return None


def picture_side(model: Any) -> int:
    """Return the pixels of a picture's side: those that the tower sees, or 8 tokens' worth if it sees any size."""
    vision = model.config.vision_config
    if family_of(model).units == "packed":
        return 8 * vision.patch_size * merge(model.model)
    return vision.image_size if isinstance(vision.image_size, int) else max(vision.image_size)


class Prompts:
    """`ROWS` as inputs of a model, on its device and in its dtype.

    batch    : rows that are prefilled together
    pictured : rows of the batch with a picture or a video

    Args:
        model: the model for which the inputs are made.
        processor: the processor of its checkpoint.
        videos: include the video, which the checkpoint must be able to take.

    Raises:
        ValueError: the tokenizer has no padding token.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, videos: bool = False):
        if processor.tokenizer.pad_token is None:
            raise ValueError(
                "the tokenizer has no padding token; set processor.tokenizer.pad_token = processor.tokenizer.eos_token"
            )
        self.model, self.processor, self.videos = model, processor, videos
        last = (VIDEO,) if videos else ()
        self.batch, self.pictured = (0, 1, 2, *last), (0, 1, *last)
        side = picture_side(model)
        self._pictures: list[list[Image.Image]] = []
        self._videos: list[list[np.ndarray]] = []
        self._texts: list[str] = []
        for turns in ROWS if videos else ROWS[:VIDEO]:
            sizes = [size for turn in turns for size in turn.pictures]
            seed = sum(map(len, self._pictures))
            self._pictures.append(
                [picture(seed + i, round(w * side), round(h * side)) for i, (w, h) in enumerate(sizes)]
            )
            self._videos.append([video(7, turn.frames, side, 3 * side // 4) for turn in turns if turn.frames])
            self._texts.append(self._render(turns))
        placeholders = len(self._pictures[LONG])
        while len(processor.tokenizer(self._texts[LONG])["input_ids"]) < LONG_TEXT + placeholders:
            self._texts[LONG] = self._texts[LONG].replace("Which of", "Look at them closely. Which of", 1)
        self._encoded = cache(self._encode)

    def _render(self, turns: tuple[Turn, ...]) -> str:
        """Write the prompt with the checkpoint's chat template, or else as LLaVA-1.5 does."""
        if not getattr(self.processor, "chat_template", None):
            return " A quiet scene. ".join(map(self._render_turn, turns))
        messages: list[dict] = []
        for turn in turns:
            media = [{"type": "image"}] * len(turn.pictures) + [{"type": "video"}] * bool(turn.frames)
            messages.append({"role": "user", "content": [*media, {"type": "text", "text": turn.text}]})
            messages.append({"role": "assistant", "content": [{"type": "text", "text": "A quiet scene."}]})
        return self.processor.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)

    def _render_turn(self, turn: Turn) -> str:
        """Write a turn as LLaVA-1.5 does."""
        media = [self.processor.image_token] * len(turn.pictures)
        if turn.frames:
            media.append(self.processor.video_token)
        return "USER: " + "\n".join([*media, turn.text]) + " ASSISTANT:"

    def inputs(self, rows: tuple[int, ...] = (), side: str = "left") -> dict[str, Tensor]:
        """Return copies, which a method may edit, of the inputs of `rows` (by default the batch), padded on `side`."""
        return {name: x.clone() for name, x in self._encoded(rows or self.batch, side).items()}

    def visual(self, row: int) -> Tensor:
        """Return (L,) bool, True at the placeholders of pictures and videos in a prompt."""
        config = self.model.config
        media = [config.image_token_id, *([config.video_token_id] if self.videos else [])]
        ids = self._encoded((row,), "left")["input_ids"][0]
        return torch.isin(ids, ids.new_tensor(media))

    def _encode(self, rows: tuple[int, ...], side: str) -> dict[str, Tensor]:
        images = images_of_prompts(self.processor, [self._pictures[i] for i in rows])
        videos = [video for i in rows for video in self._videos[i]]
        media: dict[str, Any] = {name: x for name, x in (("images", images), ("videos", videos)) if x}
        if videos:
            media["do_sample_frames"] = False
        text = [self._texts[i] for i in rows]
        encoded = self.processor(text=text, **media, padding=True, padding_side=side, return_tensors="pt")
        return dict(encoded.to(self.model.device, self.model.dtype))
