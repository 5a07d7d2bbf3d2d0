"""The class that the name of a method stands for.

Wherever vlmslim takes the name of a method, the name is one of these:

    divprune                  a file of `vlmslim/methods`, or an entry point "vlmslim.methods" of an installed package
    path/to/norm.py:Norm      a class in a file
    my_package.norm:Norm      a class in a module that Python can import

`:Norm` may be left out if the file says which of its classes is the method: the class with the name of the file, up to
case and underscores, or else the class under `@the_method`. A file whose name starts with an underscore holds helpers.
"""

import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

from vlmslim import methods
from vlmslim.io import modules
from vlmslim.io.messages import did_you_mean, one_line

if TYPE_CHECKING:  # names alone need no torch
    from vlmslim.compressor import Compressor

GROUP = "vlmslim.methods"  # of entry points; also the package with the built-in methods

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


def method_names() -> tuple[str, ...]:
    """Return the names of all built-in and installed methods, sorted. Nothing is imported."""
    return tuple(sorted({*built_in_names(), *(point.name for point in installed_methods())}))


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
    points = [point for point in installed_methods() if point.name == name]
    if len(points) + (name in built_in_names()) > 1:
        raise BrokenMethod(_clash(name, points))
    if points:
        return _installed_class(points[0])
    if name in built_in_names():
        return _method_of(_import(f"the method {name}", lambda: importlib.import_module(f"{GROUP}.{name}")))
    if address := _FILE.fullmatch(name):
        return _class_at(address, _load_file(address["place"]))
    if address := _MODULE.fullmatch(name):
        return _class_at(address, _load_module(address["place"]))
    known, file = method_names(), re.split(r"\.py|:", name)[0] + ".py"
    hint = f" For the file write {file}:Class." if os.path.isfile(file) else did_you_mean(name, known)
    raise ValueError(f"unknown method {name!r}.{hint} Known: {', '.join(known)}")


def built_in_names() -> list[str]:
    """Return the names of the files of `vlmslim/methods` that hold a method."""
    return [module.name for module in pkgutil.iter_modules(methods.__path__) if not module.name.startswith("_")]


def installed_methods() -> tuple[EntryPoint, ...]:
    """Return the entry points of methods in installed packages."""
    return _entry_points(tuple(sys.path))


@lru_cache
def _entry_points(path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    """Read the entry points of all packages on a path: 5 ms, and solving a budget makes thousands of methods."""
    return tuple(entry_points(group=GROUP))


def package_of(point: EntryPoint) -> str:
    """Return the name of the package that brings an entry point."""
    return point.dist.name if point.dist else top_package(point.module)


def _installed_class(point: EntryPoint) -> type["Compressor"]:
    what = f"the method {point.name} of the package {package_of(point)}"
    found = _import(what, point.load)
    return _method_of(found) if isinstance(found, ModuleType) else _checked(found, what)


def _clash(name: str, points: Sequence[EntryPoint]) -> str:
    built_in = [f"vlmslim itself ({GROUP}.{name})"] if name in built_in_names() else []
    claims = [f"the package {package_of(point)} ({point.value})" for point in points]
    return (
        f"several methods have the name {name}, of {' and of '.join(built_in + claims)}: rename the entry point, "
        "or ask for one of the methods by the text in brackets"
    )


def _load_module(name: str) -> ModuleType:
    """Import a module by its name.

    Raises:
        ValueError: there is no such module; the message says how to name a file.
    """
    if importlib.util.find_spec(top_package(name)) is None:
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
    except (Exception, SystemExit) as error:  # another author's code may raise anything; Ctrl-C passes
        raise BrokenMethod(f"{what} cannot be imported: {type(error).__name__}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    """Return the message of an exception and the place in the author's code, without the frames of Python itself."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.msg} ({error.filename}, line {error.lineno})"
    ours, python = (__file__, modules.__file__), Path(inspect.__file__).parent
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename not in ours]
    frames = [frame for frame in frames if "importlib" not in frame.filename and Path(frame.filename).parent != python]
    if not frames:
        return one_line(error)
    hint = _import_hint(error, Path(frames[-1].filename)) if isinstance(error, ImportError) else ""
    return f"{one_line(error)} ({frames[-1].filename}, line {frames[-1].lineno}){hint}"


def _import_hint(error: ImportError, file: Path) -> str:
    """Return how a file imports what lies beside it or in its package; nothing if the import is of something else."""
    folder, name, root = file.parent, top_package(error.name or ""), modules.import_root(file)
    if name and ((folder / f"{name}.py").is_file() or (folder / name).is_dir()):
        return f"; for {name} beside the file write: from .{name} import ..."
    inside = file.relative_to(root).with_suffix("").parts
    if len(inside) > 1 and name in ("", inside[0]):
        return f"; to import from its package ask for {'.'.join(inside)}:Class, with {root} on PYTHONPATH"
    return ""


def _class_at(address: re.Match[str], module: ModuleType) -> type["Compressor"]:
    if address["cls"] is None:
        return _method_of(module)
    if not hasattr(module, address["cls"]):
        names = [cls.__name__ for cls in _methods_in(module)]
        raise ValueError(
            f"{address['place']} has no class {address['cls']}.{did_you_mean(address['cls'], names)} Its methods: "
            f"{', '.join(names) or 'none'}; options are written name=value"
        )
    return _checked(getattr(module, address["cls"]), address[0])


def _method_of(module: ModuleType) -> type["Compressor"]:
    """Return the class that is the method of a file.

    Raises:
        BrokenMethod: no class is, or more than one.
    """
    classes, stem = _methods_in(module), module.__name__.rpartition(".")[2]
    marked = [cls for cls in classes if _MARK in vars(cls)]
    found = marked or [cls for cls in classes if bare_name(cls.__name__) == bare_name(stem)]
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
        BrokenMethod: it is none, or its options are no fields of a dataclass.
    """
    from vlmslim.compressor import Compressor

    if not isinstance(cls, type) or not issubclass(cls, Compressor):
        raise BrokenMethod(f"{where} is no subclass of vlmslim.Compressor")
    options = [name for name, kind in inspect.get_annotations(cls).items() if "ClassVar" not in str(kind)]
    if options and "__dataclass_fields__" not in vars(cls):
        raise BrokenMethod(f"{where}: {cls.__name__} lists options ({', '.join(options)}); put @dataclass above it")
    known = {field.name for field in fields(cls) if field.init}
    taken = set(inspect.signature(cls.__init__).parameters) - {"self"}
    if not known <= taken <= set(cls.__dataclass_fields__):
        raise BrokenMethod(
            f"{where}: {cls.__name__} has its own __init__; write the options as annotated fields under @dataclass, "
            "and what they need in __post_init__"
        )
    if "method" in known:
        raise BrokenMethod(f"{where}: rename the option method of {cls.__name__}; the word stands for a method's name")
    return cls


def class_of(method: "Compressor | type[Compressor]") -> type["Compressor"]:
    """Return the class of a method; a class as it is."""
    return method if isinstance(method, type) else type(method)


def bare_name(name: str) -> str:
    """Return a name without case, underscores and other signs, so that `n_or_m` is `NorM`."""
    return re.sub(r"[\W_]", "", name).lower()


def top_package(module: str) -> str:
    """Return the first part of a module's dotted name."""
    return module.partition(".")[0]
