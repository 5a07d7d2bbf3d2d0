"""The training loop and its data: labels, errors that name the record, resuming, several processes."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

import vlmslim

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
sys.path.insert(0, str(SCRIPTS))
pytest.importorskip("pydantic")

from vlmslim.training.conversations import IGNORED, Collator, Conversations, Item, RecordError, Scenes  # noqa: E402
from vlmslim.training.finetune import Settings, Tuned, answer_loss, finetune, load, prepared, schedule, settings_from  # noqa: E402

FEW = dict(counts=[4, 9], probabilities=[0.5, 0.5])


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def human(text):
    return {"from": "human", "value": text}


def gpt(text):
    return {"from": "gpt", "value": text}


GOOD = {"id": "a1", "image": "a.png", "conversations": [human("<image>\nWhat is it?"), gpt("A cat.")]}
TEXT = {"id": "t1", "conversations": [human("Say yes."), gpt("yes"), human("And no."), gpt("no")]}
LATE = {
    "id": "b2",
    "image": "b.png",
    "conversations": [human("How many?\n<image>"), gpt("2"), human("Sure?"), gpt("Yes, two.")],
}


def folder_of(tmp_path, records, name="data.json"):
    for i, picture in enumerate(("a.png", "b.png")):
        Image.new("RGB", (40 + i, 30), (200 * i, 80, 10)).save(tmp_path / picture)
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    (tmp_path / name).write_text(text)
    return tmp_path / name


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_records_are_read(name, tmp_path):
    data = Conversations(folder_of(tmp_path, [GOOD, TEXT, LATE], name), tmp_path)
    assert [item.picture.size if item.picture else None for item in map(data.__getitem__, range(3))] == [
        (40, 30),
        None,
        (41, 30),
    ]
    assert data[1].rows == (TEXT["conversations"],)
    assert data.skipped == []


BAD = {
    "a missing picture": ({**GOOD, "image": "gone.png"}, "no picture .*gone.png"),
    "too many image tokens": (
        {**GOOD, "conversations": [human("<image><image> What?"), gpt("A cat.")]},
        "2 <image> in the conversation, but 1 picture",
    ),
    "no image token": ({**GOOD, "conversations": [human("What?"), gpt("x")]}, "0 <image> .*, but 1 picture"),
    "an image token without a picture": (
        {"id": "a1", "conversations": [human("<image> What?"), gpt("x")]},
        "1 <image> in the conversation, but 0 picture",
    ),
    "turns out of order": ({**GOOD, "conversations": [gpt("x"), human("<image>")]}, "alternate"),
    "no turns": ({"id": "a1", "image": "a.png"}, "'conversations' is not a list"),
    "turns without text": ({**GOOD, "conversations": [human("<image> What?"), gpt(None)]}, "both text"),
    "two pictures": ({**GOOD, "image": ["a.png", "b.png"]}, "one path was expected"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_bad_record_is_named_or_skipped_and_counted(kind, name, tmp_path):
    bad, says = BAD[kind]
    file = folder_of(tmp_path, [TEXT, bad, GOOD], name)
    place = "line 2" if name.endswith("l") else "record 1"
    with pytest.raises(RecordError, match=f"{name}, {place} .id 'a1'.: .*{says}"):
        Conversations(file, tmp_path)
    data = Conversations(file, tmp_path, on_error="skip")
    assert len(data) == 2 and len(data.skipped) == 1
    assert place in data.skipped[0][0]


def test_a_broken_line_is_named_or_skipped(tmp_path):
    file = folder_of(tmp_path, [TEXT, GOOD], "data.jsonl")
    file.write_text(file.read_text().replace('"A cat."}]}', '"A cat."'))
    with pytest.raises(RecordError, match="data.jsonl, line 2: not readable as JSON"):
        Conversations(file, tmp_path)
    assert len(Conversations(file, tmp_path, "skip").skipped) == 1
    (tmp_path / "broken.json").write_text(json.dumps([TEXT])[:-2])
    for on_error in ("raise", "skip"):
        with pytest.raises(RecordError, match="broken.json: not readable as JSON"):
            Conversations(tmp_path / "broken.json", tmp_path, on_error)
    with pytest.raises(ValueError, match="'raise' or 'skip'"):
        Conversations(file, tmp_path, "ignore")
    file.write_text("{}\n{}")
    with pytest.raises(RecordError, match="none of its 2 records"):
        Conversations(file, tmp_path, "skip")
    file.write_text('"only words"')
    with pytest.raises(RecordError, match="line 1: 'conversations' is not a list"):
        Conversations(file, tmp_path)


def test_a_picture_that_cannot_be_read_is_named_or_counted(tmp_path):
    file = folder_of(tmp_path, [GOOD, LATE])
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(RecordError, match="id 'a1'.*a.png cannot be read"):
        Conversations(file, tmp_path)[0]
    data = Conversations(file, tmp_path, "skip")
    assert data[0].rows == data[1].rows == (LATE["conversations"],)  # the next one is in its place
    batch = Collator(load(Settings())[1])([data[0], data[1]])
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
    """The answers that are supervised, as text, row by row."""
    found = []
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        assert torch.equal(ids[labels != IGNORED], labels[labels != IGNORED])
        found.append(processor.tokenizer.decode(labels[labels != IGNORED]))
    return found


def test_labels_are_the_answers_and_their_ends(tmp_path):
    processor = load(Settings())[1]
    data = Conversations(folder_of(tmp_path, [GOOD, TEXT, LATE]), tmp_path)
    batch = Collator(processor)([data[i] for i in range(3)])
    assert answers_of(batch, processor) == [" A cat.</s>", " yes</s> no</s>", " 2</s> Yes, two.</s>"]
    assert (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(1).tolist() == [144, 0, 144]
    assert batch["pixel_values"].shape == (2, 3, 192, 192)
    for row, item in enumerate(map(data.__getitem__, range(3))):
        alone = Collator(processor)([item])
        length = alone["input_ids"].shape[1]
        assert torch.equal(alone["input_ids"][0], batch["input_ids"][row, :length])
        assert int(batch["attention_mask"][row].sum()) == length


@pytest.mark.parametrize("family", ["llava", "next", "onevision"])
def test_prompts_are_those_of_the_processor(family, tmp_path):
    """Up to the answer, ids and pixels are what the processor makes of the rendered prompt, for every family."""
    pytest.importorskip("lmms_eval")
    from lmms_fixtures import checkpoint
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint(family, tmp_path))
    data = Conversations(folder_of(tmp_path, [GOOD, LATE]), tmp_path)
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


def test_a_template_without_an_end_of_sequence_gets_one(tmp_path):
    processor = load(Settings())[1]
    processor.chat_template = processor.chat_template.replace(
        "'</s>' if message['role'] == 'assistant' else ' '", "' '"
    )
    assert "</s>" not in processor.chat_template
    data = Conversations(folder_of(tmp_path, [TEXT]), tmp_path)
    assert answers_of(Collator(processor)([data[0]]), processor) == [" yes</s> no</s>"]


# --- the loop ---------------------------------------------------------------------------------------------------------


SMALL = dict(pictures=6, questions=2, steps=4, batch=2, workers=0, device="cpu", log_every=1, save_every=2, method=FEW)


def small(**options) -> Settings:
    return Settings(**SMALL | options)


def train(settings, out, **options):
    model, processor, data = load(settings)
    slim = vlmslim.patch(model, "tokenflex", weights=f"random:{settings.seed}", keep=9, **settings.method)
    finetune(slim, processor, options.pop("data", data), settings, out, **options)
    return slim


def log_of(out):
    with (out / "log.csv").open(newline="") as file:
        return {int(line["step"]): float(line["loss"]) for line in csv.DictReader(file)}


@pytest.mark.slow
def test_an_interrupted_run_resumes_to_the_same_loss(tmp_path):
    settings = small(accumulate=2)
    train(settings, tmp_path / "whole")
    train(settings, tmp_path / "pieces", stop=2)
    log = tmp_path / "pieces" / "log.csv"  # a step behind the last checkpoint is done again
    log.write_text(log.read_text() + log.read_text().splitlines()[-1].replace("2", "3", 1) + "\n")
    assert list(log_of(tmp_path / "pieces")) == [1, 2, 3]
    slim = train(settings, tmp_path / "pieces")
    whole, pieces = log_of(tmp_path / "whole"), log_of(tmp_path / "pieces")
    assert list(whole) == list(pieces) == [1, 2, 3, 4]
    assert whole == pieces
    with log.open(newline="") as file:
        seconds = [float(line["seconds"]) for line in csv.DictReader(file)]
    assert seconds == sorted(seconds)  # go on as well
    model = load(settings)[0]
    with vlmslim.patch(model, tmp_path / "whole" / "final") as again:
        for key, value in again.trained.state_dict().items():
            assert torch.equal(value, slim.trained.state_dict()[key])
    with pytest.raises(ValueError, match="other values of lr, seed"):
        train(small(accumulate=2, lr=0.5, seed=1), tmp_path / "whole")


@pytest.mark.slow
def test_training_learns_and_leaves_the_backbone_alone(tmp_path):
    settings = small(pictures=2, steps=25, lr=5e-3, precision="no", method=dict(counts=[9], probabilities=[1.0]))
    before = {k: v.clone() for k, v in load(settings)[0].state_dict().items()}
    slim = train(settings, tmp_path)
    losses = list(log_of(tmp_path).values())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    assert all(torch.equal(v, before[k]) for k, v in slim.model.state_dict().items())


def test_accumulated_batches_are_those_of_single_ones(tmp_path):
    seen = {1: [], 2: []}
    one = dict(questions=1, batch=1, method=dict(counts=[1], probabilities=[1.0]))
    for accumulate, steps in ((1, 4), (2, 2)):

        def loss(answers, batch, step, into=seen[accumulate]):
            into.append((step, batch["where"][0]))
            return answer_loss(answers, batch, step)

        train(small(accumulate=accumulate, steps=steps, **one), tmp_path / str(accumulate), loss=loss)
        assert list(log_of(tmp_path / str(accumulate))) == list(range(1, steps + 1))
    assert [where for _, where in seen[1]] == [where for _, where in seen[2]]
    assert [step for step, _ in seen[2]] == [0, 0, 1, 1]


def test_batches_without_pictures_and_bad_losses(tmp_path):
    data = [Item("record seven", None, ([human("Say yes."), gpt("yes")],))]
    train(small(steps=1, batch=1), tmp_path / "text", data=data)
    assert list(log_of(tmp_path / "text")) == [1]
    infinite = lambda answers, batch, step: (answers.loss * float("inf"), {})  # noqa: E731
    with pytest.raises(RuntimeError, match="step 0.*record seven"):
        train(small(steps=1, batch=1), tmp_path / "nan", data=data, loss=infinite)
    assert not (tmp_path / "nan" / "final").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tuned_decoder_is_trained_in_fp32_and_saved_with_the_patch(dtype, tmp_path):
    settings = small(train_decoder=True, dtype=dtype, steps=1, batch=1, lr=0.01)
    model, processor, data = load(settings)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with vlmslim.patch(model, "divprune", keep=9) as slim:
        finetune(slim, processor, data, settings, tmp_path)
    trained = {k: v for k, v in model.state_dict().items() if "vision_tower" not in k}
    assert all(v.dtype == torch.float32 and not torch.equal(v, before[k].float()) for k, v in trained.items())
    tower = {k: v for k, v in model.state_dict().items() if "vision_tower" in k}
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in tower.items())
    again = vlmslim.from_pretrained(tmp_path / "final").model
    assert all(torch.equal(v, trained.get(k, before[k]).to(v.dtype)) for k, v in again.state_dict().items())


@pytest.mark.parametrize("shown", [True, False], ids=["picture", "text alone"])
def test_every_trained_parameter_gets_a_gradient(shown):
    """Zero where a batch does not need it: several processes wait for each other's gradients of everything."""
    model, processor, _ = load(small())
    turns = [human("<image>What is it?" if shown else "Say yes."), gpt("yes")]
    inputs = Collator(processor)([Item("it", Image.new("RGB", (50, 50)) if shown else None, (turns,))])
    with vlmslim.patch(model, "tokenflex", weights="random", keep=9, **FEW) as slim:
        tuned = prepared(slim, small(train_decoder=True))
        tuned(**{k: v for k, v in inputs.items() if k not in ("skipped", "where")}).loss.backward()
    without = [name for name, p in tuned.named_parameters() if p.requires_grad and p.grad is None]
    assert not without and any(p.requires_grad for p in model.parameters())


