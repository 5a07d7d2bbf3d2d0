"""The prompts of LLaVA's authors as chat templates, by the names of conversations in their code.

Haotian Liu et al., "Improved Baselines with Visual Instruction Tuning", arXiv 2310.03744, and the code released with
it and with LLaVA-NeXT.
"""

import json
from dataclasses import dataclass
from typing import Any

from vlmslim.io.messages import did_you_mean


@dataclass(frozen=True)
class Conversation:
    """The written form of a conversation.

    system    : the system prompt, unless the first message gives another
    head      : what stands before and after the system prompt
    user      : what stands before and after a message of the user
    assistant : what stands before and after an answer
    begin     : what asks for an answer
    end       : the token that ends an answer
    inside    : whether the system prompt is part of the first message
    """

    system: str
    head: tuple[str, str]
    user: tuple[str, str]
    assistant: tuple[str, str]
    begin: str
    end: str
    inside: bool = False

    def template(self) -> str:
        """Write it as a chat template of transformers.

        Pictures that follow one another have a blank between them, and the last one has a newline after it.
        """
        write = (
            "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
            "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<' ~ part['type'] ~ '>' }}"
            "{{ ' ' if loop.nextitem is defined and loop.nextitem['type'] != 'text' else '\\n' }}"
            "{% endif %}{% endfor %}{% endif %}{% endmacro %}"
        )
        system = f"{{{{ {_quoted(self.head[0])} ~ system ~ {_quoted(self.head[1])} if system else '' }}}}"
        first = f"{{% if loop.first %}}{system}{{% endif %}}" if self.inside else ""
        return (
            write + "{% set given = messages[0]['role'] == 'system' %}"
            f"{{% set system = write(messages[0]['content']) if given else {_quoted(self.system)} %}}"
            f"{'' if self.inside else system}"
            "{% for message in (messages[1:] if given else messages) %}{% if message['role'] == 'user' %}"
            f"{{{{ {_quoted(self.user[0])} }}}}{first}{{{{ write(message['content']) ~ {_quoted(self.user[1])} }}}}"
            f"{{% else %}}{{{{ {_quoted(self.assistant[0])} ~ write(message['content']) ~ "
            f"{_quoted(self.assistant[1])} }}}}{{% endif %}}{{% endfor %}}"
            f"{{% if add_generation_prompt %}}{{{{ {_quoted(self.begin)} }}}}{{% endif %}}"
        )


def _quoted(text: str) -> str:
    """Write a text as Jinja does."""
    return json.dumps(text)


def _vicuna(who: str) -> Conversation:
    system = (
        f"A chat between a curious {who} and an artificial intelligence assistant. The assistant gives helpful, "
        f"detailed, and polite answers to the {who}'s questions."
    )
    return Conversation(system, ("", " "), ("USER: ", " "), ("ASSISTANT: ", "</s>"), "ASSISTANT:", "</s>")


def _chatml(system: str, gap: str) -> Conversation:
    """Make a conversation of ChatML; `gap` stands after each message."""
    end = f"<|im_end|>{gap}"
    begin = "<|im_start|>assistant\n"
    return Conversation(
        system, ("<|im_start|>system\n", end), ("<|im_start|>user\n", end), (begin, end), begin, "<|im_end|>"
    )


CONVERSATIONS = {
    "vicuna_v1": _vicuna("user"),
    "llava_v1": _vicuna("human"),
    "mistral_instruct": Conversation(
        "", ("<<SYS>>\n", "\n<</SYS>>\n\n"), ("[INST] ", " [/INST]"), (" ", " </s>"), "", "</s>", inside=True
    ),
    "chatml_direct": _chatml("Answer the questions.", ""),
    "qwen_1_5": _chatml("You are a helpful assistant.", "\n"),
}


def conversation(name: str) -> Conversation:
    """Return a conversation by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CONVERSATIONS:
        hint = did_you_mean(name, CONVERSATIONS)
        raise ValueError(f"conversation={name!r}: use one of {', '.join(CONVERSATIONS)}.{hint}")
    return CONVERSATIONS[name]


def conversation_of(text: Any) -> str:
    """Return the name of the conversation that the authors use with a language model.

    Args:
        text: configuration of the language model. Llamas differ by their vocabularies: Vicuna has LLaMA's of 32,000,
            LLaVA-1.6-34B that of Yi, 64,000.

    Raises:
        ValueError: the authors use none with it that vlmslim knows.
    """
    by_type = {"mistral": "mistral_instruct", "qwen2": "qwen_1_5"}
    if name := by_type.get(text.model_type):
        return name
    if text.model_type == "llama" and text.vocab_size < 2**16:
        return "vicuna_v1" if text.vocab_size < 2**15 else "chatml_direct"
    raise ValueError(
        f"no conversation of the authors is known for a {text.model_type} with {text.vocab_size} words: give "
        f"conversation=NAME, one of {', '.join(CONVERSATIONS)}"
    )
