"""From a conversation with pictures to model inputs: chat template, placeholders, video frames, padding."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers import BatchFeature

from vlmslim.engine.families import images_of_prompts

#: `{"role": ..., "content": [...]}` with parts `{"type": "text", "text": ...}` and
#: `{"type": "image" | "video", "url": picture, frames or path}`; a text alone may stand for the content.
Message: TypeAlias = dict[str, Any]


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
            media: list[Any]
            if kind == "text":
                parts.append({"type": "text", "text": part["text"]})
                continue
            if kind not in ("image", "video"):
                raise TypeError(f"the prompt holds {kind!r}; this model reads text, images and videos")
            if kind == "video" or moves(source):
                frames = read_frames(source, self.max_frames_num)
                kind, media = "video", [frames]
                if "video" not in self._placeholders:  # a checkpoint without video sees the frames as images
                    kind, media = "image", [Image.fromarray(frame) for frame in frames]
            else:
                media = [read_picture(source)]
            prompt.media[kind] += media
            parts += [{"type": kind}] * len(media)
        return {"role": turn["role"], "content": parts}

    def encode(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """Return the model inputs of a batch, padded on the left."""
        texts = [prompt.text for prompt in prompts]
        images = images_of_prompts(self.processor, [prompt.media["image"] for prompt in prompts])
        videos = [video for prompt in prompts for video in prompt.media["video"]]
        media: dict[str, Any] = {name: found for name, found in (("images", images), ("videos", videos)) if found}
        if videos:
            media["do_sample_frames"] = False  # `read_frames` has chosen them
        return self.processor(text=texts, **media, padding=True, return_tensors="pt", **self._special(texts[0]))

    def continued(self, prompt: Prompt, answer: str) -> tuple[Prompt, list[int], list[int]]:
        """Return the prompt with `answer` after it, and the token ids before and of the answer.

        Among the ids before the answer, a picture is its placeholder alone.

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
        return Prompt(text, prompt.media), after[:shared], after[shared:]

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
        visuals: images, paths of images or videos, the frames of a video as a list or an array, or content parts; or
            None.
    """
    content: list[dict[str, Any]] = []
    for visual in visuals or []:
        if isinstance(visual, dict):
            content.append(visual)
        else:
            content.append({"type": "video" if _is_video(visual) else "image", "url": visual})
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


def _is_video(visual: Any) -> bool:
    """Tell whether something is the frames of a video, or the path of a file that Pillow cannot read."""
    if isinstance(visual, list | tuple) or isinstance(visual, np.ndarray) and visual.ndim == 4:
        return True
    if not isinstance(visual, str | Path):
        return False
    try:
        with Image.open(visual):
            return False
    except UnidentifiedImageError:
        return True


def moves(picture: Any) -> bool:
    """Tell whether a picture has several frames, as an animated GIF has."""
    if isinstance(picture, str | Path):
        with Image.open(picture) as opened:
            return getattr(opened, "n_frames", 1) > 1
    return getattr(picture, "n_frames", 1) > 1


def read_picture(source: Any) -> Image.Image:
    """Read a picture as RGB with 8 bits a channel.

    Pillow clips pictures of 16 bits, so that nearly all of them turn white; here they are scaled.

    Args:
        source: a picture, a path, or an array (height, width), (height, width, 3) or (height, width, 4) of uint8.

    Raises:
        TypeError: something else.
    """
    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim not in (2, 3):
            raise TypeError(
                f"a picture came as an array {source.shape} of {source.dtype}: give (height, width, 3) of uint8"
            )
        source = Image.fromarray(source)
    elif isinstance(source, str | Path):
        source = Image.open(source)
    if not isinstance(source, Image.Image):
        raise TypeError(f"a picture came as a {type(source).__name__}: give a PIL image, a path, or an array of uint8")
    if source.mode.startswith("I") or source.mode == "F":
        values = np.asarray(source).astype(np.float64)
        top = 1.0 if source.mode == "F" and values.max() <= 1 else 255.0 if values.max() <= 255 else 65535.0
        source = Image.fromarray((values.clip(0, top) * (255 / top)).round().astype(np.uint8))
    return source.convert("RGB")


def read_frames(source: Any, count: int) -> np.ndarray:
    """Read at most `count` frames of a video, evenly spaced from the first to the last.

    Args:
        source: a path, an animated picture, or the frames: a list of pictures, or an array (frames, height, width, 3).
        count: most frames.

    Returns:
        (frames, height, width, 3) uint8.

    Raises:
        ValueError: no frame could be decoded.
        TypeError: a frame is no picture.
    """
    if isinstance(source, Image.Image) or isinstance(source, str | Path) and not _is_video(source):
        picture = source if isinstance(source, Image.Image) else Image.open(source)
        frames = []
        for i in _spread(getattr(picture, "n_frames", 1), count):
            picture.seek(i)
            frames.append(np.asarray(read_picture(picture.copy())))
        return np.stack(frames)
    if not isinstance(source, str | Path):
        if not len(source):
            raise ValueError("a video came as a list without frames")
        return np.stack([np.asarray(read_picture(source[i])) for i in _spread(len(source), count)])
    return _decoded(source, count)


def _spread(total: int, count: int) -> list[int]:
    """Choose at most `count` of `total` frames, evenly spaced, the first and the last among them."""
    return sorted(set(np.linspace(0, total - 1, min(count, total)).astype(int).tolist()))


def _decoded(path: str | Path, count: int) -> np.ndarray:
    import av  # here, because pictures need none of it

    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        # Headers may not know the number of frames; counting packets does not decode them.
        total = stream.frames or sum(1 for packet in container.demux(stream) if packet.size)
        wanted = set(_spread(total, count))
        container.seek(0)
        frames = [f.to_ndarray(format="rgb24") for i, f in enumerate(container.decode(stream)) if i in wanted]
    if not frames:
        raise ValueError(f"{path}: no frame could be decoded")
    return np.stack(frames)
