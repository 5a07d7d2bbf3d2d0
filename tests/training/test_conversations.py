"""Training data: records are read or named when they are bad, and only answers are supervised."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

pytest.importorskip("pydantic", reason="the extra vlmslim[train] is not installed")

from training_data import Scenes

from vlmslim import bundled
from vlmslim.training.conversations import IGNORED, Collator, Conversations, Item, RecordError


def turns(*texts: str | None) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD = {"id": "a1", "image": "a.png", "conversations": turns("<image>\nWhat is it?", "A cat.")}
TEXT = {"id": "t1", "conversations": turns("Say yes.", "yes", "And no.", "no")}
LATE = {"id": "b2", "image": "b.png", "conversations": turns("How many?\n<image>", "2", "Sure?", "Yes, two.")}


@pytest.fixture
def processor():
    return AutoProcessor.from_pretrained(bundled.resolve("bundled/tiny-llava"))


def written(folder, records, name="data.json"):
    """A file of conversations beside its two pictures."""
    for i, picture in enumerate(("a.png", "b.png")):
        Image.new("RGB", (40 + i, 30), (200 * i, 80, 10)).save(folder / picture)
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (folder / name).write_text(text)
    return folder / name


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_records_are_read(name, tmp_path):
    data = Conversations(written(tmp_path, [GOOD, TEXT, LATE], name), tmp_path)
    items = [data[i] for i in range(len(data))]
    assert [item.picture and item.picture.size for item in items] == [(40, 30), None, (41, 30)]
    assert [item.rows for item in items] == [(record["conversations"],) for record in (GOOD, TEXT, LATE)]
    assert data.skipped == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"image": "gone.png"}, "no picture .*gone.png"),
        ({"image": ["a.png", "b.png"]}, "one path was expected"),
        ({"image": None}, "1 <image> in the conversation, but 0 picture"),
        ({"conversations": turns("<image><image> What?", "x")}, "2 <image> in the conversation, but 1 picture"),
        ({"conversations": turns("What?", "x")}, "0 <image> .*, but 1 picture"),
        ({"conversations": turns("<image>", "x")[::-1]}, "alternate"),
        ({"conversations": turns("<image> What?", None)}, "both text"),
        ({"conversations": None}, "'conversations' is not a list"),
    ],
)
@pytest.mark.parametrize("name, place", [("data.json", "record 1"), ("data.jsonl", "line 2")])
def test_a_bad_record_is_named_or_skipped_and_counted(name, place, change, says, tmp_path):
    file = written(tmp_path, [TEXT, GOOD | change, GOOD], name)
    with pytest.raises(RecordError, match=f"{name}, {place} .id 'a1'.: .*{says}"):
        Conversations(file, tmp_path)
    data = Conversations(file, tmp_path, on_error="skip")
    assert len(data) == 2 and len(data.skipped) == 1 and place in data.skipped[0][0]


def test_a_broken_line_is_named_or_skipped(tmp_path):
    file = written(tmp_path, [TEXT, GOOD], "data.jsonl")
    file.write_text(file.read_text().replace('"A cat."}]}', '"A cat."'))
    with pytest.raises(RecordError, match="data.jsonl, line 2: not readable as JSON"):
        Conversations(file, tmp_path)
    assert len(Conversations(file, tmp_path, "skip").skipped) == 1
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        Conversations(file, tmp_path, "ignore")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("a.json", json.dumps([TEXT])[:-2], "a.json: not readable as JSON"),
        ("a.json", json.dumps(TEXT), "a list of records was expected"),
        ("a.jsonl", "{}\n{}", "none of its 2 records"),
        ("a.jsonl", '"only words"', "none of its 1 records"),
    ],
)
def test_a_file_without_a_record_is_refused_even_if_bad_records_are_skipped(name, text, says, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match=says):
        Conversations(tmp_path / name, tmp_path, "skip")


def test_a_picture_that_cannot_be_read_is_named_or_counted(tmp_path, processor):
    file = written(tmp_path, [GOOD, LATE])
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(RecordError, match="id 'a1'.*a.png cannot be read"):
        Conversations(file, tmp_path)[0]
    data = Conversations(file, tmp_path, "skip")
    assert data[0].rows == data[1].rows == (LATE["conversations"],)  # the next record takes its place
    batch = Collator(processor)([data[0], data[1]])
    assert batch["skipped"] == 1 and len(batch["input_ids"]) == 2 and all("b2" in where for where in batch["where"])
    (tmp_path / "b.png").write_bytes(b"no picture either")  # not a cut one: a library may tell Pillow to accept those
    with pytest.raises(RecordError, match="data.json: none of the pictures"):
        data[0]


def test_scenes_follow_from_their_number():
    data = Scenes(3, questions=4)
    first, again = data[2], Scenes(5, questions=4)[2]
    assert first.rows == again.rows and first.picture.tobytes() == again.picture.tobytes()
    assert all(len(data[i].rows) == 4 for i in range(3))
    assert len({row[0]["value"] for row in first.rows}) == 4
    assert Scenes(1, first=5_000_002, questions=4)[0].where == first.where == "scene 5000002"


def answers_of(batch, processor):
    """The supervised tokens of each row as text."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        found.append(processor.tokenizer.decode(labels[labels != IGNORED]))
    return found


