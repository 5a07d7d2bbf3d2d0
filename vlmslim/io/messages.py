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


def described(value: object) -> str:
    """Describe a value by its kind: `a Tensor (16, 192) of float32`, `a list`, `None`."""
    if value is None:
        return "None"
    kind = type(value).__name__.replace("ndarray", "NumPy array")
    text = f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
    if not hasattr(value, "shape") or not hasattr(value, "dtype"):
        return text
    layout = str(getattr(value, "layout", "")).removeprefix("torch.").removeprefix("strided")
    numbers = str(value.dtype).removeprefix("torch.")
    return f"{text} {tuple(value.shape)} of {' '.join(filter(None, (layout, numbers)))}"


def shown(value: Any) -> str:
    """Return the text of a value for a message, shortened."""
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
