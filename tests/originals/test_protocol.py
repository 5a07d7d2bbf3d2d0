"""The papers' pictures and prompts, for a checkpoint in either format."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import InternVLConfig, Qwen2Config

from vlmslim.loading import Located, load_config, load_processor
from vlmslim.originals.protocol import OWN, apply, describe

SQUARE, TILES = "bundled/tiny-llava", "bundled/tiny-llava-next"
SIDE = 192
ASKED = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]


def loaded(name):
    place = Located(name.replace("bundled/", "vlmslim/bundled/"), None, [])
    return load_processor(place), load_config(place)


def under(name, **how):
    """Return a processor under a protocol, and what is told of it."""
    processor, config = loaded(name)
    apply(processor, config, **how)
    return processor, describe(processor, config)


def prompt(processor) -> str:
    return processor.apply_chat_template(ASKED, add_generation_prompt=True, tokenize=False)


@pytest.mark.parametrize(
    "how, told",
    [
        ({}, ("hf", "crop", OWN)),
        ({"protocol": "hf"}, ("hf", "crop", OWN)),
        ({"protocol": "original"}, ("original", "pad", "vicuna_v1")),
        ({"image_aspect_ratio": "pad"}, ("mixed", "pad", OWN)),
        ({"conversation": "vicuna_v1"}, ("mixed", "crop", "vicuna_v1")),
        ({"image_aspect_ratio": "pad", "conversation": "vicuna_v1"}, ("original", "pad", "vicuna_v1")),
        ({"protocol": "original", "image_aspect_ratio": "crop"}, ("mixed", "crop", "vicuna_v1")),
        ({"protocol": "original", "conversation": "qwen_1_5"}, ("mixed", "pad", "qwen_1_5")),
        ({"protocol": "hf", "image_aspect_ratio": "pad"}, ("mixed", "pad", OWN)),
    ],
)
def test_what_is_told_is_what_was_asked(how, told):
    _, found = under(SQUARE, **how)
    assert tuple(found[key] for key in ("protocol", "image_aspect_ratio", "conversation")) == told


def test_hf_leaves_the_processor_as_it_is():
    processor, config = loaded(SQUARE)
    before = (processor.image_processor, processor.chat_template)
    for how in ({}, {"protocol": "hf"}):
        apply(processor, config, **how)
        assert before[0] is processor.image_processor and before[1] is processor.chat_template
    assert prompt(processor) == "USER: <image>\nWhat? ASSISTANT:"


def test_the_papers_prompt_and_picture():
    processor, _ = under(SQUARE, protocol="original")
    assert prompt(processor) == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat? ASSISTANT:"
    )
    pixels = np.random.default_rng(0).integers(0, 256, (101, 255, 3), dtype=np.uint8)
    given = Image.fromarray(pixels)
    pictures = processor.image_processor
    square = Image.new("RGB", (255, 255), tuple(int(255 * x) for x in pictures.image_mean))
    square.paste(given, (0, 77))
    seen = pictures(given, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)["pixel_values"]
    assert np.array_equal(np.asarray(seen[0]).transpose(1, 2, 0), np.asarray(square))
    resized = np.asarray(square.resize((SIDE, SIDE), Image.BICUBIC)) / 255
    want = (resized - np.array(pictures.image_mean)) / np.array(pictures.image_std)
    seen = processor(images=[given], text=["<image>"], return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(seen, torch.tensor(want.transpose(2, 0, 1)).float(), atol=1e-5, rtol=0)


def test_a_picture_is_cropped_again():
    original, _ = under(SQUARE, protocol="original", image_aspect_ratio="crop")
    hf, _ = under(SQUARE)
    given = {"images": [Image.new("RGB", (255, 101), "red")], "text": ["<image>"], "return_tensors": "pt"}
    torch.testing.assert_close(original(**given)["pixel_values"], hf(**given)["pixel_values"])


def test_tiles_stay_tiles():
    processor, told = under(TILES, protocol="original")
    assert told == {"protocol": "original", "image_aspect_ratio": "anyres", "conversation": "vicuna_v1"}
    before, _ = loaded(TILES)
    given = {"images": [Image.new("RGB", (300, 200), "red")], "text": ["<image>"], "return_tensors": "pt"}
    ours, theirs = processor(**given), before(**given)
    assert ours["pixel_values"].shape == theirs["pixel_values"].shape
    torch.testing.assert_close(ours["pixel_values"], theirs["pixel_values"], atol=0.05, rtol=0)
    assert under(TILES)[1]["protocol"] == "hf"
    parts, told = under(TILES, conversation="vicuna_v1")  # nothing else of the protocol is left to ask for
    assert told["protocol"] == "original" and torch.equal(parts(**given)["pixel_values"], ours["pixel_values"])
    with pytest.raises(ValueError, match="image_aspect_ratio=pad is for LLaVA-1.5; llava_next cuts pictures into"):
        under(TILES, image_aspect_ratio="pad")


def test_an_original_brings_the_papers_protocol(originals, kind):
    processor, config = loaded(str(originals[kind]))
    told = describe(processor, config)
    assert told["protocol"] == "original" and told["image_aspect_ratio"] == ("pad" if kind == "llava" else "anyres")
    pictures = type(processor.image_processor)
    apply(processor, config, "original")  # changes nothing
    assert describe(processor, config) == told and type(processor.image_processor) is pictures
    with pytest.raises(ValueError, match="protocol=hf is what HF's conversions bring, and this checkpoint brings"):
        apply(processor, config, "hf")


@pytest.mark.parametrize(
    "how, message",
    [
        ({"protocol": "original"}, "protocol=original is of LLaVA's authors, and internvl has pictures and prompts"),
        ({"conversation": "qwen_1_5"}, "conversation=qwen_1_5 is of LLaVA's authors"),
        ({"image_aspect_ratio": "pad"}, "is for LLaVA-1.5; internvl fits pictures in its own way"),
    ],
)
def test_other_families_have_a_protocol_of_their_own(how, message):
    """The language model of InternVL is Qwen2, and that of LLaVA-OneVision too, but its placeholder is another."""
    config = InternVLConfig(text_config=Qwen2Config(vocab_size=64).to_dict())
    processor, _ = loaded(SQUARE)
    apply(processor, config, "hf")
    assert describe(processor, config)["image_aspect_ratio"] == "native"
    with pytest.raises(ValueError, match=message):
        apply(processor, config, **how)


@pytest.mark.parametrize(
    "how, message",
    [
        ({"protocol": "papers"}, "protocol='papers': use original or hf"),
        ({"image_aspect_ratio": "square"}, "image_aspect_ratio='square': use pad or crop"),
        ({"conversation": "vicuna"}, "conversation='vicuna': use one of vicuna_v1"),
    ],
)
def test_names_that_do_not_exist(how, message):
    with pytest.raises(ValueError, match=message):
        under(SQUARE, **how)
