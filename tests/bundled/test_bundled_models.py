"""The bundled checkpoints: genuine formats, one tower, small."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "vlmslim" / "bundled"
LLAVA, NEXT, CLIP = BUNDLED / "tiny-llava", BUNDLED / "tiny-llava-next", BUNDLED / "tiny-clip"


def load(name: str, path: Path):
    """A checkpoint as the class `name` of transformers, and its processor."""
    import transformers

    model = getattr(transformers, name).from_pretrained(path, dtype=torch.float32).eval()
    return model, transformers.AutoProcessor.from_pretrained(path)


@pytest.fixture(scope="module")
def llava():
    return load("LlavaForConditionalGeneration", LLAVA)


@pytest.fixture(scope="module")
def clip():
    open_clip = pytest.importorskip("open_clip")
    name = f"local-dir:{CLIP}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    return model.eval(), preprocess, open_clip.get_tokenizer(name)


@pytest.fixture(scope="module")
def scene():
    sys.path.insert(0, str(ROOT / "scripts"))
    import scenes

    scene = scenes.make_scene(5, "test")
    return scene, [scenes.ask(scene, t, np.random.default_rng(0)) for t in ("choice", "presence")]


def test_budget_and_dtype():
    from safetensors import safe_open

    files = [LLAVA / "model.safetensors", NEXT / "model.safetensors", CLIP / "open_clip_model.safetensors"]
    assert sum(f.stat().st_size for f in files) < 45 * 2**20
    for file in files:
        with safe_open(file, "pt") as weights:
            assert {weights.get_slice(k).get_dtype() for k in weights.keys()} == {"F16"}  # noqa: SIM118


def test_llava_layout(llava):
    model, processor = llava
    text = model.config.text_config
    assert model.config.model_type == "llava" and model.config.image_seq_length == 144
    assert text.model_type == "llama" and text.num_hidden_layers >= 8
    assert model.config.vision_config.model_type == "clip_vision_model"
    assert type(processor).__name__ == "LlavaProcessor" and processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == processor.tokenizer.pad_token_id
    config = json.loads((LLAVA / "config.json").read_text())
    assert "auto_map" not in config


def test_processor_and_chat_template(llava, scene):
    _, processor = llava
    scene, (question, _) = scene
    content = [{"type": "image"}, {"type": "text", "text": question.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    assert prompt == f"USER: <image>\n{question.text} ASSISTANT:"
    turns = [{"role": "user", "content": "<image>\n" + question.text}, {"role": "assistant", "content": "yes"}]
    whole = processor.tokenizer.apply_chat_template(turns, tokenize=False)
    assert whole == f"{prompt} yes</s>"
    ids = processor(images=scene.image, text=prompt, return_tensors="pt")
    assert ids["pixel_values"].shape == (1, 3, 192, 192)
    assert int((ids["input_ids"] == processor.image_token_id).sum()) == 144
    for text in ("Is the cat left, right, above or below the ring?", "K7Q 42"):
        assert processor.tokenizer.decode(processor.tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_generate(llava, scene):
    model, processor = llava
    scene, questions = scene
    prompts = [f"USER: <image>\n{q.text} ASSISTANT:" for q in questions]
    inputs = processor(images=[scene.image] * 2, text=prompts, padding=True, return_tensors="pt")
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
    """Training packs questions; every one of them must see exactly what a single prompt sees."""
    sys.path.insert(0, str(ROOT / "scripts"))
    train = pytest.importorskip("train_tiny_llava")
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(LLAVA, attn_implementation="eager").eval()
    processor = llava[1]
    scene, questions = scene
    blank = {k: torch.zeros(1) for k in ("tasks", "words", "centre", "evidence", "mass")}

    def logits(some):
        packed = train.pack(processor.tokenizer, some, chat=False)
        batch = train.collate([{"image": train.pixels(scene.image), **blank, **packed}], 0)
        with torch.no_grad():
            return train.answer_logits(model, batch)[0]

    singles = torch.cat([logits([q]) for q in questions])
    assert torch.allclose(logits(questions), singles, atol=1e-3)
    prompt = f"USER: <image>\n{questions[0].text} ASSISTANT: {questions[0].answer}</s>"
    ids = processor(images=scene.image, text=prompt, return_tensors="pt")["input_ids"][0]
    assert torch.equal(ids, train.pack(processor.tokenizer, questions[:1], chat=False)["ids"])


@pytest.fixture(scope="module")
def anyres():
    return load("LlavaNextForConditionalGeneration", NEXT)


@pytest.fixture(scope="module")
def asked():
    """Held-out pages of every shape with a question each."""
    sys.path.insert(0, str(ROOT / "scripts"))
    import pages

    out = {}
    for seed in range(200):
        page = pages.make_page(seed, "test")
        question = pages.ask(page, "keyvalue", np.random.default_rng(0))
        if question:
            out.setdefault(page.crops, []).append((page, question))
    assert len(out) == 4
    return [pair for pairs in out.values() for pair in pairs[:4]]


def test_anyres_layout(anyres):
    model, processor = anyres
    config = model.config
    assert config.model_type == "llava_next" and config.vision_config.image_size == 144
    assert config.vision_feature_layer == -2 and config.vision_feature_select_strategy == "default"
    assert processor.image_processor.image_grid_pinpoints == config.image_grid_pinpoints
    assert type(processor).__name__ == "LlavaNextProcessor" and processor.tokenizer.padding_side == "left"
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    assert "auto_map" not in json.loads((NEXT / "config.json").read_text())


def test_anyres_placeholders_are_as_many_as_features(anyres, asked):
    model, processor = anyres
    for page, question in asked:
        inputs = processor(images=page.image, text=f"USER: <image>\n{question.text} ASSISTANT:", return_tensors="pt")
        assert inputs["pixel_values"].shape[1:] == (1 + page.crops[0] * page.crops[1], 3, 144, 144)
        with torch.no_grad():
            out = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        assert len(out[0]) == int((inputs["input_ids"] == processor.image_token_id).sum())


def test_training_sees_the_visual_tokens_of_the_processor(anyres, asked):
    sys.path.insert(0, str(ROOT / "scripts"))
    train = pytest.importorskip("train_tiny_llava_next")
    _, processor = anyres
    for page, question in asked:
        known = train.visual_labels(page)
        prompt = f"USER: <image>\n{question.text} ASSISTANT: {question.answer}</s>"
        ids = processor(images=page.image, text=prompt, return_tensors="pt")["input_ids"][0]
        assert torch.equal(ids, train.pack(processor.tokenizer, [question], False, len(known))["ids"])
        seen = train.evidence(known, question, len(question.answer) + 2)
        first = list(train.LABELS).index("first")
        read = [known[row.argmax(), first] for row in seen[1:-1].numpy()]
        assert "".join(train.CHARACTERS[c - 1] for c in read) == question.answer


def answers(model, processor, asked):
    texts = []
    for page, question in asked:
        inputs = processor(images=page.image, text=f"USER: <image>\n{question.text} ASSISTANT:", return_tensors="pt")
        out = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts += [t.strip() for t in processor.batch_decode(out, skip_special_tokens=True)]
    return texts


def test_anyres_reads_and_the_patched_model_too(anyres, asked):
    import vlmslim

    model, processor = anyres
    right = [q.answer for _, q in asked]
    plain = answers(model, processor, asked)
    assert sum(a == b for a, b in zip(plain, right, strict=True)) >= len(right) // 4  # a blind model has none
    with vlmslim.patch(model, "none"):
        assert answers(model, processor, asked) == plain
    with vlmslim.patch(model, "divprune", keep=0.5):
        assert all(answers(model, processor, asked))
