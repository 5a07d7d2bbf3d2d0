"""From a conversation with pictures to model inputs: chat template, placeholders, video frames, padding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import av
import numpy as np
from PIL import Image
from transformers import BatchFeature

#: `{"role": ..., "content": [...]}` with parts `{"type": "text", "text": ...}` and
#: `{"type": "image" | "video", "url": picture or path}`; a text alone may stand for the content.
Message: TypeAlias = dict[str, Any]

IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


@dataclass
class Prompt:
    """A rendered conversation and its pictures.

    text  : with one placeholder for each picture
    media : the images, and the videos as (frames, height, width, 3) uint8
    """

    text: str = ""
    media: dict[str, list[Any]] = field(default_factory=lambda: {"image": [], "video": []})


@dataclass
class Prompter:
    """Renders conversations with the chat template of a checkpoint's processor.

    processor : the processor of a LLaVA; its tokenizer is set to pad on the left
    max_frames_num : most frames taken from a video
    system_prompt : first message of every conversation
    """

    processor: Any
    max_frames_num: int = 32
    system_prompt: str | None = None

    def __post_init__(self) -> None:
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "left"  # generation continues at the end of every row
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token

    def render(self, messages: Sequence[Message]) -> Prompt:
        """Turn a conversation into text that ends where the answer begins.

        Raises:
            ValueError: the prompt does not have one placeholder for each picture.
            TypeError: a part is neither text nor image nor video.
        """
        prompt = Prompt()
        if self.system_prompt:
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        messages = [self._turn(turn, prompt) for turn in messages]
        texts = "".join(part.get("text", "") for turn in messages for part in turn["content"])
        for kind, token in self._placeholders.items():
            if token in texts:  # the text says itself where the pictures go
                for turn in messages:
                    turn["content"] = [part for part in turn["content"] if part["type"] != kind]
        prompt.text = self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        for kind, token in self._placeholders.items():
            found, given = prompt.text.count(token), len(prompt.media[kind])
            if found != given:
                raise ValueError(
                    f"{found} {token} in the prompt for {given} {kind}(s): the task's text must name all of them or "
                    f"none (then they go in front), and the chat template must print them. Prompt: {prompt.text!r}"
                )
        return prompt

    def _turn(self, turn: Message, prompt: Prompt) -> Message:
        """Return a message as chat templates expect it, and add its pictures to `prompt`."""
        content, parts = turn["content"], []
        given: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in given:
            kind: str = part["type"]
            source: Any = part.get("url")
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            if kind == "video":
                frames = read_frames(source, self.max_frames_num)
                media: list[Any] = [frames]
                if "video" not in self._placeholders:  # a checkpoint without video sees the frames as images
                    kind, media = "image", [Image.fromarray(frame) for frame in frames]
            elif kind == "image":
                media = [(source if isinstance(source, Image.Image) else Image.open(source)).convert("RGB")]
            else:
                raise TypeError(f"the prompt holds {kind!r}; this model reads text, images and videos")
            prompt.media[kind] += media
            parts += [{"type": kind}] * len(media)
        return {"role": turn["role"], "content": parts}

    def encode(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """Return the model inputs of a batch, padded on the left."""
        texts = [prompt.text for prompt in prompts]
        # Nested by prompt, because LLaVA-OneVision tiles an image only if it is the only one of its prompt.
        images = [prompt.media["image"] for prompt in prompts if prompt.media["image"]]
        videos = [video for prompt in prompts for video in prompt.media["video"]]
        media = {name: found for name, found in (("images", images), ("videos", videos)) if found}
        return self.processor(text=texts, **media, padding=True, return_tensors="pt", **self._special(texts[0]))

    def continued(self, prompt: Prompt, answer: str) -> tuple[Prompt, int]:
        """Return the prompt with `answer` after it, and how many of its tokens belong to the answer.

        Raises:
            ValueError: the answer is blank.
        """
        if not answer.strip():
            raise ValueError(f"nothing to score: the continuation is {answer!r}")
        text = prompt.text + self._separator + answer.lstrip()
        # The answer begins at the first token that it changes, which may hold characters of the prompt too. Pictures
        # stand before the answer, so that expanding their placeholders does not change its length.
        before, after = (self.tokenizer(t, **self._special(t))["input_ids"] for t in (prompt.text, text))
        shared = next((n for n, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), len(before))
        return Prompt(text, prompt.media), len(after) - shared

    @cached_property
    def _placeholders(self) -> dict[str, str]:
        """The text of a placeholder for each kind of picture."""
        tokens = {"image": self.processor.image_token}
        if getattr(self.processor, "video_processor", None) is not None:
            tokens["video"] = self.processor.video_token
        return tokens

    @cached_property
    def _separator(self) -> str:
        """The text between a generation prompt and the answer by the chat template, such as " " after "ASSISTANT:"."""
        user = {"role": "user", "content": [{"type": "text", "text": "question"}]}
        reply = {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}
        prompt = self.processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
        whole = self.processor.apply_chat_template([user, reply], tokenize=False)
        if not whole.startswith(prompt):
            return "" if prompt[-1:].isspace() else " "
        return whole[len(prompt) : whole.index("answer", len(prompt))]

    def _special(self, text: str) -> dict[str, bool]:
        """Keep the tokenizer from adding a beginning-of-sequence token if the chat template wrote one already."""
        bos = self.tokenizer.bos_token
        return {"add_special_tokens": False} if bos and text.startswith(bos) else {}


def user_message(text: str, visuals: Iterable[Any] | None) -> list[Message]:
    """Make a conversation of one message: pictures first, then the text.

    Args:
        text: the question.
        visuals: images, paths of images or videos, or content parts; or None.
    """
    content: list[dict[str, Any]] = []
    for visual in visuals or []:
        if isinstance(visual, dict):
            content.append(visual)
        elif isinstance(visual, str) and Path(visual).suffix.lower() not in IMAGE_SUFFIXES:
            content.append({"type": "video", "url": visual})
        else:
            content.append({"type": "image", "url": visual})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def read_frames(path: str, count: int) -> np.ndarray:
    """Read at most `count` frames of a video, evenly spaced from the first to the last.

    Returns:
        (frames, height, width, 3) uint8.

    Raises:
        ValueError: no frame could be decoded.
    """
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        # Headers may not know the number of frames; counting packets does not decode them.
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        wanted = set(np.linspace(0, total - 1, min(count, total)).astype(int).tolist())
        container.seek(0)
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(stream)) if i in wanted]
    if not frames:
        raise ValueError(f"{path}: no frame could be decoded")
    return np.stack(frames)
