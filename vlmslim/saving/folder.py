"""Patches on disk: `vlmslim.json` names the methods and their options, `vlmslim-HASH.safetensors` holds trained parts.

A folder that `Slim.save_pretrained` wrote may stand wherever a method or a checkpoint is named: `vlmslim.patch(model,
DIR)`, `vlmslim.from_pretrained(DIR)`, `weights=DIR` of a trained method, `pretrained=DIR` of the lmms-eval model.

Saving is one commit. New files take names that nothing else uses; then `vlmslim.json`, which names them, replaces the
old one; then the files that only the old one named are deleted. So a crash leaves the old patch or the new one, and
no file of the user is touched.
"""

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

import vlmslim
from vlmslim import bundled
from vlmslim.compressor import Compressor
from vlmslim.io import hub
from vlmslim.io.files import atomically, check_writable, write_atomically
from vlmslim.registry import address_of, file_of, method_class, method_names, name_of, options_of
from vlmslim.saving import backbone
from vlmslim.saving.schema import BASE, FORMAT, HERE, Configuration, parse

CONFIG = "vlmslim.json"

Stage = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A folder that `save` wrote.

    folder   : where it is
    methods  : a dictionary for each method: its name under "method", and its options
    base     : the checkpoint under the patch, as `backbone.describe` returns it, and the copy of it in the folder
    trained  : names of the trained parts
    sha256   : hash of the file with the trained parts; None without any
    from_hub : whether the folder is a copy of a repository on the hub, whose author names no code to run
    """

    folder: Path
    methods: list[Stage]
    base: dict[str, Any]
    trained: list[str]
    sha256: str | None = None
    from_hub: bool = False

    def stages(self, **options: Any) -> list[Stage]:
        """Return the methods for `vlmslim.patch`, with weights from this folder. `options` replace saved ones.

        Raises:
            ValueError: options for several methods at once, or a method that is gone.
        """
        if options and len(self.methods) != 1:
            raise ValueError(f"{self.folder} holds several methods; options {sorted(options)} could be of any of them")
        return [self.method(**self._found(stage)) | options for stage in self.methods]

    def method(self, method: str, **options: Any) -> Stage:
        """Return any method for `vlmslim.patch`; if this folder has its trained part, with weights from here."""
        weights = {"weights": str(self.folder)} if self.holds(method) else {}
        return {"method": method} | weights | options

    def holds(self, method: str) -> bool:
        """Tell whether this folder has the trained part of a method."""
        return bool(self.trained) and name_of(method_class(method)) in self.trained

    def _found(self, stage: Stage) -> Stage:
        """Return a saved method with the path of its file, if it is in a file, seen from here."""
        name = stage["method"]
        if name in method_names():
            return stage
        if self.from_hub:
            raise ValueError(
                f"{self.folder}: the method {name} is not installed, and code that a repository on the hub names is "
                "not run; look at its files, copy them, and give the folder of the copy"
            )
        if file := file_of(name):
            place = self.folder / file  # which leaves an absolute path as it is
            if not place.is_file():
                raise ValueError(
                    f"{self.folder}: the file {place} of its method is gone; put it back, or correct its path in "
                    f"{self.folder / CONFIG}"
                )
            name = f"{place}{name.removeprefix(file)}"
        try:
            method_class(name)
        except ValueError as error:
            raise ValueError(f"{self.folder}: {error}") from error
        return stage | {"method": name}

    @property
    def checkpoint(self) -> tuple[str, str | None]:
        """The place of the checkpoint under the patch, and its commit on the hub.

        Raises:
            ValueError: the checkpoint has no name, or was a local folder that is gone.
        """
        if self.base["included"]:
            return str(self.folder / self.base["folder"]), None
        name = self.base["name"]
        if not name or (os.path.isabs(name) and not Path(name).is_dir()):
            what = f"was {name}, which is not here" if name else "had no name when it was saved"
            raise ValueError(f"{self.folder}: the base checkpoint {what}; say where it is with base=...")
        return bundled.resolve(name), self.base["commit"]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return the weights of a trained part.

        Raises:
            ValueError: there are none of that name, or the file is not the one that was saved.
        """
        if name not in self.trained:
            there = ", ".join(self.trained) or "nothing"
            raise ValueError(f"{self.folder} has no weights of {name!r}, only of {there}")
        path = self.folder / weights_file(self.sha256 or "")
        if not path.is_file() or _sha256(path) != self.sha256:
            raise ValueError(f"{path} is missing or not the file that {CONFIG} beside it was saved with")
        try:
            state = safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} holds no tensors: {error}") from error
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def weights_file(sha256: str) -> str:
    """Return the name of the file with trained parts. It contains the hash, so no checkpoint has such a file."""
    return f"vlmslim-{sha256[:16]}.safetensors"


def read(name: str | os.PathLike[str], revision: str | None = None) -> Saved | None:
    """Read a saved patch: a folder, `bundled/NAME`, or a repository on the hub. Return None for anything else.

    Raises:
        ValueError: a newer vlmslim wrote it, or it cannot be read.
    """
    folder = Path(bundled.resolve(os.fspath(name)))
    from_hub = not folder.exists()
    path = _from_hub(os.fspath(name), revision) if from_hub else folder / CONFIG
    if path is None or not path.is_file():
        return None
    data = _configuration(path)
    base = data.base.model_dump()
    if base["name"] == HERE:
        base["name"] = str(path.parent)
    stages = [stage.model_dump() for stage in data.methods]
    return Saved(path.parent, stages, base, data.trained, data.sha256, from_hub)


