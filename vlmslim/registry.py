"""The names of the methods: each is a file of `vlmslim/methods`, and adding a file adds a method."""

import pkgutil
from dataclasses import fields
from difflib import get_close_matches
from importlib import import_module

from vlmslim import methods
from vlmslim.compressor import Compressor


def method_names() -> tuple[str, ...]:
    """The names of all methods, sorted."""
    names = (module.name for module in pkgutil.iter_modules(methods.__path__))
    return tuple(sorted(name for name in names if not name.startswith("_")))


def method_class(name: str) -> type[Compressor]:
    """The class of a method: the last `Compressor` that its file defines.

    Raises:
        ValueError: there is no such method; the message names the nearest.
    """
    if name not in method_names():
        raise ValueError(_unknown("method", name, method_names()))
    module = import_module(f"{methods.__name__}.{name}")
    own = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, Compressor)]
    return next(c for c in reversed(own) if c.__module__ == module.__name__)


def method(name: str, **options) -> Compressor:
    """Make a method from its name and options.

    Raises:
        ValueError: unknown name or option (the message names the nearest), a missing one, or a value out of range.
    """
    cls = method_class(name)
    known = [f.name for f in fields(cls) if f.init]
    for option in options:
        if option not in known:
            raise ValueError(_unknown(f"option of {name}", option, known))
    try:
        return cls(**options)
    except TypeError as error:  # a required option is missing
        raise ValueError(f"{name}: {error}; its options are {', '.join(known)}") from error


def name_of(compressor: Compressor) -> str:
    """The name of a method or of one of its stages: its file's, or its class's for one that is in no file here."""
    package, _, name = type(compressor).__module__.rpartition(".")
    return name if package == methods.__name__ else type(compressor).__name__.lower()


def _unknown(what: str, given: str, known) -> str:
    near = get_close_matches(given, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {what} {given!r}.{hint} Known: {', '.join(known) or 'none'}"
