"""Options of methods, checked by their annotations: one check for every method, also for those of other authors."""

import inspect
import math
import types
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from vlmslim.io.messages import shown

LARGEST = 2**63 - 1  # of an integer, because PyTorch reads 64 bits


def check_options(cls: type, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Check the arguments of a class against the annotations of its fields.

    A bool is no number, a number is finite, and an integer has 64 bits at most. A list may stand for a tuple, because
    YAML has no tuples. An annotation that cannot be read here is not checked.

    Args:
        cls: a dataclass.
        given: its arguments by position.
        named: its arguments by name.

    Raises:
        ValueError: names the option, its value and what to give instead.
    """
    names, hints = _signature(cls)
    for name, value in [*zip(names, given, strict=False), *named.items()]:
        hint = hints.get(name, Any)
        if not fits(value, hint):
            raise ValueError(f"{name}={shown(value)}: give {expected(hint)}")


@lru_cache(maxsize=256)
def _signature(cls: type) -> tuple[list[str], dict[str, Any]]:
    """Return the names of a class's arguments in order, and the annotations of those that are fields."""
    names = [name for name in inspect.signature(cls.__init__).parameters if name != "self"]  # type: ignore[misc]
    fields = {name: field.type for name, field in getattr(cls, "__dataclass_fields__", {}).items() if field.init}
    try:
        hints = get_type_hints(cls, include_extras=True)
    except Exception:  # a name that only a type checker imports; then the other annotations count as they are
        hints = {name: Any if isinstance(kind, str) else kind for name, kind in fields.items()}
    return names, {name: hints.get(name, Any) for name in fields}


def fits(value: Any, hint: Any) -> bool:
    """Tell whether a value is of the type that an annotation names."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is types.NoneType:
        return value is None
    if hint in (int, float):
        return _is_number(value, hint)
    if origin is Annotated:
        return fits(value, inner[0]) and all(rule(value) for rule in inner[1:] if callable(rule))
    if origin in (Union, types.UnionType):
        return any(fits(value, kind) for kind in inner)
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    kind = origin or hint
    if not isinstance(kind, type) or isinstance(hint, TypeVar) or kind is object:
        return True
    if issubclass(kind, Sequence) and kind is not str:
        return _is_sequence(value, kind, inner)
    if isinstance(value, Mapping) and issubclass(kind, Mapping) and len(inner) == 2:
        return all(fits(key, inner[0]) and fits(entry, inner[1]) for key, entry in value.items())
    if getattr(kind, "_is_protocol", False):
        return True
    return isinstance(value, kind)


def _is_number(value: Any, kind: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | kind):
        return False
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)


def _is_sequence(value: Any, kind: type, inner: tuple[Any, ...]) -> bool:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return False
    if kind is tuple and inner and inner[-1] is not ...:
        return len(value) == len(inner) and all(map(fits, value, inner))
    return not inner or all(fits(entry, inner[0]) for entry in value)


def expected(hint: Any) -> str:
    """Say what values an annotation allows."""
    origin, inner = get_origin(hint), get_args(hint)
    words = {bool: "True or False", int: "an integer", float: "a finite number", str: "a text", types.NoneType: "None"}
    if origin is Annotated:
        return next((words for words in inner[1:] if isinstance(words, str)), expected(inner[0]))
    if origin in (Union, types.UnionType):
        kinds = [kind for kind in inner if kind is not int or float not in inner]
        return " or ".join(dict.fromkeys(map(expected, kinds)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    kind = origin or hint
    if hint in words:
        return words[hint]
    if isinstance(kind, type) and issubclass(kind, Sequence):
        entries = [expected(entry).removeprefix("a finite ").removeprefix("an ") for entry in inner if entry is not ...]
        return f"a list ({', '.join(entries)})" if entries else "a list"
    return f"a {getattr(kind, '__name__', kind)}"
