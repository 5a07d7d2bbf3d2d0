"""Methods by name: make them, name them, and list them."""

import ast
import inspect
import re
import sys
from collections.abc import Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmslim.io import modules
from vlmslim.io.messages import did_you_mean, one_line
from vlmslim.method_classes import (
    GROUP,
    BrokenMethod,
    bare_name,
    built_in_names,
    file_of,
    installed_methods,
    is_method_name,
    method_class,
    method_names,
    package_of,
    the_method,
    top_package,
)

if TYPE_CHECKING:  # names alone need no torch
    from vlmslim.compressor import Compressor

__all__ = [
    "BASELINES",
    "GROUP",
    "BrokenMethod",
    "Listing",
    "Spec",
    "address_of",
    "build",
    "file_of",
    "is_method_name",
    "label",
    "listings",
    "method",
    "method_class",
    "method_names",
    "name_of",
    "options_of",
    "parse_method",
    "the_method",
]

#: Methods without a paper, with which the others are compared.
BASELINES = ("blind", "downsample", "none", "pool", "random", "schedule", "uniform")

#: A method as a user writes it: its name, or a dictionary with its name under "method" and its options, or an object.
Spec: TypeAlias = "str | dict[str, Any] | Compressor"


# --- from a method as it is written to an object ----------------------------------------------------------------------


def options_of(method: "str | Compressor | type[Compressor]") -> dict[str, Any]:
    """Return the options of a method and their defaults; `dataclasses.MISSING` for an option that must be given."""
    cls = method_class(method) if isinstance(method, str) else _class_of(method)
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(cls)
        if field.init
    }


def method(name: str, **options: Any) -> "Compressor":
    """Make a method from its name and options.

    Raises:
        ValueError: an unknown name or option (the message names the nearest), a missing option, or a wrong value.
    """
    cls = method_class(name)
    known = options_of(cls)
    for option in options:
        _check_option(name, option, known)
    for option, default in known.items():
        if default is MISSING and option not in options:
            raise ValueError(f"{name} needs the option {option}: give {option}=...; its options are {', '.join(known)}")
    try:
        return cls(**options)
    except TypeError as error:  # a value of the wrong type
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"{name} cannot be made with {given}: {one_line(error)}") from error


def build(spec: Spec) -> "Compressor":
    """Make a method from its name, or from a dictionary with the key "method"; return an object as it is.

    Raises:
        ValueError: as `method` does, or because `spec` is something else.
    """
    from vlmslim.compressor import Compressor

    if isinstance(spec, Compressor):
        return spec
    if isinstance(spec, str):
        return method(spec)
    if isinstance(spec, dict) and "method" in spec:
        return method(spec["method"], **{option: value for option, value in spec.items() if option != "method"})
    raise ValueError(f"a stage is a name, a method object or a dictionary with the key 'method', not {spec!r}")


