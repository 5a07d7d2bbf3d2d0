"""Parts of messages that several rooms write."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


def did_you_mean(name: object, known: Iterable[object]) -> str:
    """Return a hint that names the nearest known name, or nothing if no name is near."""
    near = get_close_matches(str(name), [str(k) for k in known], n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def one_line(error: BaseException) -> str:
    """Return the first line of an exception's message that is not empty, or else the name of its class."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def shown(value: Any) -> str:
    """Return the text of a value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
