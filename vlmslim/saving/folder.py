"""Patches on disk: `vlmslim.json` names the methods and their options, `model.safetensors` holds the trained parts.

A folder that `Slim.save_pretrained` wrote may stand wherever a method or a checkpoint is named: `vlmslim.patch(model,
DIR)`, `vlmslim.from_pretrained(DIR)`, `weights=DIR` of a trained method, `pretrained=DIR` of the lmms-eval model.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vlmslim
from vlmslim import bundled
from vlmslim.compressor import Compressor
from vlmslim.io.files import atomically, write_atomically
from vlmslim.registry import address_of, file_of, method_class, method_names, name_of, options_of
from vlmslim.saving import backbone

CONFIG, WEIGHTS, BASE = "vlmslim.json", "model.safetensors", "base"
FORMAT = 1

Stage = dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """A folder that `save` wrote.

    folder   : where it is
    methods  : a dictionary for each method: its name under "method", and its options
    base     : the checkpoint under the patch, as `backbone.describe` returns it, and whether the folder includes it
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
        """Where the checkpoint under the patch is, and its commit on the hub.

        Raises:
            ValueError: the checkpoint has no name, or was a local folder that is gone.
        """
        if self.base["included"]:
            return str(self.folder / BASE), None
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
        path = self.folder / WEIGHTS
        if not path.is_file() or _sha256(path) != self.sha256:
            raise ValueError(f"{path} is missing or not the file that {CONFIG} beside it was saved with")
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in load_file(path).items() if k.startswith(prefix)}


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
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            newer = data["versions"]["vlmslim"]
            raise ValueError(f"{path} was written by vlmslim {newer}; this is {vlmslim.__version__}")
        return Saved(path.parent, data["methods"], data["base"], data["trained"], data.get("sha256"), from_hub)
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of vlmslim: {error!r}") from error


def _from_hub(name: str, revision: str | None) -> Path | None:
    """Fetch the configuration of a repository on the hub, and its weights; None if it has none, or offline."""
    from transformers.utils import cached_file

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    quiet = {"_raise_exceptions_for_" + k: False for k in ("gated_repo", "missing_entries", "connection_errors")}
    found = cached_file(name, CONFIG, revision=revision, **quiet)
    if found is None:
        return None
    cached_file(name, WEIGHTS, revision=revision, **quiet)
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
    folder.mkdir(parents=True, exist_ok=True)
    if with_base:
        _save_base(model, folder, processor)
    sha256 = None
    if trained:
        state = {k: v.detach().cpu().contiguous() for k, v in trained.state_dict().items()}
        with atomically(folder / WEIGHTS) as part:
            save_file(state, part, {"format": "pt"})
            part.chmod(0o644)
        sha256 = _sha256(folder / WEIGHTS)
    else:
        (folder / WEIGHTS).unlink(missing_ok=True)
    config = {
        "format": FORMAT,
        "versions": {"vlmslim": vlmslim.__version__, **{name: version(name) for name in ("torch", "transformers")}},
        "methods": described,
        "trained": list(trained),
        "sha256": sha256,
        "base": backbone.describe(model, signed=bool(trained)) | {"included": with_base},
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG, text)  # last, because it makes the folder complete


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


def _save_base(model: Any, folder: Path, processor: Any) -> None:
    """Write the unpatched checkpoint and its processor as `folder/base`, replaced as a whole."""
    from transformers import AutoProcessor

    if processor is None:
        try:
            processor = AutoProcessor.from_pretrained(model.name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError("the model does not know its processor: give processor=...") from error
    fresh, old = folder / f"{BASE}.tmp", folder / BASE
    shutil.rmtree(fresh, ignore_errors=True)
    type(model).save_pretrained(model, fresh)  # the instance's own warns that the patch is not saved
    processor.save_pretrained(fresh)
    shutil.rmtree(old, ignore_errors=True)
    fresh.replace(old)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
