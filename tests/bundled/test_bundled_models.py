"""The bundled checkpoints and trained parts: genuine formats, one tower, small, and good enough to compare methods."""

import json
from pathlib import Path

import numpy as np
import pages
import pyarrow.parquet as pq
import pytest
import scenes
import torch
import train_tiny_llava
import train_tiny_llava_next
import transformers
from kept_by_question import kept
from make_benchmark import BENCHMARKS
from training_data import Scenes
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmslim
from vlmslim.training.conversations import Collator
from vlmslim.training.finetune import Tuned

BUNDLED = Path(vlmslim.__file__).parent / "bundled"
LLAVA, NEXT, CLIP = BUNDLED / "tiny-llava", BUNDLED / "tiny-llava-next", BUNDLED / "tiny-clip"


def load(path: Path):
    """A checkpoint and its processor."""
    model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def llava():
    return load(LLAVA)


@pytest.fixture(scope="module")
def anyres():
    return load(NEXT)


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip")
    name = f"local-dir:{CLIP}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@pytest.fixture(scope="module")
def scene():
    """A held-out scene and two questions."""
    scene = scenes.make_scene(5, "test")
    return scene, [scenes.ask(scene, task, np.random.default_rng(0)) for task in ("choice", "presence")]


@pytest.fixture(scope="module")
def asked():
    """Held-out pages of every shape with a question each."""
    out: dict = {}
    for seed in range(200):
        page = pages.make_page(seed, "test")
        question = pages.ask(page, "keyvalue", np.random.default_rng(0))
        if question:
            out.setdefault(page.crops, []).append((page, question))
    assert len(out) == 4
    return [pair for pairs in out.values() for pair in pairs[:4]]


def prompt(question, answer: str = "") -> str:
    return f"USER: <image>\n{question.text} ASSISTANT:" + answer


def test_sizes_and_dtype():
    from safetensors import safe_open

    files = [LLAVA / "model.safetensors", NEXT / "model.safetensors", CLIP / "open_clip_model.safetensors"]
    assert sum(f.stat().st_size for f in files) < 45 * 2**20
    assert sum(f.stat().st_size for f in (BUNDLED / "tiny-tokenflex").iterdir()) < 1e6
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(k).get_dtype() for k in weights.keys()} == {"F16"}  # noqa: SIM118


@pytest.mark.parametrize(
    "fixture, path, model_class, processor_class",
    [
        ("llava", LLAVA, "LlavaForConditionalGeneration", "LlavaProcessor"),
        ("anyres", NEXT, "LlavaNextForConditionalGeneration", "LlavaNextProcessor"),
    ],
)
def test_checkpoints_have_genuine_formats(fixture, path, model_class, processor_class, request):
    model, processor = request.getfixturevalue(fixture)
    assert type(model) is getattr(transformers, model_class)
    assert type(processor).__name__ == processor_class and processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert model.config.vision_feature_layer == -2 and model.config.vision_feature_select_strategy == "default"
    assert model.config.text_config.model_type == "llama" and model.config.text_config.num_hidden_layers >= 8
    assert "auto_map" not in json.loads((path / "config.json").read_text())


def test_sizes_of_pictures(llava, anyres):
    assert llava[0].config.image_seq_length == 144
    assert anyres[0].config.vision_config.image_size == 144
    assert anyres[1].image_processor.image_grid_pinpoints == anyres[0].config.image_grid_pinpoints


def test_processor_and_chat_template(llava, scene):
    _, processor = llava
    scene, (question, _) = scene
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert text == prompt(question)
    turns = [{"role": "user", "content": "<image>\n" + question.text}, {"role": "assistant", "content": "yes"}]
    assert processor.tokenizer.apply_chat_template(turns, tokenize=False) == f"{text} yes</s>"
    ids = processor(images=scene.image, text=text, return_tensors="pt")
    assert ids["pixel_values"].shape == (1, 3, 192, 192)
    assert int((ids["input_ids"] == processor.image_token_id).sum()) == 144
    for text in ("Is the cat left, right, above or below the ring?", "K7Q 42"):
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_generate(llava, scene):
    model, processor = llava
    scene, questions = scene
    inputs = processor(images=[scene.image] * 2, text=[prompt(q) for q in questions], padding=True, return_tensors="pt")
    out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
    assert all(processor.batch_decode(out, skip_special_tokens=True))


def test_towers_are_one(llava, clip, scene):
    model, processor = llava
    clip, preprocess, tokenizer = clip
    image = scene[0].image
    pixels = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"]
    assert torch.allclose(preprocess(image)[None], pixels, atol=1e-5)
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
        x = clip.visual._embeds(pixels)
        for i, block in enumerate(clip.visual.transformer.resblocks):
            x = block(x)
            assert (x - hidden[i + 1]).abs().max() < 1e-4 * max(1.0, float(x.abs().max()))
        assert clip.encode_image(pixels).shape == clip.encode_text(tokenizer(["a cat"])).shape


