"""A visitor of the demo gets own answers, whoever else asks, and a sentence for every mistake."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image

from vlmslim.demo.questions import MOST_BYTES, NOTHING


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
    paths = {name: tmp_path / name for name in ("text.png", "torn.png", "huge.png", "heavy.png", "moving.gif")}
    paths["text.png"].write_text("no picture")
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
        ({"question": " "}, "there is no question yet"),
        ({"question": "x" * 501}, "the question has 501 letters; write one of at most 500"),
        ({"first": "/etc/passwd:X"}, "/etc/passwd:X is no method of this list"),
        ({"percent": 0}, "a budget of 0 % keeps nothing"),
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
