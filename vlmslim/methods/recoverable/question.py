"""Find what the user said in a decoded prompt."""

import re
from collections.abc import Iterable

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
