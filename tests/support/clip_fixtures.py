"""Tiny random CLIPs on the vision tower of the tiny LLaVA, and the words that its prompts are made of."""

import json

import pytest
import torch
from tiny import tiny
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

VOCABULARY = ["<pad>", "<s>", "SYSTEM", "USER:", "ASSISTANT:", "\n", *(f"w{i}" for i in range(6, 100))]
SYS, USER, ASSISTANT, LINE = range(2, 6)


class Words:
    """The language model's tokenizer: one word an id."""

    all_special_tokens = ("<pad>", "<s>")

    def decode(self, ids):
        return " ".join(VOCABULARY[i] for i in ids)

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [1] * add_special_tokens + [VOCABULARY.index(word) for word in text.split()]}


def word_level(vocabulary: list[str], unknown: str) -> Tokenizer:
    """Make a tokenizer of whole words, numbered in order."""
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=unknown))
    words.pre_tokenizer = WhitespaceSplit()
    return words


def stem_of(model):
    tower = model.model.vision_tower
    return getattr(tower, "vision_model", tower).embeddings.patch_embedding.weight.detach()


@pytest.fixture(scope="session")
def hf_folder(tmp_path_factory) -> str:
    """A tiny random HF CLIPModel with its tokenizer, on the vision tower of the tiny LLaVA."""
    folder = str(tmp_path_factory.mktemp("hf-clip"))
    torch.manual_seed(1)
    llava = tiny("llava")
    config = CLIPConfig(
        text_config=dict(
            vocab_size=103,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=20,
            bos_token_id=100,
            eos_token_id=101,
            pad_token_id=101,
        ),
        vision_config=llava.config.vision_config.to_dict(),
        projection_dim=12,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.normal_(0, 1.5 / p[0].numel() ** 0.5)
        model.vision_model.load_state_dict(llava.model.vision_tower.state_dict())
    model.save_pretrained(folder)
    words = word_level([*VOCABULARY, "<sot>", "<eot>", "<unk>"], "<unk>")
    words.post_processor = TemplateProcessing(single="<sot> $A <eot>", special_tokens=[("<sot>", 100), ("<eot>", 101)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<sot>", eos_token="<eot>", pad_token="<eot>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def open_clip_folder(tmp_path_factory) -> str:
    open_clip = pytest.importorskip("open_clip")
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("open-clip")
    config = dict(
        embed_dim=12,
        vision_cfg=dict(image_size=32, patch_size=8, width=16, layers=1, head_width=8),
        text_cfg=dict(context_length=24, vocab_size=49408, width=16, heads=2, layers=2),
    )
    torch.manual_seed(2)
    model = open_clip.model.CLIP(**config)
    with torch.no_grad():
        model.visual.conv1.weight.copy_(stem_of(tiny("llava")))
    (folder / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config, preprocess_cfg={})))
    save_file({k: v.half().contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return str(folder)
