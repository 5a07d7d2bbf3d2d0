"""Prompts are those of the authors' code, character for character. The expected texts were written out by hand."""

import pytest
from original_checkpoints import tokenizer
from transformers import LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from vlmslim.originals.templates import CONVERSATIONS, conversation, conversation_of

IMAGE = {"type": "image"}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def prompt(name: str, messages: list[dict], **how) -> str:
    template = conversation(name).template()
    return tokenizer("llava").apply_chat_template(
        messages, chat_template=template, tokenize=False, **{"add_generation_prompt": True} | how
    )


ONE = [{"role": "user", "content": [IMAGE, text("What is\nthis?")]}]
ROUNDS = [
    *ONE,
    {"role": "assistant", "content": [text("A cat.")]},
    {"role": "user", "content": "Its 'colour' is \"red\"?"},
]


@pytest.mark.parametrize(
    "name, want",
    [
        ("vicuna_v1", f"{VICUNA} USER: <image>\nWhat is\nthis? ASSISTANT:"),
        ("llava_v1", f"{VICUNA.replace('user', 'human')} USER: <image>\nWhat is\nthis? ASSISTANT:"),
        ("mistral_instruct", "[INST] <image>\nWhat is\nthis? [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\nWhat is\nthis?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "qwen_1_5",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is\nthis?"
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_a_question(name, want):
    assert prompt(name, ONE) == want


def test_every_conversation_is_tested():
    assert set(CONVERSATIONS) == {"vicuna_v1", "llava_v1", "mistral_instruct", "chatml_direct", "qwen_1_5"}


@pytest.mark.parametrize(
    "name, want",
    [
        (
            "vicuna_v1",
            f"{VICUNA} USER: <image>\nWhat is\nthis? ASSISTANT: A cat.</s>USER: Its 'colour' is \"red\"? ASSISTANT:",
        ),
        (
            "mistral_instruct",
            "[INST] <image>\nWhat is\nthis? [/INST] A cat. </s>[INST] Its 'colour' is \"red\"? [/INST]",
        ),
        (
            "qwen_1_5",
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is\nthis?"
            "<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nIts 'colour' is \"red\"?"
            "<|im_end|>\n<|im_start|>assistant\n",
        ),
    ],
)
def test_rounds(name, want):
    assert prompt(name, ROUNDS) == want


def test_an_answer_without_the_next_question():
    assert prompt("vicuna_v1", ROUNDS[:2], add_generation_prompt=False).endswith("this? ASSISTANT: A cat.</s>")


def test_several_pictures_and_pictures_among_text():
    several = [{"role": "user", "content": [IMAGE, IMAGE, text("Which?")]}]
    assert prompt("mistral_instruct", several) == "[INST] <image> <image>\nWhich? [/INST]"
    among = [{"role": "user", "content": [text("First: "), IMAGE, text("and a film: "), {"type": "video"}]}]
    assert prompt("mistral_instruct", among) == "[INST] First: <image>\nand a film: <video>\n [/INST]"


@pytest.mark.parametrize("said", ["Be brief.", [text("Be brief.")]])
def test_another_system_prompt(said):
    messages = [{"role": "system", "content": said}, {"role": "user", "content": "Hi"}]
    assert prompt("vicuna_v1", messages) == "Be brief. USER: Hi ASSISTANT:"
    assert prompt("mistral_instruct", messages) == "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]"
    assert prompt("chatml_direct", messages).startswith("<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi")


@pytest.mark.parametrize(
    "config, name",
    [
        (LlamaConfig(vocab_size=32000), "vicuna_v1"),
        (LlamaConfig(vocab_size=32064), "vicuna_v1"),
        (LlamaConfig(vocab_size=64000), "chatml_direct"),
        (MistralConfig(), "mistral_instruct"),
        (Qwen2Config(), "qwen_1_5"),
    ],
)
def test_the_conversation_of_a_language_model(config, name):
    assert conversation_of(config) == name


def test_no_conversation_is_known():
    for config in (LlamaConfig(vocab_size=128256), Qwen3Config()):
        with pytest.raises(ValueError, match="no conversation of the authors is known for a .* give conversation=NAME"):
            conversation_of(config)
    with pytest.raises(ValueError, match="conversation='vicuna': use one of vicuna_v1, .*Did you mean 'vicuna_v1'"):
        conversation("vicuna")
