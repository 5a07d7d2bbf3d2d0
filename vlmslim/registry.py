"""Names of methods, and the methods that they stand for.

Wherever vlmslim takes the name of a method, the name is one of these:

    divprune                  a file of `vlmslim/methods`, or an entry point "vlmslim.methods" of an installed package
    path/to/norm.py:Norm      a class in a file
    my_package.norm:Norm      a class in a module that Python can import

`:Norm` may be left out if the file says which of its classes is the method: the class with the name of the file, up to
case and underscores, or else the class under `@the_method`. A file whose name starts with an underscore holds helpers.
"""

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from vlmslim import methods
from vlmslim.io import modules
from vlmslim.io.messages import did_you_mean, one_line

if TYPE_CHECKING:  # names alone need no torch
    from vlmslim.compressor import Compressor

GROUP = "vlmslim.methods"  # of entry points; also the package with the built-in methods
#: Methods without a paper, with which the others are compared.
BASELINES = ("blind", "downsample", "none", "pool", "random", "schedule", "uniform")

#: A method as a user writes it: its name, or a dictionary with its name under "method" and its options, or an object.
Spec: TypeAlias = "str | dict[str, Any] | Compressor"
_Class = TypeVar("_Class", bound=type)
_Imported = TypeVar("_Imported")

_FILE = re.compile(r"(?P<place>.+\.py)(:(?P<cls>\w+))?")
_MODULE = re.compile(r"(?P<place>[A-Za-z_]\w*(\.\w+)+|[A-Za-z_]\w*(?=:))(:(?P<cls>\w+))?")
_MARK = "_is_the_method"


class BrokenMethod(ValueError):
    """A method that is there but cannot be used; the message says why in one line."""


def the_method(cls: _Class) -> _Class:
    """Mark the class that is the method of its file, where the name of the file does not tell."""
    setattr(cls, _MARK, True)
    return cls


# --- names ------------------------------------------------------------------------------------------------------------


def method_names() -> tuple[str, ...]:
    """Return the names of all built-in and installed methods, sorted. Nothing is imported."""
    return tuple(sorted({*_built_in(), *(point.name for point in _installed())}))


def is_method_name(text: str) -> bool:
    """Tell whether a text is the name of a method: a known one, or of a class in a file or a module.

    Other texts may name a folder or a repository with a saved patch.
    """
    if text in method_names() or _FILE.fullmatch(text):
        return True
    return bool(_MODULE.fullmatch(text)) and not Path(text).exists()


def file_of(name: str) -> str | None:
    """Return the path in a name such as path/to/norm.py:Norm; None for other names."""
    address = _FILE.fullmatch(name)
    return address["place"] if address else None


def method_class(name: str) -> type["Compressor"]:
    """Return the class that a name stands for. A file is loaded once, and again after an edit.

    Raises:
        BrokenMethod: the method is there, but it cannot be imported, or its name or its class is not unique.
        ValueError: there is no such method; the message names the nearest.
    """
    points = [point for point in _installed() if point.name == name]
    if len(points) + (name in _built_in()) > 1:
        raise BrokenMethod(_clash(name, points))
    if points:
        return _installed_class(points[0])
    if name in _built_in():
        return _method_of(_import(f"the method {name}", lambda: importlib.import_module(f"{GROUP}.{name}")))
    if address := _FILE.fullmatch(name):
        return _class_at(address, _load_file(address["place"]))
    if address := _MODULE.fullmatch(name):
        return _class_at(address, _load_module(address["place"]))
    known = method_names()
    raise ValueError(f"unknown method {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}")


def name_of(method: "Compressor | type[Compressor]") -> str:
    """Return the short name of a method or of a stage: that of its file or entry point, or else of its class."""
    cls = _class_of(method)
    if cls.__module__.startswith(f"{GROUP}."):
        return cls.__module__.removeprefix(f"{GROUP}.").partition(".")[0]
    for point in _installed():
        if _top(point.module) == _top(cls.__module__) and _listing(point.name).cls is cls:
            return point.name
    stem = cls.__module__.rpartition(".")[2]
    return stem if _plain(stem) == _plain(cls.__name__) else cls.__name__.lower()


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


# --- methods ----------------------------------------------------------------------------------------------------------


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


# --- what `vlmslim methods` prints ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listing:
    """What there is to say about a built-in or installed method.

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
        """What the method is for, or where it acts."""
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
    packages = [_package(point) for point in _installed() if point.name == name]
    source = ", ".join(["built-in"] * (name in _built_in()) + packages)
    try:
        return Listing(name, source, method_class(name))
    except BrokenMethod as error:
        return Listing(name, source, None, str(error))


# --- where methods come from ------------------------------------------------------------------------------------------


def _built_in() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(methods.__path__) if not module.name.startswith("_")]


def _installed() -> tuple[EntryPoint, ...]:
    return _entry_points(tuple(sys.path))


@lru_cache
def _entry_points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read the entry points of all packages on a path: 5 ms, and solving a budget makes thousands of methods."""
    return tuple(entry_points(group=GROUP))


