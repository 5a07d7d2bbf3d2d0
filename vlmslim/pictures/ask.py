"""Ask one question under several methods: answers, where the tokens went, counts and times."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmslim.compressor import Compressor
from vlmslim.cost.flops import DecoderShape, prefill_flops
from vlmslim.cost.timing import TokenTimestamps
from vlmslim.evaluation.conversation import Prompter, user_message
from vlmslim.io.messages import one_line
from vlmslim.patching import Method, patch
from vlmslim.pictures.trace import Trace

UNPATCHED = "unpatched"


@dataclass
class Answer:
    """The answer of a model under one method.

    method : as the user wrote it, or `UNPATCHED`
    text   : the answer
    traces : of each image of the prompt
    receipt: `Receipt.summary()` of this question alone
    flops  : of the prefill in the language model
    ttft_ms, latency_ms : time to the first token and to the last, milliseconds, measured once
    tokens : tokens of the answer
    """

    method: str
    text: str
    traces: list[Trace]
    receipt: dict[str, Any]
    flops: float
    ttft_ms: float
    latency_ms: float
    tokens: int


def ask(
    model: Any,
    processor: Any,
    question: str,
    media: Iterable[Any],
    methods: Sequence[tuple[str, Method | list[Compressor]]] = (),
    *,
    new_tokens: int = 32,
    warm: bool = False,
) -> list[Answer]:
    """Answer a question about pictures, unpatched and under each method, by greedy decoding.

    Args:
        model: a loaded model without a patch. It is patched and restored for each method.
        processor: of its checkpoint, with a chat template.
        question: the text after the pictures.
        media: pictures, paths of pictures or videos, or the frames of a video.
        methods: for each, a name to show and what `vlmslim.patch` takes.
        new_tokens: most tokens of an answer.
        warm: answer one token first, so that the times hold no first call. It costs one more prefill for each method.

    Raises:
        ValueError: a picture that cannot be read, a method that does not fit the model, or a prompt without a picture.
    """
    prompter = Prompter(processor)
    inputs = prompter.encode([prompter.render(user_message(question, list(media)))])
    inputs = inputs.to(model.device, model.dtype)
    shape = DecoderShape.from_config(model.config.get_text_config())
    how = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    answers = []
    for name, method in [(UNPATCHED, "none"), *methods]:
        with patch(model, method, record="tokens") as slim, torch.inference_mode():
            if warm:
                model.generate(**inputs, **how, max_new_tokens=1)
                slim.reset_receipt()
            stamps, start = TokenTimestamps(time.perf_counter), time.perf_counter()
            output = model.generate(**inputs, **how, max_new_tokens=new_tokens, streamer=stamps)
        last, made = slim.receipt.last, output[0, inputs["input_ids"].shape[1] :]
        lengths = [
            text + visual for text, visual in zip(last.text * len(last.visual), _first(last.visual), strict=True)
        ]
        answers.append(
            Answer(
                method=name,
                text=processor.tokenizer.decode(made, skip_special_tokens=True).strip(),
                traces=last.traces[0] if last.traces else [],
                receipt=slim.receipt.summary(),
                flops=prefill_flops(shape, lengths, lm_head_positions=1),
                ttft_ms=1000 * (stamps.seconds[1] - start),  # number 0 is the prompt
                latency_ms=1000 * (stamps.seconds[-1] - start),
                tokens=len(made),
            )
        )
    return answers


def _first(visual: list[list[int]]) -> list[int]:
    """Return the visual tokens of the first prompt in each layer."""
    return [rows[0] for rows in visual]


def readable(path: Path) -> Image.Image | Path:
    """Open a picture and turn it upright, as its camera noted, or return the path of a video.

    Raises:
        ValueError: there is no such file, or it is neither.
    """
    if not path.is_file():
        raise ValueError(f"there is no file {path}; give a picture or a video")
    try:
        with Image.open(path) as picture:
            picture.verify()  # also where another package told Pillow to accept torn files
        with Image.open(path) as picture:
            picture.load()
            still = getattr(picture, "n_frames", 1) == 1 or picture.format == "MPO"  # a photo with a preview after it
            return ImageOps.exif_transpose(picture) if still else path
    except UnidentifiedImageError:
        return _video(path)
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read as a picture ({one_line(error)}); save it anew as PNG or JPEG"
        ) from error


def _video(path: Path) -> Path:
    """Return the path of a video, once its first frame could be decoded."""
    from vlmslim.evaluation.conversation import read_frames

    try:
        read_frames(path, 1)
    except ImportError as error:
        raise ValueError(f'{path} is no picture, and videos need PyAV: pip install "vlmslim[eval]"') from error
    except Exception as error:  # PyAV has errors of its own kinds
        raise ValueError(f"{path} can be read neither as a picture nor as a video; give a PNG, JPEG or MP4") from error
    return path