def test_labels_are_the_answers_and_their_ends(tmp_path, processor):
    data = Conversations(written(tmp_path, [GOOD, TEXT, LATE]), tmp_path)
    items = [data[i] for i in range(3)]
    batch = Collator(processor)(items)
    assert answers_of(batch, processor) == [" A cat.</s>", " yes</s> no</s>", " 2</s> Yes, two.</s>"]
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [144, 0, 144]
    assert batch["pixel_values"].shape == (2, 3, 192, 192)
    for row, item in enumerate(items):
        alone = Collator(processor)([item])["input_ids"][0]
        assert torch.equal(alone, batch["input_ids"][row, : len(alone)])
        assert int(batch["attention_mask"][row].sum()) == len(alone)


@pytest.mark.parametrize("family", ["llava", "next", "onevision"])
def test_prompts_are_those_of_the_processor(family, tmp_path):
    """Up to the answer, ids and pixels are what the processor makes of the chat template's prompt, for every family."""
    pytest.importorskip("lmms_eval")
    from lmms_fixtures import checkpoint

    processor = AutoProcessor.from_pretrained(checkpoint(family, tmp_path))
    data = Conversations(written(tmp_path, [GOOD, LATE]), tmp_path)
    batch = Collator(processor)([data[0], data[1]])
    answers = [text.replace(" ", "") for text in answers_of(batch, processor)]
    assert answers == ["Acat.</s>", "2</s>Yes,two.</s>"]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    want = processor(images=data[0].picture, text=prompt, return_tensors="pt")
    length = want["input_ids"].shape[1]
    assert torch.equal(batch["input_ids"][0, :length], want["input_ids"][0])
    assert (batch["labels"][0, :length] == IGNORED).all() and batch["labels"][0, length] != IGNORED
    assert torch.equal(batch["pixel_values"][0][: len(want["pixel_values"][0])], want["pixel_values"][0])


def test_a_template_without_an_end_of_sequence_gets_one(processor):
    template = processor.chat_template.replace("'</s>' if message['role'] == 'assistant' else ' '", "' '")
    processor.chat_template = template
    assert "</s>" not in template
    batch = Collator(processor)([Item("it", None, (TEXT["conversations"],))])
    assert answers_of(batch, processor) == [" yes</s> no</s>"]


def test_pictures_of_a_batch_need_equally_many_conversations(processor):
    one, two = (Item("it", None, (turns("Say yes.", "yes"),) * n) for n in (1, 2))
    with pytest.raises(ValueError, match=r"have \[1, 2\] conversations; give all pictures the same number"):
        Collator(processor)([one, two])
