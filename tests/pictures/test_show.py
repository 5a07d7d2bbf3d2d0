"""`vlmslim show`: answers and kept tokens as a picture and as a page."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlmslim.cli import app

QUESTION = "Is there a <b>cat</b>? Answer yes or no."


def show(*arguments):
    return CliRunner().invoke(app, ["show", "bundled/tiny-llava", *map(str, arguments)])


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    Image.fromarray(pixels).resize((192, 192)).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_picture_of_two_methods(picture, tmp_path):
    out = tmp_path / "out.png"
    done = show(picture, picture, "-q", QUESTION, "-m", "divprune:keep=36", "-m", "fastv:keep=36", "-o", out)
    assert done.exit_code == 0, done.output
    answers = [line.partition(": ")[0] for line in done.stdout.splitlines()[:-1]]
    assert answers == ["unpatched", "divprune:keep=36", "fastv:keep=36"] and done.stdout.endswith(f"{out}\n")
    with Image.open(out) as drawn:
        width, height = drawn.size
    assert 3 * 320 < width < 4 * 320, "the picture, scores and what is kept stand beside one another"
    assert 6 * 320 < height < 8 * 320, "two pictures under three methods make six lines"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["nowhere.png", "-q", "x", "-m", "divprune"], "there is no file nowhere.png; give a picture or a video"),
        (["{text}", "-q", "x", "-m", "divprune"], "can be read neither as a picture nor as a video"),
        (["{torn}", "-q", "x", "-m", "divprune"], "torn.png cannot be read as a picture .*; save it anew"),
        (["{picture}", "-q", "x"], "no method given; name one or several, such as -m divprune:keep=64"),
        (["{picture}", "-q", "x", "-m", "nrm"], "unknown method 'nrm'"),
        (["{picture}", "-q", "x", "-m", "divprune", "-o", "x.pdf"], "give a file that ends in .png or .html"),
        (["{picture}", "-q", "x", "-m", "{silent}:Silent"], "silent does not say which patches it made its tokens of"),
    ],
)
def test_mistakes_are_one_line(picture, tmp_path, arguments, message):
    files = {name: tmp_path / name for name in ("text.txt", "torn.png", "silent.py")}
    files["text.txt"].write_text("no picture")
    files["torn.png"].write_bytes(picture.read_bytes()[:2000])
    files["silent.py"].write_text(
        "from vlmslim import Compressed, Compressor\n\n\nclass Silent(Compressor):\n"
        "    def compress(self, image):\n        return Compressed(image.features[:9] * 2)\n"
    )
    named = {path.stem: path for path in files.values()} | {"picture": picture}
    out = [] if "-o" in arguments else ["-o", tmp_path / "out.png"]
    done = show(*(argument.format(**named) for argument in arguments), *out)
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert re.search(message, line), line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.slow
def test_the_page_shows_each_layer(page, picture, tmp_path):
    out = tmp_path / "out.html"
    done = show(
        picture, "-q", QUESTION, "-m", "divprune:keep=72+fastv:keep=36:layer=4", "-m", "pool:keep=36", "-o", out
    )
    assert done.exit_code == 0, done.output
    page.goto(out.as_uri())
    assert page.locator("h1").inner_text() == QUESTION, "markup in a question stays text"
    assert page.locator("tbody tr").count() == 3
    counts = {"0": ["144", "72", "36"], "4": ["144", "36", "36"]}
    for layer, kept in counts.items():
        page.get_by_label("decoder layer").fill(layer)
        shown = page.locator("figure.now figcaption:visible").all_inner_texts()
        assert [re.search(r"(\d+) of 144 visual tokens", text)[1] for text in shown] == kept
    assert page.evaluate("[...document.images].every(x => !x.complete || x.naturalWidth > 0)")