def parse_method(text: str) -> dict[str, Any]:
    """Read a method as the command line writes it, such as `fastv:layer=3:keep=64`, into a dictionary for `build`.

    Raises:
        ValueError: an unknown method or option, or an option without a value.
    """
    name, *parts = text.strip().split(":")
    if parts and "=" not in parts[0] and name not in method_names():  # path/to/file.py:Class
        name = f"{name}:{parts.pop(0)}"
    known = options_of(name)
    stage: dict[str, Any] = {"method": name}
    for part in parts:
        option, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"{text!r}: write options as name:option=value, such as fastv:layer=3")
        _check_option(name, option, known)
        try:
            stage[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            stage[option] = value  # a word
    return stage


def _check_option(name: str, option: str, known: Collection[str]) -> None:
    if option not in known:
        listed = ", ".join(known) or "none"
        raise ValueError(f"unknown option of {name} {option!r}.{did_you_mean(option, known)} Known: {listed}")


# --- from an object or a class to its name ----------------------------------------------------------------------------


def name_of(method: "Compressor | type[Compressor]") -> str:
    """Return the short name of a method or of a stage: that of its file or entry point, or else of its class."""
    cls = _class_of(method)
    if cls.__module__.startswith(f"{GROUP}."):
        return cls.__module__.removeprefix(f"{GROUP}.").partition(".")[0]
    for point in installed_methods():
        if top_package(point.module) == top_package(cls.__module__) and _listing(point.name).cls is cls:
            return point.name
    stem = cls.__module__.rpartition(".")[2]
    return stem if bare_name(stem) == bare_name(cls.__name__) else cls.__name__.lower()


def address_of(method: "Compressor | type[Compressor]") -> str:
    """Return a name that loads the class of a method again, in this process or another.

    Raises:
        ValueError: no name can load it, because the class is made in a function or in the main script.
    """
    cls = _class_of(method)
    name = name_of(cls)
    if name in method_names() and _listing(name).cls is cls:
        return name
    if file := modules.imported_file(cls.__module__):
        return f"{file}:{cls.__name__}"
    if cls.__module__ == "__main__" or getattr(sys.modules[cls.__module__], cls.__qualname__, None) is not cls:
        raise ValueError(
            f"{cls.__name__} has no name to load it by, because it is made in a function or in the main script; "
            "define it at the top of a file of its own"
        )
    return f"{cls.__module__}:{cls.__name__}"


def label(spec: "Spec | Sequence[Spec]") -> str:
    """Return a short text for a method as a user wrote it: `divprune-64`, `fastv-64-layer=3`; stages joined by `+`."""
    if isinstance(spec, dict):
        keep = [] if spec.get("keep") is None else [str(spec["keep"])]
        others = sorted((option, value) for option, value in spec.items() if option not in ("method", "keep"))
        parts = [label(spec["method"]), *keep, *(f"{option}={value}" for option, value in others)]
        return re.sub(r"[^\w.+=,-]+", "_", "-".join(parts))  # it may become a part of a file's name
    if isinstance(spec, str):
        known = spec in method_names() or not is_method_name(spec)
        return spec if known else name_of(method_class(spec))
    return "+".join(map(label, spec)) if isinstance(spec, Sequence) else str(spec)


def _class_of(method: "Compressor | type[Compressor]") -> type["Compressor"]:
    return method if isinstance(method, type) else type(method)


# --- what `vlmslim methods` prints ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """The entry of a built-in or installed method in the list of methods.

    name    : as it is asked for
    source  : "built-in", or the package that brings the method
    cls     : the class; None if the method is broken
    problem : why the method is broken, in one line; empty if it is not
    """

    name: str
    source: str
    cls: type["Compressor"] | None
    problem: str = ""

    @property
    def kind(self) -> str:
        """The use of the method, or the place where it acts."""
        from vlmslim.compressor import Compressor

        def overrides(*names: str) -> bool:
            return any(getattr(self.cls, name) is not getattr(Compressor, name) for name in names)

        if self.cls is None:
            return "broken"
        if self.name in BASELINES:
            return "baseline"
        if overrides("trained"):
            return "trained"
        if overrides("stages"):
            return "pipeline"
        return "before the language model" if overrides("compress", "compress_images") else "between decoder layers"

    @property
    def paper(self) -> str:
        """The first arXiv id in the docstring of the file or of the class; empty if there is none."""
        file = inspect.getdoc(inspect.getmodule(self.cls)) if self.cls else None
        text = f"{file} {inspect.getdoc(self.cls)}"
        found = re.search(r"arxiv\D{0,9}(\d{4}\.\d{4,5})", text, re.IGNORECASE)
        return found[1] if found else ""

    @property
    def summary(self) -> str:
        """The first sentence of the docstring of the class."""
        paragraph = ((self.cls and inspect.getdoc(self.cls)) or "").partition("\n\n")[0]
        return re.split(r"(?<=[.!?])\s", " ".join(paragraph.split()), maxsplit=1)[0]


def listings() -> list[Listing]:
    """Load all built-in and installed methods. One that is broken stops no other."""
    return [_listing(name) for name in method_names()]


def _listing(name: str) -> Listing:
    packages = [package_of(point) for point in installed_methods() if point.name == name]
    source = ", ".join(["built-in"] * (name in built_in_names()) + packages)
    try:
        return Listing(name, source, method_class(name))
    except BrokenMethod as error:
        return Listing(name, source, None, str(error))
