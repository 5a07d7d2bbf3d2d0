"""Names of methods: the short one, the one that loads the method again, and the label of a row."""

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmslim.io import modules
from vlmslim.registry.classes import (
    GROUP,
    bare_name,
    class_of,
    installed_methods,
    is_method_name,
    method_class,
    method_names,
    top_package,
)
from vlmslim.registry.listing import listing
from vlmslim.registry.make import Spec

if TYPE_CHECKING:  # names alone need no torch
    from vlmslim.compressor import Compressor


def name_of(method: "Compressor | type[Compressor]") -> str:
    """Return the short name of a method or of a stage: that of its file or entry point, or else of its class."""
    cls = class_of(method)
    if cls.__module__.startswith(f"{GROUP}."):
        return cls.__module__.removeprefix(f"{GROUP}.").partition(".")[0]
    for point in installed_methods():
        if top_package(point.module) == top_package(cls.__module__) and listing(point.name).cls is cls:
            return point.name
    stem = cls.__module__.rpartition(".")[2]
    return stem if bare_name(stem) == bare_name(cls.__name__) else cls.__name__.lower()


def address_of(method: "Compressor | type[Compressor]") -> str:
    """Return a name that loads the class of a method again, in this process or another.

    Raises:
        ValueError: no name can load it, because the class is made in a function or in the main script.
    """
    cls = class_of(method)
    name = name_of(cls)
    if name in method_names() and listing(name).cls is cls:
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
