"""The list of methods that `vlmslim methods` prints."""

import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vlmslim.registry.classes import (
    BrokenMethod,
    built_in_names,
    installed_methods,
    method_class,
    method_names,
    package_of,
)

if TYPE_CHECKING:  # names alone need no torch
    from vlmslim.compressor import Compressor

#: Methods without a paper, with which the others are compared.
BASELINES = ("blind", "downsample", "none", "pool", "random", "schedule", "uniform")


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
    return [listing(name) for name in method_names()]


def listing(name: str) -> Listing:
    """Load a method, or find out why it is broken."""
    packages = [package_of(point) for point in installed_methods() if point.name == name]
    source = ", ".join(["built-in"] * (name in built_in_names()) + packages)
    try:
        return Listing(name, source, method_class(name))
    except BrokenMethod as error:
        return Listing(name, source, None, str(error))
