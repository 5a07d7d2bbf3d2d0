"""Find what the user said in a prompt."""

import os
import re
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vlmslim.io import hub
from vlmslim.io.messages import shown

# A user's turn in the chat templates of LLaVA-style models, special tokens included; group 1 is what the user said.
USER_TURNS = (
    r"<\|im_start\|>user\b(.*?)(?:<\|im_end\|>|\Z)",
    r"<\|start_header_id\|>user<\|end_header_id\|>(.*?)(?:<\|eot_id\|>|\Z)",
    r"<\|user\|>(.*?)(?:<\|end\|>|<\|assistant\|>|</s>|\Z)",
    r"<start_of_turn>user\b(.*?)(?:<end_of_turn>|\Z)",
    r"\[INST\](?:\s*<<SYS>>.*?<</SYS>>)?(.*?)(?:\[/INST\]|\Z)",
    r"(?:^|(?<=[\s>#]))(?:USER|User|Human):(.*?)(?:(?:###\s*)?\b(?:ASSISTANT|Assistant):|</s>|\Z)",
)

PREAMBLE = re.compile(r"(?:Context|Hint)\s*:", re.IGNORECASE)  # ScienceQA and MathVista put such a line first
OPTION = re.compile(r"\(?[A-Z][.):]\s")  # "A. bear", "(A) bear"


#: What benchmarks add to a question to say how to answer it; several methods leave it out.
ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)


def check_tokenizer(tokenizer: Any, needs: str = "decode") -> None:
    """Refuse what is neither a tokenizer nor the name of one.

    Raises:
        ValueError: says what to give instead.
    """
    if not (tokenizer is None or isinstance(tokenizer, str | os.PathLike) or hasattr(tokenizer, needs)):
        raise ValueError(f"tokenizer={shown(tokenizer)}: give a hub id, a folder, or an object with `{needs}`")


def load_tokenizer(tokenizer: Any, model: Any) -> Any:
    """Return a tokenizer: itself, the one of that name, or that of the checkpoint if it is None.

    Raises:
        ValueError: the checkpoint's name is not known, or there is no tokenizer of that name.
    """
    if tokenizer is not None and not isinstance(tokenizer, str | os.PathLike):
        return tokenizer
    from transformers import AutoTokenizer

    name = tokenizer or model.config._name_or_path
    if not name:
        raise ValueError("this model does not tell where it was loaded from; give tokenizer=HUB_ID_OR_FOLDER")
    asked = {} if os.path.isdir(name) else hub.how_to_ask()
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **asked)
    except OSError as error:
        raise ValueError(hub.hint(str(name)) or f"tokenizer={shown(str(name))} could not be loaded: {error}") from error


def read_prompt(prompt: Tensor, tokenizer: Any, source: str, turn: str | None = None) -> str:
    """Decode the text tokens of a prompt (t,), and find the text in it that `find_text` describes."""
    return find_text(tokenizer.decode(prompt.tolist()), source, turn, getattr(tokenizer, "all_special_tokens", ()))


def without_answer_format(text: str) -> str:
    """Return a question without the sentences that say how to answer it."""
    for sentence in ANSWER_FORMATS:
        text = text.replace(sentence, "")
    return text.strip()


def find_text(prompt: str, source: str, turn: str | None = None, special: Iterable[str] = ()) -> str:
    """Find the text to compare patches with.

    Args:
        prompt: the decoded prompt, special tokens included.
        source: "question" is the question in the user's last turn, "user" all of that turn, and "system" the first
            line of the whole prompt, as it is.
        turn: regular expression of a user's turn; None tries those of the known chat templates.
        special: the tokenizer's special tokens, which are removed from a user's text.

    Returns:
        The text. If no turn is found, the whole prompt counts as the user's turn.
    """

    def clean(text: str) -> str:
        for token in special:
            text = text.replace(token, "")
        return text.strip()

    if source == "system":
        return prompt.split("\n")[0]
    found = (re.findall(pattern, prompt, re.DOTALL) for pattern in ([turn] if turn else USER_TURNS))
    turns = [clean(text) for text in next(filter(None, found), [prompt])]
    text = next(filter(None, reversed(turns)), "")
    return text if source == "user" else _question(text)


def _question(text: str) -> str:
    """Find the question in a user's text: its first line, or the question after a leading `Context:` or `Hint:`.

    After a context of several lines, the question is the last line before the options that ends in a question mark. If
    no line does, it is the last line before the options, or the line after the context's first if there are none.
    """
    first, *lines = [line.strip() for line in text.split("\n") if line.strip()] or [""]
    if not lines or not PREAMBLE.match(first):
        return first
    options = next((i for i, line in enumerate(lines) if OPTION.match(line)), None)
    before = lines[:options] or lines[:1]
    asked = [line for line in before if line.endswith("?")]
    return asked[-1] if asked else before[0 if options is None else -1]
