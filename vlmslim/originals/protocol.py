"""The protocol of an evaluation: how a picture becomes a square, and which prompt stands around a question.

The papers evaluate LLaVA-1.5 with the authors' code, which pads a picture and gives a system prompt. HF's conversion
cuts the centre out and gives none. Both are the same weights.
"""

from typing import Any

from vlmslim.originals.processor import image_processor, mark_parts
from vlmslim.originals.templates import CONVERSATIONS, conversation_of
from vlmslim.originals.templates import conversation as conversation_named

PROTOCOLS = ("original", "hf")
ASPECTS = ("pad", "crop")
OWN = "of the checkpoint"  # the conversation where no name is known
AUTHORS = ("llava", "llava_next", "llava_next_video", "llava_onevision")  # the families of LLaVA's authors


def check(protocol: str | None, image_aspect_ratio: str | None, conversation: str | None) -> None:
    """Refuse names that do not exist, before a checkpoint is loaded.

    Raises:
        ValueError: which, and what to write instead.
    """
    named = (("protocol", protocol, PROTOCOLS), ("image_aspect_ratio", image_aspect_ratio, ASPECTS))
    for key, value, known in named:
        if value is not None and value not in known:
            raise ValueError(f"{key}={value!r}: use {' or '.join(known)}")
    if conversation is not None:
        conversation_named(conversation)


def describe(processor: Any, config: Any) -> dict[str, str]:
    """Say under which protocol a processor prepares questions.

    Args:
        processor: of a checkpoint.
        config: the checkpoint's configuration.

    Returns:
        `image_aspect_ratio`, "pad", "crop", "anyres", or "native" in other families; `conversation`, its name or `OWN`;
        and `protocol`: "original" or "hf", or "mixed" where one of the two is the authors' and the other is not.
    """
    pictures = getattr(processor, "image_processor", None)
    aspect = "pad" if getattr(pictures, "do_pad", False) else "crop"
    if config.model_type != "llava":
        aspect = "anyres" if getattr(config, "image_grid_pinpoints", None) else "native"
    template = getattr(processor, "chat_template", None)
    names = [name for name, one in CONVERSATIONS.items() if one.template() == template]
    conversation = names[0] if names else OWN
    theirs = aspect == "pad" or aspect == "anyres" and conversation != OWN
    protocol = "hf" if conversation == OWN and not theirs else "mixed"
    if theirs and conversation == _usual(config):
        protocol = "original"
    return {"protocol": protocol, "image_aspect_ratio": aspect, "conversation": conversation}


def apply(
    processor: Any,
    config: Any,
    protocol: str | None = None,
    image_aspect_ratio: str | None = None,
    conversation: str | None = None,
) -> None:
    """Change a processor to a protocol. Without one, the processor stays as it is.

    Args:
        processor: of a checkpoint in either format.
        config: the checkpoint's configuration.
        protocol: "original", or "hf" for the processor of a checkpoint in the form of transformers as it is.
        image_aspect_ratio: "pad" or "crop", instead of the protocol's.
        conversation: a name of `CONVERSATIONS`, instead of the protocol's.

    Raises:
        ValueError: the checkpoint cannot have this protocol; the message says why.
    """
    check(protocol, image_aspect_ratio, conversation)
    if protocol == "hf" and describe(processor, config)["conversation"] != OWN:
        raise ValueError(
            "protocol=hf is what HF's conversions bring, and this checkpoint brings the authors' protocol: leave it "
            "out, or give image_aspect_ratio and conversation"
        )
    if config.model_type not in AUTHORS and (protocol == "original" or conversation is not None):
        key = "protocol=original" if protocol == "original" else f"conversation={conversation}"
        raise ValueError(f"{key} is of LLaVA's authors, and {config.model_type} has pictures and prompts of its own")
    if image_aspect_ratio is not None and config.model_type != "llava":
        how = "cuts pictures into tiles" if config.model_type in AUTHORS else "fits pictures in its own way"
        raise ValueError(f"image_aspect_ratio={image_aspect_ratio} is for LLaVA-1.5; {config.model_type} {how}")
    if protocol == "original":
        conversation = conversation or conversation_of(config.get_text_config())
        if config.model_type == "llava":
            image_aspect_ratio = image_aspect_ratio or "pad"
    if image_aspect_ratio is not None:
        processor.image_processor = _fitting(processor.image_processor, image_aspect_ratio == "pad")
    if conversation is not None:
        processor.chat_template = conversation_named(conversation).template()
    changed = image_aspect_ratio is not None or conversation is not None
    if changed and (protocol == "original" or describe(processor, config)["protocol"] == "original"):
        mark_parts(processor.tokenizer)
        _resize_with_pillow(processor)


def _usual(config: Any) -> str | None:
    """Return the conversation that the authors use with a language model; None if vlmslim knows none."""
    try:
        return conversation_of(config.get_text_config())
    except ValueError:
        return None


def _resize_with_pillow(processor: Any) -> None:
    """Exchange the image processor of LLaVA-NeXT and LLaVA-OneVision for the one that resizes as the authors do."""
    family = type(processor.image_processor).__name__.removesuffix("ImageProcessorPil").removesuffix("ImageProcessor")
    if family in ("LlavaNext", "LlavaOnevision"):
        options = _options(processor.image_processor, "size", "crop_size", "image_grid_pinpoints")
        processor.image_processor = image_processor(family, **options)


def _fitting(pictures: Any, pad: bool) -> Any:
    """Make the image processor that pads pictures, or that does not, for the tower that another one serves."""
    options = _options(pictures, "size", "crop_size")
    options["do_center_crop"] = bool(getattr(pictures, "do_center_crop", False))  # SigLIP's stretches instead
    return image_processor("Llava", do_pad=pad, **options)


def _options(pictures: Any, *names: str) -> dict[str, Any]:
    """Return options of an image processor that are given, and the statistics of its colours."""
    given = pictures.to_dict()
    wanted = (*names, "image_mean", "image_std", "resample")
    return {name: given[name] for name in wanted if given.get(name) is not None}