def _configuration(path: Path) -> Configuration:
    try:
        return parse(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def _from_hub(name: str, revision: str | None) -> Path | None:
    """Fetch the configuration of a repository on the hub, and its weights; None if it has none, or offline."""
    from transformers.utils import cached_file

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    quiet = {"_raise_exceptions_for_" + k: False for k in ("gated_repo", "missing_entries", "connection_errors")}
    quiet |= hub.how_to_ask()
    found = cached_file(name, CONFIG, revision=revision, **quiet)
    if found is None:
        return None
    if sha256 := _configuration(Path(found)).sha256:
        cached_file(name, weights_file(sha256), revision=revision, **quiet)
    return Path(found)


def save(
    folder: str | os.PathLike[str],
    model: nn.Module,
    methods: Sequence[Compressor],
    trained: nn.ModuleDict,
    *,
    with_base: bool = False,
    processor: Any = None,
) -> None:
    """Write a patch; see `Slim.save_pretrained`."""
    folder = Path(folder)
    described = [_describe(method, trained.keys(), folder) for method in methods]
    old = _configuration(folder / CONFIG) if os.path.lexists(folder / CONFIG) else None
    check_writable(folder)
    base = backbone.describe(model, signed=bool(trained))
    if base["name"] == str(folder.resolve()):
        base["name"] = HERE
    sha256 = _save_weights(folder, trained, old) if trained else None
    copy = _save_base(model, folder, processor) if with_base else {"included": False}
    config = {
        "format": FORMAT,
        "versions": {"vlmslim": vlmslim.__version__, **{name: version(name) for name in ("torch", "transformers")}},
        "methods": described,
        "trained": list(trained),
        "sha256": sha256,
        "base": base | copy,
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG, text)
    if old is not None:
        _delete(folder, old, sha256)


def _save_weights(folder: Path, trained: nn.ModuleDict, old: Configuration | None) -> str:
    """Write the trained parts under their hash, and return it.

    Raises:
        ValueError: a file of that name is there, but no patch in this folder wrote it.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in trained.state_dict().items()}
    data = safetensors.torch.save(state, {"format": "pt"})
    sha256 = hashlib.sha256(data).hexdigest()
    path = folder / weights_file(sha256)
    if os.path.lexists(path):
        if path.is_file() and _sha256(path) == sha256:
            return sha256
        if old is None or old.sha256 != sha256:
            raise ValueError(f"{path} is there, and {CONFIG} does not name it: move it away, or give another folder")
    with atomically(path) as part:
        part.write_bytes(data)
    return sha256


def _delete(folder: Path, old: Configuration, kept: str | None) -> None:
    """Delete the files that only the replaced configuration named, and no others."""
    if old.sha256 and old.sha256 != kept:
        (folder / weights_file(old.sha256)).unlink(missing_ok=True)
    if old.base.included:
        copy = folder / old.base.folder
        for name in old.base.files:
            (copy / name).unlink(missing_ok=True)
        folders = [path for path in copy.rglob("*") if path.is_dir() and not path.is_symlink()]
        for path in sorted([copy, *folders], reverse=True):  # the innermost first
            with suppress(OSError):  # it holds files of the user, which stay
                path.rmdir()


def _describe(method: Compressor, trained: Collection[str], folder: Path) -> Stage:
    """Return a method's name and all its options, because a later vlmslim may have other defaults."""
    name = address_of(method)
    if (file := file_of(name)) and Path(file).is_relative_to(folder.resolve()):  # it moves with the folder
        name = f"{Path(file).relative_to(folder.resolve())}{name.removeprefix(file)}"
    options = {option: getattr(method, option) for option in options_of(method)}
    if name_of(method) in trained:
        options.pop("weights", None)
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: the options {options} cannot be written as JSON: {error}") from error
    return {"method": name, **options}


def _save_base(model: Any, folder: Path, processor: Any) -> dict[str, Any]:
    """Write the unpatched checkpoint and its processor into a new folder; return what `schema.Base` records of it."""
    from vlmslim.loading import Located, load_processor  # which imports this file

    if processor is None:
        try:
            processor = load_processor(Located(model.name_or_path, None, []))
        except (OSError, ValueError) as error:
            raise ValueError("the model does not know its processor: give processor=...") from error
    name = f"{BASE}-{secrets.token_hex(8)}" if os.path.lexists(folder / BASE) else BASE
    with tempfile.TemporaryDirectory(prefix=f".{BASE}.", suffix=".part", dir=folder) as part:
        fresh = Path(part) / BASE  # because the temporary folder itself is readable by its owner only
        # The instance's own warns that the patch is not saved. `save_original_format` would write back the names under
        # which a checkpoint was loaded, which need not be those of transformers.
        type(model).save_pretrained(model, fresh, save_original_format=False)
        processor.save_pretrained(fresh)
        files = sorted(path.relative_to(fresh).as_posix() for path in fresh.rglob("*") if path.is_file())
        fresh.rename(folder / name)
    return {"included": True, "folder": name, "files": files}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
