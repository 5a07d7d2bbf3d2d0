"""The processor that a checkpoint in the authors' format lacks: pictures, tokenizer and chat template."""

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, CLIPVisionConfig, LlavaConfig, LlavaOnevisionConfig
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from transformers.tokenization_utils_base import AddedToken

from vlmslim.io import hub
from vlmslim.io.messages import one_line
from vlmslim.originals.checkpoint import TOWERS, Original
from vlmslim.originals.templates import conversation, conversation_of

IMAGE, VIDEO = "<image>", "<video>"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def tokenizer_of(original: Original) -> Any:
    """Load the tokenizer of the language model, with `<image>`, and `<video>` where the model takes videos.

    The authors' code cuts a prompt at its pictures and reads each part as a text of its own. So a tokenizer of
    SentencePiece's kind, which marks the beginning of a text, marks the beginning of each part.

    Raises:
        ImportError: the tokenizer is a file of SentencePiece, and what reads it is not installed.
        ValueError: the checkpoint has no tokenizer.
    """
    if not any(map(original.has, _TOKENIZERS)):
        raise ValueError(f"{original.checkpoint} holds no tokenizer: there is none of {', '.join(_TOKENIZERS)} in it")
    how = {"revision": original.revision or "main", "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(original.checkpoint, **how, **hub.how_to_load(original.checkpoint))
    except (ImportError, ValueError) as error:
        if (why := why_no_sentencepiece()) is None:
            raise
        raise ImportError(
            f"its tokenizer could not be read; if it is a tokenizer.model of SentencePiece, that is because {why}: "
            "pip install 'vlmslim[originals]'"
        ) from error
    names = [IMAGE, VIDEO] if original.kind is LlavaOnevisionConfig else [IMAGE]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in names], special_tokens=True)
    _mark_texts(tokenizer, original)
    mark_parts(tokenizer)
    return tokenizer


def why_no_sentencepiece() -> str | None:
    """Return the reason why transformers cannot read a tokenizer.model of SentencePiece; None if it can."""
    try:
        from sentencepiece import sentencepiece_model_pb2  # noqa: F401
    except Exception as error:  # a protobuf that is too old is an error of protobuf's own kind
        return one_line(error)
    return None


def _mark_texts(tokenizer: Any, original: Original) -> None:
    """Let texts begin with the mark of SentencePiece where tokenizer.model says so: transformers 5.17 leaves it out."""
    from tokenizers.pre_tokenizers import Metaspace

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.pre_tokenizer is not None or original.has("tokenizer.json"):
        return
    if (file := original.file("tokenizer.model")) is not None:
        from sentencepiece import sentencepiece_model_pb2

        proto: Any = sentencepiece_model_pb2
        if proto.ModelProto.FromString(Path(file).read_bytes()).normalizer_spec.add_dummy_prefix:
            backend.pre_tokenizer = Metaspace(prepend_scheme="first", split=False)


def mark_parts(tokenizer: Any) -> None:
    """Let the text after a picture begin as every text does."""
    from tokenizers import pre_tokenizers

    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    before = getattr(backend, "pre_tokenizer", None)
    marks = before[0] if isinstance(before, pre_tokenizers.Sequence) else before  # a tokenizer.model makes a sequence
    if isinstance(marks, pre_tokenizers.Metaspace) and marks.prepend_scheme == "first":
        marks.prepend_scheme = "always"
        backend.pre_tokenizer = before


def processor_of(original: Original, tokenizer: Any) -> Any:
    """Make the processor: pictures as the authors' code fits them to the tower, and its prompts.

    Where vlmslim knows no conversation of the language model, a warning says that the processor has no chat template.
    """
    config = original.config
    tower, strategy = config.vision_config, config.vision_feature_select_strategy
    has_cls = isinstance(tower, CLIPVisionConfig)
    side = tower.image_size
    template = None
    try:
        template = conversation(conversation_of(config.text_config)).template()
    except ValueError as error:
        warnings.warn(f"{original.checkpoint}: {error}", stacklevel=2)
    mean, std = _statistics(original, has_cls)
    square = {"height": side, "width": side}
    pictures: dict[str, Any] = {"image_mean": mean, "image_std": std}
    common = {"tokenizer": tokenizer, "chat_template": template, "vision_feature_select_strategy": strategy}
    if original.kind is LlavaOnevisionConfig:
        pictures |= {"size": square, "image_grid_pinpoints": config.image_grid_pinpoints}
        return transformers.LlavaOnevisionProcessor(
            image_processor("LlavaOnevision", **pictures),
            video_processor=transformers.LlavaOnevisionVideoProcessor(size=square, image_mean=mean, image_std=std),
            num_image_tokens=(side // tower.patch_size) ** 2 + has_cls,
            vision_aspect_ratio=config.vision_aspect_ratio,
            **common,
        )
    common |= {"patch_size": tower.patch_size, "num_additional_image_tokens": int(has_cls)}
    pictures |= {"size": {"shortest_edge": side}, "crop_size": square}
    if original.kind is LlavaConfig:
        pictures["do_pad"] = original.aspect == "pad"
        if not has_cls:  # the authors' SigLIP processor stretches pictures that are not padded
            pictures |= {"size": square, "do_center_crop": False}
        return transformers.LlavaProcessor(image_processor("Llava", **pictures), **common)
    pictures["image_grid_pinpoints"] = config.image_grid_pinpoints
    return transformers.LlavaNextProcessor(image_processor("LlavaNext", **pictures), **common)


def image_processor(family: str, **options: Any) -> Any:
    """Make the image processor of a family that resizes with Pillow, as the authors' code does.

    The one that works on tensors rounds differently.
    """
    name = f"{family}ImageProcessor"
    return getattr(transformers, f"{name}Pil", getattr(transformers, name))(**options)


def _statistics(original: Original, has_cls: bool) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of colours, as the tower was trained with them."""
    mean, std = (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD) if has_cls else (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD)
    own: dict[str, Any] = {}
    if original.tower_name.rstrip("/").rpartition("/")[2] not in TOWERS:
        with suppress(OSError, ValueError):  # a tower alone, without a processor of its own
            own, _ = ImageProcessingMixin.get_image_processor_dict(
                original.tower_name, **hub.how_to_load(original.tower_name)
            )
    return list(own.get("image_mean", mean)), list(own.get("image_std", std))
