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


def find_text(prompt: str, source: str, turn: str | None = None, special: Iterable[str] = ()) -> str:
    """Find the text to compare patches with.

    Args:
        prompt: the decoded prompt, special tokens included.
        source: "question" is the first line of the user's last turn, "user" all of that turn, and "system" the first
            line of the whole prompt.
        turn: regular expression of a user's turn; None tries those of the known chat templates.
        special: the tokenizer's special tokens, which are removed from the result.

    Returns:
        The text. If no turn is found, the whole prompt counts as the user's turn.
    """

    def clean(text: str) -> str:
        for token in special:
            text = text.replace(token, "")
        return text.strip()

    if source == "system":
        return clean(prompt.split("\n")[0])
    found = (re.findall(pattern, prompt, re.DOTALL) for pattern in ([turn] if turn else USER_TURNS))
    turns = [clean(text) for text in next(filter(None, found), [prompt])]
    text = next(filter(None, reversed(turns)), "")
    return text if source == "user" else text.split("\n")[0].strip()
