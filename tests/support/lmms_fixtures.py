"""Tiny random checkpoints with real processors, pictures, questions and a video, for the lmms-eval tests."""

import sys
import types
from functools import cache
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, Features, Image, List, Value
from lmms_eval.evaluator import simple_evaluate
from loguru import logger
from PIL import Image as Pillow
from tiny import PINPOINTS, SIDE, TEXT, TOWER, config_of
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

FAMILIES = ("llava", "next", "onevision")
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220), "yellow": (230, 220, 40)}
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>", "<video>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>\n' }}"
    "{% elif c['type'] == 'video' %}{{ '<video>\n' }}{% endif %}{% endfor %}"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{{ eos_token if m['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A small BPE that writes blanks the way LLaMA's sentencepiece does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    letters = [chr(c) for c in range(32, 127)] + ["\n"]
    corpus = [f"USER: {question(i)} ASSISTANT: {colour}" for i, colour in enumerate(list(COLOURS) * 20)]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=letters, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    fast.add_special_tokens({"additional_special_tokens": [AddedToken("<image>"), AddedToken("<video>")]})
    return fast


def question(i: int) -> str:
    """Questions of different lengths."""
    return f"What colour is the square number {i}?" + " Look at it closely." * (i % 4) + " Answer with one word."


@cache
def _build(family: str):
    tokenizer = _tokenizer()
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    text = TEXT | dict(hidden_size=64, intermediate_size=96, vocab_size=len(tokenizer), max_position_embeddings=4096)
    text |= dict(pad_token_id=3, bos_token_id=1, eos_token_id=2)
    tower = TOWER | dict(hidden_size=32, intermediate_size=48)
    tower |= dict(vision_use_head=False) if family == "onevision" else {}
    config, cls = config_of(family, text, tower, image, video)
    model = cls(config)
    common = dict(tokenizer=tokenizer, chat_template=TEMPLATE)
    common |= dict(vision_feature_select_strategy=config.vision_feature_select_strategy)
    if family == "onevision":
        edge = {"height": SIDE, "width": SIDE}
        processor = LlavaOnevisionProcessor(
            LlavaOnevisionImageProcessor(size=edge, image_grid_pinpoints=PINPOINTS),
            video_processor=LlavaOnevisionVideoProcessor(size=edge),
            num_image_tokens=16,
            **common,
        )
    else:
        square = dict(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
        common |= dict(patch_size=TOWER["patch_size"], num_additional_image_tokens=1)
        if family == "llava":
            processor = LlavaProcessor(CLIPImageProcessor(**square), **common)
        else:
            pictures = LlavaNextImageProcessor(image_grid_pinpoints=PINPOINTS, **square)
            processor = LlavaNextProcessor(pictures, **common)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (1.5 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.1))
        for name, p in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                p.add_(1)
    model.generation_config.suppress_tokens = list(range(len(SPECIAL)))  # words, so that answers can be compared
    model.generation_config.do_sample = True  # released checkpoints say so too; a greedy task must win
    model.generation_config.temperature = 0.3
    return model.eval(), processor


def checkpoint(family: str, folder: Path) -> str:
    """Save the tiny model of a family with its processor; the folder's path."""
    path = folder / family
    if not path.exists():
        model, processor = _build(family)
        model.save_pretrained(path)
        processor.save_pretrained(path)
    return str(path)


def picture(i: int) -> Pillow.Image:
    """A coloured square on noise; sizes and shapes differ."""
    noise = np.random.default_rng(i)
    height, width = ((48, 64), (64, 40), (40, 40), (30, 90))[i % 4]
    pixels = noise.integers(0, 90, (height, width, 3), dtype=np.uint8)
    pixels[8:24, 10:30] = list(COLOURS.values())[i % len(COLOURS)]
    return Pillow.fromarray(pixels)


def questions(path: Path, count: int = 12) -> str:
    """A parquet file with the columns of the bundled tasks."""
    rows = [
        dict(
            id=str(i),
            image=picture(i),
            question=question(i),
            answer=list(COLOURS)[i % 4],
            choices=list(COLOURS),
            scene=str(i // 2),
        )
        for i in range(count)
    ]
    features = Features(
        id=Value("string"),
        image=Image(),
        question=Value("string"),
        answer=Value("string"),
        choices=List(Value("string")),
        scene=Value("string"),
    )
    Dataset.from_list(rows, features=features).to_parquet(path)
    return str(path)


def metrics(*names: str) -> list[dict]:
    """Settings of metrics that are averaged over the questions."""
    return [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in names]


def write_task(folder: Path, name: str, *functions: str, **settings) -> None:
    """Write a task over `questions`. functions: lines such as "process_results: !function utils.score"."""
    if not (folder / "questions.parquet").exists():
        questions(folder / "questions.parquet")
    if not (folder / "utils.py").exists():
        (folder / "utils.py").write_text('def images(doc):\n    return [doc["image"].convert("RGB")]\n')
    common = {
        "task": name,
        "dataset_path": "parquet",
        "dataset_kwargs": {"data_files": {"test": str(folder / "questions.parquet")}},
        "test_split": "test",
        "doc_to_text": "question",
        "doc_to_target": "answer",
        "metric_list": metrics("acc"),
        "metadata": {"version": 1.0},
    }
    lines = [yaml.safe_dump(common | settings), "doc_to_visual: !function utils.images", *functions]
    (folder / f"{name}.yaml").write_text("\n".join(lines) + "\n")


def video(path: Path, frames: int = 20) -> str:
    """An mp4 whose frames grow brighter."""
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(frames):
            pixels = np.full((48, 64, 3), 10 + 10 * i, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return str(path)


def run_lmms_eval(lm, names, manager, **options):
    """lmms-eval's results, and the answers of every document by task."""
    results = simple_evaluate(model=lm, tasks=list(names), task_manager=manager, verbosity="ERROR", **options)
    return results, {name: [s["filtered_resps"] for s in results["samples"][name]] for name in names}


def stock_answers(monkeypatch, path: str, names, manager, **options) -> dict:
    """Answers of lmms-eval's own `llava_hf`. It imports decord for its videos; there are none here."""
    if "decord" not in sys.modules:
        decord = types.ModuleType("decord")
        decord.VideoReader = decord.cpu = None
        monkeypatch.setitem(sys.modules, "decord", decord)
    try:
        from lmms_eval.models.chat.llava_hf import LlavaHf
    except ImportError as error:
        pytest.skip(f"lmms-eval's llava_hf cannot be imported: {error}")
    errors = []
    sink = logger.add(errors.append, level="ERROR")
    lm = LlavaHf(path, device="cpu", device_map="cpu", dtype="float32")
    _, answers = run_lmms_eval(lm, names, manager, **options)
    logger.remove(sink)
    assert not errors  # an exception becomes an empty answer there
    return answers