def test_a_method_with_nothing_to_train(tmp_path):
    model, processor, data = load(small())
    with vlmslim.patch(model, "divprune", keep=9) as slim, pytest.raises(ValueError, match="nothing to train"):
        finetune(slim, processor, data, small(), tmp_path)


def test_the_schedule_warms_up_and_falls():
    rates = [schedule(step, 100, 0.1) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(a >= b for a, b in zip(rates[10:], rates[11:], strict=False))
    assert 0 < rates[-1] < 0.01 and schedule(0, 1, 0.03) == 1


def test_settings_are_checked(tmp_path):
    (tmp_path / "a.yaml").write_text("steps: 3\nmethod: {counts: [4]}\n")
    assert settings_from(tmp_path / "a.yaml", ["lr=0.1"]).lr == 0.1
    assert settings_from(tmp_path / "a.yaml", ["method.pool=mean", "precision=no", "lr=5e-4"]) == Settings(
        steps=3, method={"counts": [4], "pool": "mean"}, precision="no", lr=5e-4
    )
    assert settings_from(tmp_path / "a.yaml", ["steps=0", "epochs=2"]).epochs == 2
    for wrong, says in (
        ("stepz=3", "no setting 'stepz'"),
        ("steps", "'steps' sets nothing"),
        ("steps=many", "steps\n.*integer"),
        ("batch=0", "batch\n.*greater than 0"),
        ("epochs=2", "steps=3 leaves epochs without effect"),
        ("precision=fp8", "precision\n.*'bf16', 'fp16' or 'no'"),
    ):
        with pytest.raises(ValueError, match=says):
            settings_from(tmp_path / "a.yaml", [wrong])
    (tmp_path / "a.yaml").write_text("stepz: 3\n")
    with pytest.raises(ValueError, match="no setting stepz"):
        settings_from(tmp_path / "a.yaml")


def test_the_bundled_projector_reads_pictures_better_than_its_training_free_control():
    """On scenes that nothing was trained on, at every count it was trained for and at two between them."""
    slim = vlmslim.from_pretrained("bundled/tiny-tokenflex", dtype=torch.float32)
    model, processor = slim.model, slim.processor
    slim.remove()
    data = Scenes(6, questions=4, first=9_000_000)
    batch = Collator(processor)([data[i] for i in range(len(data))])
    inputs = {k: v for k, v in batch.items() if k not in ("skipped", "where")}
    for keep in (16, 25, 36, 49, 64):
        loss = {}
        for weights in ("bundled/tiny-tokenflex", "pool"):
            with vlmslim.patch(model, "tokenflex", weights=weights, keep=keep) as slim, torch.no_grad():
                loss[weights] = Tuned(slim)(**inputs).loss.item()
        assert loss["bundled/tiny-tokenflex"] < 0.9 * loss["pool"], keep
    assert sum(p.stat().st_size for p in (ROOT / "vlmslim" / "bundled" / "tiny-tokenflex").iterdir()) < 1e6


def test_the_warm_start_brings_the_projector_to_the_models_own():
    from train_tokenflex import warm_start

    settings, left = small(pictures=4, questions=1, method=dict(counts=[4, 16], probabilities=[0.5, 0.5])), []
    model, processor, data = load(settings)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for steps in (2, 60):
        with vlmslim.patch(model, "tokenflex", weights="random", keep=16, **settings.method) as slim:
            left.append(warm_start(slim, processor, data, settings, pictures=3, steps=steps))
    assert left[1] < 0.5 * left[0]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "how", "processes", "options"),
    [
        ("train_tokenflex.py", "--cpu", 1, ["script.warm_start=2"]),
        ("train_tokenflex.py", "--multi_gpu", 2, ["script.warm_start=2", "--train-decoder"]),
        ("train_atp.py", "--cpu", 1, []),
        ("train_atp.py", "--multi_gpu", 2, []),
    ],
)
def test_accelerate_launch_with_two_processes_on_the_cpu(script, how, processes, options, tmp_path):
    """With `--cpu` accelerate starts one process, whatever is asked; with `--multi_gpu` and this variable it is two."""
    command = [sys.executable, "-m", "accelerate.commands.launch", how, "--num_processes", "2", "--num_machines", "1"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += [str(SCRIPTS / script), "--out", str(tmp_path), "device=cpu", "workers=0", "log_every=1", *options]
    command += ["pictures=8", "questions=2", "steps=2", "batch=1"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert list(log_of(tmp_path)) == [1, 2]
    assert torch.load(tmp_path / "last.pt", weights_only=True)["processes"] == processes
    slim = vlmslim.from_pretrained(tmp_path / "final")
    assert [f"train_{name}.py" for name in slim.trained] == [script]