def _installed_class(point: EntryPoint) -> type["Compressor"]:
    what = f"the method {point.name} of the package {_package(point)}"
    found = _import(what, point.load)
    return _method_of(found) if isinstance(found, ModuleType) else _checked(found, what)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else _top(point.module)


def _clash(name: str, points: Sequence[EntryPoint]) -> str:
    built_in = [f"vlmslim itself ({GROUP}.{name})"] if name in _built_in() else []
    claims = [f"the package {_package(point)} ({point.value})" for point in points]
    return (
        f"several methods have the name {name}, of {' and of '.join(built_in + claims)}: rename the entry point, "
        "or ask for one of the methods by the text in brackets"
    )


def _load_module(name: str) -> ModuleType:
    """Import a module by its name.

    Raises:
        ValueError: there is no such module; the message says how to name a file.
    """
    if importlib.util.find_spec(_top(name)) is None:
        file = Path(*name.split(".")).with_suffix(".py")
        hint = f"; for the file write {file}:Class" if file.is_file() else "; is its package installed?"
        raise ValueError(f"there is no module {name}{hint}")
    return _import(name, lambda: importlib.import_module(name))


def _load_file(given: str) -> ModuleType:
    """Import a file by its path.

    Raises:
        ValueError: there is no such file.
    """
    path = Path(given).expanduser()
    if not path.is_file():
        raise ValueError(f"there is no file {given}; the working directory is {Path.cwd()}")
    return _import(given, lambda: modules.import_file(path))


def _import(what: str, load: Callable[[], _Imported]) -> _Imported:
    """Call a function that imports another author's code.

    Raises:
        BrokenMethod: the code raised an exception, which is chained; the message has the exception and its place.
    """
    try:
        return load()
    except (Exception, SystemExit) as error:
        raise BrokenMethod(f"{what} cannot be imported: {type(error).__name__}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    if isinstance(error, SyntaxError):
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    ours = (__file__, modules.__file__)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if "importlib" not in frame.filename]
    if not frames:
        return one_line(error)
    reason = f"{one_line(error)} ({frames[-1].filename}, line {frames[-1].lineno})"
    if isinstance(error, ModuleNotFoundError) and Path(frames[-1].filename).with_name(f"{error.name}.py").is_file():
        reason += f"; for the file {error.name}.py beside it write: from .{error.name} import ..."
    return reason


def _class_at(address: re.Match[str], module: ModuleType) -> type["Compressor"]:
    if address["cls"] is None:
        return _method_of(module)
    if not hasattr(module, address["cls"]):
        hint = did_you_mean(address["cls"], (cls.__name__ for cls in _methods_in(module)))
        raise ValueError(f"{address['place']} has no class {address['cls']}.{hint}")
    return _checked(getattr(module, address["cls"]), address[0])


def _method_of(module: ModuleType) -> type["Compressor"]:
    """Return the class that is the method of a file.

    Raises:
        BrokenMethod: no class is, or more than one.
    """
    classes, stem = _methods_in(module), module.__name__.rpartition(".")[2]
    marked = [cls for cls in classes if _MARK in vars(cls)]
    found = marked or [cls for cls in classes if _plain(cls.__name__) == _plain(stem)]
    if len(found) == 1:
        return _checked(found[0], f"{module.__file__}")
    names = ", ".join(cls.__name__ for cls in found or classes)
    if not classes:
        raise BrokenMethod(
            f"{module.__file__} holds no method: define a subclass of vlmslim.Compressor, or let the name of the file "
            "start with an underscore if it holds helpers"
        )
    if marked:
        raise BrokenMethod(f"{module.__file__} marks several classes as its method ({names}): mark one")
    raise BrokenMethod(
        f"{module.__file__} does not say which class is its method ({names}): give one class the name of the file, "
        "or put @vlmslim.registry.the_method above it"
    )


def _methods_in(module: ModuleType) -> list[type["Compressor"]]:
    """Return the compressors that a module or a package defines, without those that it imports from elsewhere."""
    from vlmslim.compressor import Compressor

    found = [cls for cls in vars(module).values() if isinstance(cls, type) and issubclass(cls, Compressor)]
    return [cls for cls in dict.fromkeys(found) if f"{cls.__module__}.".startswith(f"{module.__name__}.")]


def _checked(cls: Any, where: str) -> type["Compressor"]:
    """Return the class if it is a method.

    Raises:
        BrokenMethod: it is none, or its options are only annotations, because `@dataclass` is missing.
    """
    from vlmslim.compressor import Compressor

    if not isinstance(cls, type) or not issubclass(cls, Compressor):
        raise BrokenMethod(f"{where} is no subclass of vlmslim.Compressor")
    options = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if options and "__dataclass_fields__" not in vars(cls):
        raise BrokenMethod(f"{where}: {cls.__name__} lists options ({', '.join(options)}); put @dataclass above it")
    return cls


def _class_of(method: "Compressor | type[Compressor]") -> type["Compressor"]:
    return method if isinstance(method, type) else type(method)


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).lower()


def _top(module: str) -> str:
    return module.partition(".")[0]
