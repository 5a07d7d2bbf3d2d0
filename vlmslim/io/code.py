"""Hashes of a method's code, so that results of an edited method are not mixed with older ones."""

import ast
import hashlib
import inspect
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import vlmslim
from vlmslim.compressor import Compressor
from vlmslim.io.modules import import_root

_PACKAGE = Path(vlmslim.__file__).resolve().parent
#: What every evaluation runs, whatever its method.
_ENGINE = (
    "compressor.py",
    "image_tokens.py",
    "layer_input.py",
    "options/common.py",
    "patching.py",
    "engine/**/*.py",
)
#: Folders of installed packages.
_LIBRARIES = {"site-packages", "dist-packages"}
#: Imports are followed into these rooms of the package. Its other rooms do not compute tokens.
_FOLLOWED = ("ops", "methods")


class SourceError(ValueError):
    """A class without a source file, so that a later change of its code could not be noticed."""


def code_hash(classes: Iterable[type]) -> dict[str, str]:
    """Hash the code that decides what methods do, file by file.

    The files are those that define the classes and their bases; what these import from the methods and the tensor
    operations of this package, from beside an author's own file or from folders on PYTHONPATH; and the engine.
    Comments, docstrings and formatting do not count, because the hash is of the syntax tree.

    Args:
        classes: classes of methods.

    Returns:
        A hash for the name of each file. Two files of one name share a hash.

    Raises:
        SourceError: a class has no source file.
    """
    found: dict[str, str] = {}
    for source in _sources(classes):
        found[source.name] = _sha256((found.get(source.name, "") + source.contents.hash).encode())
    return found


def outside_files(classes: Iterable[type]) -> dict[str, Path]:
    """Return the files of `code_hash` that do not belong to this package, by their names.

    Raises:
        SourceError: a class has no source file.
    """
    return {source.name: source.file for source in _sources(classes) if source.is_outside}


@dataclass(frozen=True)
class _Contents:
    """The part of a file that counts: a hash, and the names of the modules that it may import, split at their dots."""

    hash: str
    imports: frozenset[tuple[str, ...]] = frozenset()


@dataclass(frozen=True)
class _Source:
    """A file of code, and the folder in which Python looks up its import name."""

    file: Path
    root: Path

    @property
    def name(self) -> str:
        """The path that messages show: `vlmslim/methods/fastv.py`, or `norm.py`."""
        return self.file.relative_to(self.root).as_posix()

    @property
    def is_outside(self) -> bool:
        """True if the file belongs to another author."""
        return not self.file.is_relative_to(_PACKAGE)

    @property
    def contents(self) -> _Contents:
        """The part of the file that counts, read again only after the file was written again."""
        stat = self.file.stat()
        return _read(self.file, self.file.relative_to(self.root).parent.parts, stat.st_size, stat.st_mtime_ns)

    def imported(self) -> Iterator["_Source"]:
        """Yield the files that this file imports, if they compute tokens and no installed package brings them."""
        for names in self.contents.imports:
            root: Path | None
            if names[0] == _PACKAGE.name:
                root = _PACKAGE.parent if names[1:2] and names[1] in _FOLLOWED else None
            elif self._has_neighbour(names[0]):
                root = self.root
            else:
                root = _own_folder(names[0], tuple(sys.path)) if self.is_outside else None
            if root is not None:
                place = root.joinpath(*names)
                files = (place.with_name(f"{names[-1]}.py"), place / "__init__.py")
                yield from (_Source(file, root) for file in files if file.is_file())

    def _has_neighbour(self, name: str) -> bool:
        """Tell whether a module of this top-level name comes from the same author.

        A file in a package may import from its package, a file by itself from its folder. A file by itself among the
        installed packages has no neighbours, because those have other authors.
        """
        first, *rest = self.file.relative_to(self.root).parts
        if rest:
            return name == first
        beside = (self.root / name, self.root / f"{name}.py")
        return self.root.name not in _LIBRARIES and any(path.exists() for path in beside)


@lru_cache(maxsize=1024)
def _own_folder(name: str, path: tuple[str, ...]) -> Path | None:
    """Return the folder, such as one on PYTHONPATH, of a top-level module that is not among the installed packages.

    `path` is `sys.path`, because another one finds other modules.
    """
    spec = None if name in sys.stdlib_module_names else find_spec(name)
    place = spec and (next(iter(spec.submodule_search_locations or ()), None) or spec.origin)
    return Path(place).resolve().parent if place and not _LIBRARIES & {*Path(place).parts} else None


def _sources(classes: Iterable[type]) -> list[_Source]:
    """Find all files that count, sorted by their path."""
    engine = [_Source(file, _PACKAGE.parent) for pattern in _ENGINE for file in _PACKAGE.glob(pattern)]
    methods = {base for cls in classes for base in cls.__mro__ if issubclass(base, Compressor)}
    waiting = [*engine, *map(_source_of, methods)]
    found: set[_Source] = set()
    while waiting:
        source = waiting.pop()
        if source not in found:
            found.add(source)
            waiting += source.imported()
    return sorted(found, key=lambda source: source.file)


def _source_of(cls: type) -> _Source:
    """Find the file of a class."""
    try:
        file = Path(inspect.getfile(cls)).resolve()
    except (OSError, TypeError):
        file = Path()
    if not file.is_file():
        raise SourceError(
            f"{cls.__name__} (module {cls.__module__}) has no source file, so a later change of its code could not be "
            "noticed; put the class into a file of its own"
        )
    return _Source(file, import_root(file))


@lru_cache(maxsize=1024)
def _read(file: Path, folder: tuple[str, ...], size: int, written: int) -> _Contents:
    """Read what counts of a file in a package `folder`: the syntax tree of Python text, else the bytes."""
    if file.suffix != ".py":  # a compiled module
        return _Contents(_sha256(file.read_bytes()))
    tree = ast.parse(file.read_bytes(), str(file))
    return _Contents(_sha256(repr(_plain(tree)).encode()), frozenset(imports_of(tree, folder)))


def _plain(node: object) -> object:
    """Turn a syntax tree into nested lists without positions and docstrings.

    Unlike `ast.dump`, this leaves out empty fields, because newer Pythons add some.
    """
    if isinstance(node, list):
        return [_plain(part) for part in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        fields["body"] = node.body[ast.get_docstring(node, clean=False) is not None :]
    return [type(node).__name__, *((name, _plain(value)) for name, value in fields.items() if value not in (None, []))]


def imports_of(tree: ast.Module, folder: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """Yield the names of all modules that a file in a package `folder` may import, in functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = folder[: len(folder) - node.level + 1] if node.level else ()
            module = (*package, *(node.module.split(".") if node.module else ()))
            if module:
                yield module
            yield from ((*module, alias.name) for alias in node.names)


def _sha256(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
