"""Patches on disk: `vlmslim.json` says which methods with which options, `model.safetensors` holds the trained parts.

A folder that `Slim.save_pretrained` wrote goes wherever a method or a checkpoint does: `vlmslim.patch(model, DIR)`,
`vlmslim.from_pretrained(DIR)`, `weights=DIR` of a trained method, `pretrained=DIR` of the lmms-eval model.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vlmslim
from vlmslim import bundled
from vlmslim.compressor import Compressor
from vlmslim.io.files import atomically, write_atomically
from vlmslim.registry import method_names, name_of
from vlmslim.saving import backbone

if TYPE_CHECKING:
    from vlmslim.patching import Slim

CONFIG, WEIGHTS, BASE = "vlmslim.json", "model.safetensors", "base"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """A folder that `save` wrote.

    folder  : where it is
    methods : one dictionary a method: its name under "method", and its options
    base    : the checkpoint under it, as `backbone.describe` does, and whether it is included
    trained : names of the trained parts
    """

    folder: Path
    methods: list[dict]
    base: dict
    trained: list[str]
    sha256: str | None = None

    def stages(self, **options) -> list[dict]:
        """The methods as `vlmslim.patch` takes them, weights from this folder; `options` replace saved ones.

        Raises:
            ValueError: options for several methods at once.
        """
        if options and len(self.methods) != 1:
            raise ValueError(f"{self.folder} holds several methods; options {sorted(options)} could be of any of them")
        stages = [self._with_weights(stage) for stage in self.methods]
        return [stage | options for stage in stages]

    def _with_weights(self, stage: dict) -> dict:
        return stage | {"weights": str(self.folder)} if stage["method"] in self.trained else dict(stage)

    def method(self, name: str, **options) -> dict:
        """Another method for the same checkpoint; a trained one of this folder gets its weights from here."""
        return self._with_weights({"method": name}) | options

    @property
    def checkpoint(self) -> tuple[str, str | None]:
        """Where the base checkpoint is, and its commit on the hub.

        Raises:
            ValueError: it has no name, or was a local folder that is gone.
        """
        if self.base["included"]:
            return str(self.folder / BASE), None
        name = self.base["name"]
        if not name or (os.path.isabs(name) and not Path(name).is_dir()):
            what = f"was {name}, which is not here" if name else "had no name when it was saved"
            raise ValueError(f"{self.folder}: the base checkpoint {what}; say where it is with base=...")
        return bundled.resolve(name), self.base["commit"]

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """The weights of one trained part.

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


def read(name: str | os.PathLike, revision: str | None = None) -> Saved | None:
    """Read a saved patch: a folder, `bundled/NAME`, or a repository on the hub. None if it is something else.

    Raises:
        ValueError: it was written by a newer vlmslim, or is not readable.
    """
    folder = Path(bundled.resolve(str(name)))
    path = folder / CONFIG
    if not folder.exists():
        path = _from_hub(str(name), revision)
    if path is None or not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] > FORMAT:
            newer = data["versions"]["vlmslim"]
            raise ValueError(f"{path} was written by vlmslim {newer}; this is {vlmslim.__version__}")
        return Saved(path.parent, data["methods"], data["base"], data["trained"], data.get("sha256"))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no configuration of vlmslim: {error!r}") from error


def _from_hub(name: str, revision: str | None) -> Path | None:
    """The configuration of a repository on the hub with its weights beside it, if it has one; None offline, too."""
    from transformers.utils import cached_file

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    quiet = {"_raise_exceptions_for_" + k: False for k in ("gated_repo", "missing_entries", "connection_errors")}
    found = cached_file(name, CONFIG, revision=revision, **quiet)
    if found is not None:
        cached_file(name, WEIGHTS, revision=revision, **quiet)
    return None if found is None else Path(found)


def save(slim: "Slim", folder: str | os.PathLike, with_base: bool = False, processor=None) -> None:
    """Write a patch; see `Slim.save_pretrained`."""
    folder = Path(folder)
    methods = [_describe(whole, slim.trained.keys()) for whole in slim.methods]
    folder.mkdir(parents=True, exist_ok=True)
    if with_base:
        _save_base(slim, folder, processor)
    sealed = None
    if slim.trained:
        state = {k: v.detach().cpu().contiguous() for k, v in slim.trained.state_dict().items()}
        with atomically(folder / WEIGHTS) as part:
            save_file(state, part, {"format": "pt"})
            part.chmod(0o644)
        sealed = _sha256(folder / WEIGHTS)
    else:
        (folder / WEIGHTS).unlink(missing_ok=True)
    config = {
        "format": FORMAT,
        "versions": _versions(),
        "methods": methods,
        "trained": list(slim.trained),
        "sha256": sealed,
        "base": backbone.describe(slim.model, signed=bool(slim.trained)) | {"included": with_base},
    }
    text = json.dumps(config, indent=2, allow_nan=False) + "\n"
    write_atomically(folder / CONFIG, text)  # last: makes it complete


