"""A visitor of the demo gets own answers, whoever else asks, and a sentence for every mistake."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from vlmslim.demo.questions import MOST_BYTES, NOTHING, checked_picture
from vlmslim.evaluation.conversation import read_picture


def said(answers) -> list[tuple[str, str, float]]:
    return [(one.method, one.text, one.receipt["kept"]) for one in answers]


def test_several_visitors_at_once_get_their_own_answers(questions, pictures):
    asked = [(*pictures[i % 3], ["divprune", "random", "pool"][i % 3], NOTHING, 20 + 15 * i) for i in range(4)]
    alone = [said(questions.ask(*each)) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        together = [said(answers) for answers in pool.map(lambda each: questions.ask(*each), asked)]
    assert together == alone
    assert [one[1][2] for one in alone] == [round(144 * (20 + 15 * i) / 100) for i in range(4)]
    assert len({str(one) for one in alone}) == 4


def test_answers_are_those_of_the_model(questions, pictures):
    path, question = pictures[0]
    model, processor = questions.model, questions.processor
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=[Image.open(path)], text=[prompt], return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    expected = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    unpatched, one = questions.ask(path, question, "fastv", "fastv", 25)
    assert unpatched.text == expected and one.method == "fastv"
    assert unpatched.receipt["visual_tokens_per_layer"] == [144] * 8
    assert one.receipt["visual_tokens_per_layer"] == [144] * 2 + [36] * 6
    assert one.flops < unpatched.flops


@pytest.fixture
def files(tmp_path, pictures):
    """Files that a visitor should not upload."""
    names = "text.png", "torn.png", "huge.png", "heavy.png", "moving.gif", "long.png", "drawing.png", "program.png"
    paths = {name: tmp_path / name for name in names}
    paths["text.png"].write_text("no picture")
    paths["drawing.png"].write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    Image.new("RGB", (8, 8)).save(paths["program.png"], "EPS")
    Image.new("1", (1, 5000)).save(paths["long.png"])
    with open(pictures[0][0], "rb") as whole:
        paths["torn.png"].write_bytes(whole.read(3000))
    Image.new("1", (8_000, 8_000)).save(paths["huge.png"])
    paths["heavy.png"].write_bytes(b"x" * (MOST_BYTES + 1))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(paths["moving.gif"], save_all=True, append_images=frames[1:])
    return paths


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"path": None}, "there is no picture yet; pick one below or upload one"),
        ({"path": "nowhere.png"}, "the file cannot be read as a picture"),
        ({"path": "{text.png}"}, "the file cannot be read as a picture; upload a PNG, JPEG or WebP"),
        ({"path": "{torn.png}"}, "the picture is damaged"),
        ({"path": "{huge.png}"}, "the picture has 8000 x 8000 pixels"),
        ({"path": "{heavy.png}"}, "the picture has more than 10 MB"),
        ({"path": "{moving.gif}"}, "the picture is animated"),
        ({"path": "{long.png}"}, "1 x 5000 pixels; upload one whose longer side is at most 50 times the shorter one"),
        ({"path": "{drawing.png}"}, "the file cannot be read as a picture"),
        ({"path": "{program.png}"}, "the file cannot be read as a picture"),
        ({"question": " "}, "there is no question yet"),
        ({"question": "x" * 501}, "the question has 501 letters; write one of at most 500"),
        ({"first": "/etc/passwd:X"}, "/etc/passwd:X is no method of this list"),
        ({"percent": 0}, "0 is no share of the visual tokens; give one from 1 to 100 %"),
        ({"percent": None}, "None is no share"),
    ],
)
def test_mistakes_get_a_sentence(questions, pictures, files, changes, message):
    path, question = pictures[0]
    asked = {"path": path, "question": question, "first": "divprune", "second": NOTHING, "percent": 25} | changes
    if (asked["path"] or "").startswith("{"):
        asked["path"] = str(files[asked["path"][1:-1]])
    with pytest.raises(ValueError, match=message):
        questions.ask(**asked)
    assert not hasattr(questions.model, "_vlmslim")


def test_every_kind_of_picture_is_read_as_it_looks(pictures, tmp_path):
    """Turned photos, photos with a preview, palettes, CMYK, grey of 16 bits, a single pixel."""
    with Image.open(pictures[0][0]) as opened:
        picture = opened.convert("RGB")
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    quantized, deep = picture.quantize(64), np.asarray(picture.convert("L")).astype(np.uint16) * 257
    saved = {
        "turned.png": (picture.rotate(90, expand=True), {"exif": turned}),
        "preview.jpg": (picture, {"format": "MPO", "save_all": True, "append_images": [Image.new("RGB", (8, 8))]}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "palette.png": (quantized, {"transparency": 0}),
        "deep.png": (Image.fromarray(deep), {}),
    }
    for name, (kind, how) in saved.items():
        kind.save(tmp_path / name, **how)
        read = checked_picture(str(tmp_path / name))
        wanted = picture.convert("L") if name == "deep.png" else picture
        seen = np.asarray(read_picture(read)).astype(int)
        off = np.abs(seen - np.asarray(wanted.convert("RGB"))).mean()
        assert read.size == picture.size and off < 8, name
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    assert checked_picture(str(tmp_path / "dot.png")).size == (1, 1)