def test_packed_questions_equal_single_prompts(llava, scene):
    """Training packs questions; each of them must see exactly what a single prompt sees."""
    model = AutoModelForImageTextToText.from_pretrained(LLAVA, attn_implementation="eager").eval()
    processor = llava[1]
    scene, questions = scene
    blank = {k: torch.zeros(1) for k in ("tasks", "words", "centre", "evidence", "mass")}

    def logits(some):
        packed = train_tiny_llava.pack(processor.tokenizer, some, chat=False)
        batch = train_tiny_llava.collate([{"image": train_tiny_llava.pixels(scene.image), **blank, **packed}], 0)
        with torch.no_grad():
            return train_tiny_llava.answer_logits(model, batch)[0]

    singles = torch.cat([logits([q]) for q in questions])
    assert torch.allclose(logits(questions), singles, atol=1e-3)
    text = prompt(questions[0], f" {questions[0].answer}</s>")
    ids = processor(images=scene.image, text=text, return_tensors="pt")["input_ids"][0]
    assert torch.equal(ids, train_tiny_llava.pack(processor.tokenizer, questions[:1], chat=False)["ids"])


def test_anyres_placeholders_are_as_many_as_features(anyres, asked):
    model, processor = anyres
    for page, question in asked:
        inputs = processor(images=page.image, text=prompt(question), return_tensors="pt")
        assert inputs["pixel_values"].shape[1:] == (1 + page.crops[0] * page.crops[1], 3, 144, 144)
        with torch.no_grad():
            out = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        assert len(out[0]) == int((inputs["input_ids"] == processor.image_token_id).sum())


def test_training_sees_the_visual_tokens_of_the_processor(anyres, asked):
    train, (_, processor) = train_tiny_llava_next, anyres
    for page, question in asked:
        known = train.visual_labels(page)
        text = prompt(question, f" {question.answer}</s>")
        ids = processor(images=page.image, text=text, return_tensors="pt")["input_ids"][0]
        assert torch.equal(ids, train.pack(processor.tokenizer, [question], False, len(known))["ids"])
        seen = train.evidence(known, question, len(question.answer) + 2)
        first = list(train.LABELS).index("first")
        read = [known[row.argmax(), first] for row in seen[1:-1].numpy()]
        assert "".join(train.CHARACTERS[c - 1] for c in read) == question.answer


def answers(model, processor, asked):
    texts = []
    for page, question in asked:
        inputs = processor(images=page.image, text=prompt(question), return_tensors="pt")
        out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts += [t.strip() for t in processor.batch_decode(out, skip_special_tokens=True)]
    return texts


def test_anyres_reads_and_the_patched_model_too(anyres, asked):
    model, processor = anyres
    right = [q.answer for _, q in asked]
    plain = answers(model, processor, asked)
    assert sum(a == b for a, b in zip(plain, right, strict=True)) >= len(right) // 4  # a blind model has none
    with vlmslim.patch(model, "none"):
        assert answers(model, processor, asked) == plain
    with vlmslim.patch(model, "divprune", keep=0.5):
        assert all(answers(model, processor, asked))


def test_the_trained_projector_reads_pictures_better_than_pooling(llava):
    """On scenes that nothing was trained on, at every count it was trained for and at two between them."""
    model, processor = llava
    data = Scenes(6, questions=4, first=9_000_000)
    batch = Collator(processor)([data[i] for i in range(len(data))])
    inputs = {k: v for k, v in batch.items() if k not in ("skipped", "where")}
    for keep in (16, 25, 36, 49, 64):
        loss = {}
        for weights in ("bundled/tiny-tokenflex", "pool"):
            with vlmslim.patch(model, "tokenflex", weights=weights, keep=keep) as slim, torch.no_grad():
                loss[weights] = Tuned(slim)(**inputs).loss.item()
        assert loss["bundled/tiny-tokenflex"] < 0.9 * loss["pool"], keep


@pytest.mark.parametrize("target", [36, 16])
def test_trained_thresholds_meet_their_target(target):
    """On held-out questions, to within 10 %, with counts that differ between questions and layers."""
    slim = vlmslim.from_pretrained(f"bundled/tiny-atp-{target}")
    rows = pq.read_table(BENCHMARKS["scenes"].file("count")).to_pylist()[:24]
    counts = kept(slim, rows, batch=12)[:, [2, 4, 7]]
    assert abs(counts.mean() - target) <= 0.1 * target
    assert counts.mean(1).std() > 0.2 and (counts[:, 0] > counts[:, 2]).all()