def load_part(weights: str, name: str, module: nn.Module, model: nn.Module) -> None:
    """Fill a trained part, move it to the model's device, and put it into evaluation mode.

    Args:
        weights: a folder that `Slim.save_pretrained` wrote, or `bundled/NAME`, or a repository on the hub; its values
            take the model's dtype. "random" or "random:SEED" initialises afresh in fp32, for training, with
            `reset_parameters` of every submodule and without touching the global generator.
        name: the method's.
        module: the part; it may be on the meta device.
        model: the model that it goes with.

    Raises:
        ValueError: no weights given, none there, or weights of another backbone or of other options.
    """
    if any(p.is_meta for p in module.parameters()):
        module.to_empty(device="cpu")
    kind, _, seed = weights.partition(":")
    if kind == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(seed or 0))
            for part in module.modules():
                if hasattr(part, "reset_parameters"):
                    part.reset_parameters()
    elif not weights:
        raise ValueError(
            f"{name} has to be trained: give weights=DIR, a folder that scripts/train_{name}.py made "
            "(weights='random' starts a training)"
        )
    else:
        saved = read(weights)
        if saved is None:
            raise ValueError(f"weights={weights!r}: there is no {CONFIG}; give a folder that save_pretrained wrote")
        backbone.check(f"{saved.folder} ({name})", saved.base, model)
        _fill(module, saved.tensors(name), saved.folder)
        module.to(model.dtype)
    device = next(model.model.language_model.parameters()).device
    module.to("cpu" if device.type == "meta" else device).eval()


def _fill(module: nn.Module, state: dict[str, torch.Tensor], folder: Path) -> None:
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) + [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(f"{folder}: the weights were made with other options of the method; {', '.join(wrong)} differ")
    module.load_state_dict(state)


def _describe(whole: Compressor, trained) -> dict:
    """A method's name and options, all of them, so that later defaults change nothing."""
    name = name_of(whole)
    if name not in method_names():
        raise ValueError(f"{type(whole).__name__} is in no file of vlmslim/methods: it has no name to load it by")
    options = {f.name: getattr(whole, f.name) for f in fields(whole) if f.init}
    if name in trained:
        options.pop("weights", None)
    try:
        json.dumps(options, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: the options {options} cannot be written as JSON: {error}") from error
    return {"method": name, **options}


def _save_base(slim: "Slim", folder: Path, processor) -> None:
    """The unpatched checkpoint and its processor as `folder/base`, replaced as a whole."""
    from transformers import AutoProcessor

    processor = processor or slim.processor
    if processor is None:
        try:
            processor = AutoProcessor.from_pretrained(slim.model.name_or_path)
        except (OSError, ValueError) as error:
            raise ValueError("the model does not know its processor: give processor=...") from error
    fresh, old = folder / f"{BASE}.tmp", folder / BASE
    shutil.rmtree(fresh, ignore_errors=True)
    slim.model.save_pretrained.save(fresh)
    processor.save_pretrained(fresh)
    shutil.rmtree(old, ignore_errors=True)
    fresh.replace(old)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"vlmslim": vlmslim.__version__, **{name: version(name) for name in ("torch", "transformers")}}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def from_pretrained(
    name: str | os.PathLike,
    method: str | None = None,
    *,
    base: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options,
) -> "Slim":
    """Load a checkpoint and patch it, in one call.

    Args:
        name: a folder or repository that `Slim.save_pretrained` wrote, or `bundled/NAME`, or any LLaVA checkpoint.
        method: which method; by default the saved one, and none for a plain checkpoint.
        base: the checkpoint to load under a saved patch, if it is not where it was.
        dtype: of the model, as transformers takes it.
        device_map: as transformers takes it; without one the model is on the CPU.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...
        revision: branch, tag or commit of `name` on the hub.
        trust_remote_code: let a checkpoint from the hub bring its own code.
        **options: of the method; they replace saved ones.

    Returns:
        The patch, with `model` and `processor`.

    Raises:
        ValueError: weights of another backbone, a base that is not there, or an unknown method or option.
        OSError: no such checkpoint.
    """
    from transformers import AutoModelForImageTextToText, AutoProcessor

    checkpoint, revision, stages = located(name, method, base, revision, options)
    hub = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    processor = AutoProcessor.from_pretrained(checkpoint, **hub)
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=dtype, device_map=device_map, attn_implementation=attn_implementation, **hub
    )
    slim = vlmslim.patch(model.eval(), stages)
    slim.processor = processor
    return slim


def located(
    name: str | os.PathLike | None, method: str | list | None, base: str | None, revision: str | None, options: dict
) -> tuple[str, str | None, list]:
    """Where the checkpoint is, its revision, and the stages to patch it with.

    Arguments are those of `from_pretrained`; `method` may be a list of stages, and there is no `name` when the model is
    already loaded.
    """
    saved = None if name is None else read(name, revision)
    given = method if isinstance(method, list) else None
    if given is not None and options:
        raise ValueError(f"options belong into the stages: {', '.join(options)}")
    if saved is None:
        if base is not None:
            raise ValueError(f"base={base!r} goes with a saved patch; {name} is none")
        stages = given if given is not None else [{"method": method or "none"} | options]
        return bundled.resolve(str(name)), revision, stages
    if given is not None:
        stages = given
    else:
        stages = saved.stages(**options) if method is None else [saved.method(method, **options)]
    checkpoint, commit = (bundled.resolve(base), None) if base else saved.checkpoint
    return checkpoint, commit, stages
