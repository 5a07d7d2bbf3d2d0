"""Pictures and tokens are those of the authors' code, computed here with Pillow alone."""

import math

import numpy as np
import pytest
import torch
from original_checkpoints import original, tokenizer
from PIL import Image
from tiny import SIDE

from vlmslim.loading import Located, load_config, load_processor, located
from vlmslim.originals.protocol import apply, describe

CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
SIGLIP = ((0.5,) * 3, (0.5,) * 3)
SIZES = [(53, 31), (31, 53), (32, 32), (7, 64), (101, 100), (20, 20), (33, 65)]


def picture(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def normal(pictures: list[Image.Image], statistics) -> torch.Tensor:
    mean, std = (np.array(values, dtype=np.float64) for values in statistics)
    stacked = np.stack([(np.asarray(one) / 255 - mean) / std for one in pictures])
    return torch.tensor(stacked.transpose(0, 3, 1, 2)).float()


def padded(given: Image.Image, statistics) -> Image.Image:
    """Put a picture into the middle of a square of the mean colour; of an odd margin, the smaller part comes first."""
    side = max(given.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * x) for x in statistics[0]))
    square.paste(given, ((side - given.width) // 2, (side - given.height) // 2))
    return square


def cropped(given: Image.Image) -> Image.Image:
    """Resize the shorter side, and cut out the middle."""
    scale = SIDE / min(given.size)
    width, height = (SIDE if side == min(given.size) else int(scale * side) for side in given.size)
    left, top = (width - SIDE) // 2, (height - SIDE) // 2
    return given.resize((width, height), Image.BICUBIC).crop((left, top, left + SIDE, top + SIDE))


def tiles(given: Image.Image, sizes: list[tuple[int, int]]) -> list[Image.Image]:
    """Cut a picture into a thumbnail and tiles; the first of equally good mosaics, in (width, height), is taken."""

    def quality(size):
        scale = min(size[0] / given.width, size[1] / given.height)
        shown = min(int(given.width * scale) * int(given.height * scale), given.width * given.height)
        return shown, -(size[0] * size[1] - shown)

    width, height = max(sizes, key=quality)  # `max` returns the first of several
    if width / given.width < height / given.height:
        inner = (width, min(math.ceil(given.height * width / given.width), height))
    else:
        inner = (min(math.ceil(given.width * height / given.height), width), height)
    mosaic = Image.new("RGB", (width, height))
    mosaic.paste(given.resize(inner, Image.BICUBIC), ((width - inner[0]) // 2, (height - inner[1]) // 2))
    cut = [mosaic.crop((x, y, x + SIDE, y + SIDE)) for y in range(0, height, SIDE) for x in range(0, width, SIDE)]
    return [given.resize((SIDE, SIDE), Image.BICUBIC), *cut]


def processor(folder):
    return load_processor(Located(str(folder), None, []))


def pixels(folder, given: Image.Image) -> torch.Tensor:
    """Return what the model sees: (crops, 3, SIDE, SIDE)."""
    seen = processor(folder)(images=[given], text=["<image>"], return_tensors="pt")["pixel_values"]
    return seen if seen.ndim == 4 else seen[0]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pictures_of_llava_are_padded_with_the_mean_colour(originals, size):
    given = picture(*size)
    want = normal([padded(given, CLIP).resize((SIDE, SIDE), Image.BICUBIC)], CLIP)
    torch.testing.assert_close(pixels(originals["llava"], given), want, atol=1e-5, rtol=0)


def test_padding_alone_is_equal_pixel_for_pixel(originals):
    """Before anything is resized: every pixel of the square is the authors'."""
    pictures = processor(originals["llava"]).image_processor
    for size in SIZES:
        given = picture(*size)
        seen = pictures(given, do_resize=False, do_center_crop=False, do_rescale=False, do_normalize=False)
        assert np.array_equal(np.asarray(seen["pixel_values"][0]).transpose(1, 2, 0), np.asarray(padded(given, CLIP)))


@pytest.mark.parametrize("size", [size for size in SIZES if size != (7, 64)], ids=str)
def test_pictures_of_a_checkpoint_without_padding_are_cropped(tmp_path, size):
    folder = original("llava", tmp_path / "square", image_aspect_ratio=None)
    given = picture(*size)
    torch.testing.assert_close(pixels(folder, given), normal([cropped(given)], CLIP), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind, statistics", [("next", CLIP), ("onevision", SIGLIP)])
def test_tiles_are_those_of_the_authors(originals, kind, statistics, size):
    """A square of 20 pixels fits a wide and a tall mosaic equally well."""
    given = picture(*size)
    sizes = [(64, 32), (32, 64), (64, 64)]  # as config.json has them, (width, height)
    torch.testing.assert_close(
        pixels(originals[kind], given), normal(tiles(given, sizes), statistics), atol=1e-5, rtol=0
    )


def test_the_statistics_of_a_tower_of_ones_own(tmp_path):
    folder = original("llava", tmp_path / "own")
    (tmp_path / "own-tower" / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3]}')
    assert tuple(processor(folder).image_processor.image_mean) == (0.1, 0.2, 0.3)


def test_a_language_model_of_unknown_conversation_has_no_prompt(tmp_path):
    """LLaVA-NeXT has one on Llama 3; `conversation` gives it a prompt."""
    place = located(
        str(original("next", tmp_path / "llama3", architectures=["LlavaLlamaForCausalLM"], vocab_size=2**17))
    )
    with pytest.warns(UserWarning, match="no conversation of the authors is known for a llama with 131072 words: give"):
        processor = load_processor(place)
    assert processor.chat_template is None
    apply(processor, load_config(place), conversation="vicuna_v1")
    assert describe(processor, load_config(place))["conversation"] == "vicuna_v1"


def test_the_text_after_a_picture_begins_as_a_text_of_its_own(originals):
    """The authors' code cuts a prompt at its pictures and tokenizes each part; SentencePiece marks their beginnings."""
    given = "USER: <image>\nWhat is it? ASSISTANT:"
    loaded = processor(originals["llava"]).tokenizer
    first, second = (tokenizer("llava")(part)["input_ids"] for part in given.split("<image>"))
    assert second[0] == tokenizer("llava").bos_token_id
    assert loaded(given)["input_ids"] == [*first, loaded.convert_tokens_to_ids("<image>"), *second[1:]]


@pytest.mark.parametrize("kind, count", [("llava", 16), ("next", 16 * 3), ("onevision", 16 * 3)])
def test_placeholders_are_as_many_as_visual_tokens(originals, kind, count):
    made = processor(originals[kind])
    ids = made(images=[picture(64, 32)], text=["<image>\nWhat?"], return_tensors="pt")["input_ids"]
    newlines = 0 if kind == "llava" else 4
    assert int((ids == made.tokenizer.convert_tokens_to_ids("<image>")).sum()) == count + newlines
