"""Python files imported by their path."""

import hashlib
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

_FOLDER = "vlmslim_folder_"  # + a hash: the package that stands for the folder of a file
_digests: dict[str, str] = {}  # of the files of the modules in such packages


def import_file(path: Path) -> ModuleType:
    """Import a file as a module of a package that stands for its folder.

    So `from ._helpers import f` finds the file beside it, and equal names in two folders do not meet. A file is run
    once. After an edit of the file, or of a file beside it that is in use, all modules of the folder are imported anew.
    """
    path = path.resolve()
    folder, stem = (path.parent.parent, path.parent.name) if path.stem == "__init__" else (path.parent, path.stem)
    package = _FOLDER + hashlib.sha256(os.fsencode(folder)).hexdigest()[:12]
    name = f"{package}.{stem.replace('.', '_')}"
    members = _members(package)
    if any(_digests.get(member) != _digest(member) for member in members):
        for member in members:
            del sys.modules[member]
    if name not in sys.modules:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = [str(folder)]
        try:
            _execute(name, path)
        finally:
            _digests.update({member: _digest(member) for member in _members(package)})
    return sys.modules[name]


def import_root(file: Path) -> Path:
    """Return the folder in which Python looks up the import name of a file: the first above it that is no package."""
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    return root


def imported_file(module: str) -> str | None:
    """Return the path of a module that `import_file` made; None for any other module."""
    return getattr(sys.modules.get(module), "__file__", None) if module.startswith(_FOLDER) else None


def _members(package: str) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] == package]


def _digest(module: str) -> str:
    file = getattr(sys.modules[module], "__file__", None)
    return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""


def _execute(name: str, path: Path) -> None:
    inside = [str(path.parent)] if path.stem == "__init__" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=inside)
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    writes = sys.dont_write_bytecode
    # No byte code, because Python would trust it after an edit within one second that leaves the size as it was.
    sys.dont_write_bytecode = True
    importlib.invalidate_caches()
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.dont_write_bytecode = writes
