"""Read what the user said in a prompt, and embed it."""

import os
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vlmslim.image_tokens import ImageTokens
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


class PromptReader:
    """Reads the prompts of images with the language model's tokenizer, and embeds texts as the language model does.

    Args:
        model: the model; its input embeddings are read.
        tokenizer: as `load_tokenizer` takes it.
        turn: regular expression of a user's turn; None tries those of the known chat templates.
    """

    def __init__(self, model: Any, tokenizer: Any = None, turn: str | None = None):
        self.tokenizer, self.turn = load_tokenizer(tokenizer, model), turn
        self.embedding = model.get_input_embeddings()

    def text(self, image: ImageTokens, source: str = "user") -> str:
        """Find the text in the prompt of an image that `find_text` describes.

        Raises:
            ValueError: the prompt was given as embeddings.
        """
        if image.prompt is None:
            raise ValueError(
                "the question is read from input_ids; pass input_ids instead of inputs_embeds, or use a method that "
                "reads no question, such as cdpruner with relevance='none'"
            )
        special = getattr(self.tokenizer, "all_special_tokens", ())
        return find_text(self.tokenizer.decode(image.prompt.tolist()), source, self.turn, special)

    @torch.no_grad()
    def embed(self, text: str, device: torch.device) -> Tensor:
        """Look up the input embeddings of a text: (m, d), where m is 0 for an empty text."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return self.embedding(torch.tensor(ids, dtype=torch.long, device=device))


def without_answer_format(text: str, sentences: Iterable[str] = ANSWER_FORMATS) -> str:
    """Return a question without the sentences that say how to answer it."""
    for sentence in sentences:
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
