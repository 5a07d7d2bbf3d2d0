"""Checkpoints by name: find one, refuse what cannot be loaded, load it.

Checkpoints in the format of LLaVA's authors are loaded without conversion; `vlmslim.originals` knows how.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmslim import bundled
from vlmslim.io import hub
from vlmslim.io.messages import did_you_mean, one_line
from vlmslim.originals import checkpoint as originals
from vlmslim.originals import weights
from vlmslim.originals.processor import processor_of, tokenizer_of
from vlmslim.patching import Slim, patch
from vlmslim.registry import Spec, build
from vlmslim.saving.folder import CONFIG, read

Name = str | os.PathLike[str]

#: What a folder without a model may hold, by a file in it.
_NO_MODELS = {
    "adapter_config.json": "the adapters of a LoRA, which go with a model, and no model",
    "mm_projector.bin": "a projector alone, which goes with a language model, and no model",
}


@dataclass(frozen=True)
class Located:
    """The place of a checkpoint, and the methods that its name brings.

    checkpoint : a folder, or the id of a repository on the hub
    revision   : branch, tag or commit of the repository; None for its main branch
    stages     : methods for `vlmslim.patch`
    """

    checkpoint: str
    revision: str | None
    stages: list[Spec]


def from_pretrained(
    name: Name,
    method: str | None = None,
    *,
    base: str | None = None,
    dtype: str | torch.dtype = "auto",
    device_map: str | dict[str, Any] | None = None,
    attn_implementation: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    record: str | None = None,
    **options: Any,
) -> Slim:
    """Load a checkpoint and patch it, in one call.

    Args:
        name: what `Slim.save_pretrained` wrote (a folder or a repository), `bundled/NAME`, or any LLaVA checkpoint, in
            the form of transformers or in that of LLaVA's authors.
        method: which method. The default is the saved method, or none for a checkpoint without a saved patch.
        base: where the checkpoint under a saved patch is now, if it has moved.
        dtype: of the model, as transformers takes it.
        device_map: as transformers takes it. The default is the CPU.
        attn_implementation: "eager", "sdpa", "flash_attention_2", ...
        revision: branch, tag or commit of `name` on the hub.
        trust_remote_code: let a checkpoint from the hub run its own code.
        record: "tokens" keeps what `Slim.picture` needs, as for `patch`.
        **options: of the method. They replace saved options.

    Returns:
        The patch, with `model` and `processor`.

    Raises:
        ValueError: weights of another backbone, a base that is not there, or an unknown method or option.
        OSError: there is no such checkpoint.
    """
    place = located(name, method, base=base, revision=revision, options=options)
    methods = [build(stage) for stage in place.stages]  # before the checkpoint, because that may take minutes to load
    model, processor = load(
        place, dtype=dtype, device_map=device_map, attention=attn_implementation, trust_remote_code=trust_remote_code
    )
    slim = patch(model, methods, record=record)
    slim.processor = processor
    return slim


def located(
    name: Name,
    method: str | list[Spec] | None = None,
    *,
    base: str | None = None,
    revision: str | None = None,
    options: dict[str, Any] | None = None,
) -> Located:
    """Find a checkpoint, and the methods to patch it with, without loading either.

    Args:
        name: as for `from_pretrained`.
        method: a method's name, or a list of stages. The default is the saved method, or none.
        base: where the checkpoint under a saved patch is now.
        revision: branch, tag or commit of `name` on the hub.
        options: of the method. They replace saved options.

    Raises:
        ValueError: `base` without a saved patch, options beside a list of stages, or a base that is gone.
    """
    saved = read(name, revision)
    if saved is None:
        if base is not None:
            raise ValueError(f"base={base!r} goes with a saved patch, and {name} is none")
        return Located(bundled.resolve(os.fspath(name)), revision, stages_of(method or "none", options))
    if method is None:
        stages: list[Spec] = [*saved.stages(**options or {})]
    elif isinstance(method, str):
        stages = [saved.method(method, **options or {})]
    else:
        stages = stages_of(method, options)
    checkpoint, commit = (bundled.resolve(base), None) if base else saved.checkpoint
    return Located(checkpoint, commit, stages)


def stages_of(method: str | list[Spec], options: dict[str, Any] | None = None) -> list[Spec]:
    """Return a method's name and its options, or a list of stages, as a list of stages.

    Raises:
        ValueError: options beside a list of stages.
    """
    if isinstance(method, str):
        return [{"method": method} | (options or {})]
    if options:
        raise ValueError(f"options belong into the stages: {', '.join(options)}")
    return method


def load(
    where: Name | Located,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Load a checkpoint and its processor, without a patch.

    Args:
        where: a name as for `from_pretrained`; of a saved patch, the checkpoint under it is loaded.
        dtype: a dtype or its name; "auto" for that of the checkpoint.
        device: where the model goes. The default is the CPU.
        device_map: as transformers takes it, instead of `device`, for a model larger than one device.
        attention: "eager", "sdpa", "flash_attention_2", ... The default is what transformers chooses.
        revision: branch, tag or commit of a name on the hub.
        trust_remote_code: let a checkpoint from the hub run its own code.

    Returns:
        The model in evaluation mode, and the processor. Its tokenizer pads, if need be with the end-of-text token.

    Raises:
        ValueError: no such path, bundled checkpoint, dtype, device or attention implementation.
        OSError: there is no such checkpoint on the hub.
        ImportError: the attention implementation is not installed.
    """
    place = where if isinstance(where, Located) else located(where, revision=revision)
    model = load_model(
        place,
        dtype=dtype,
        device=device,
        device_map=device_map,
        attention=attention,
        trust_remote_code=trust_remote_code,
    )
    processor = load_processor(place, trust_remote_code=trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is not None and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, processor


def load_model(
    where: Name | Located,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    attention: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint without its processor, as `load` does."""
    place = where if isinstance(where, Located) else located(where, revision=revision)
    check_checkpoint(place.checkpoint)
    check_dtype(dtype)
    check_device(device)
    check_attention(attention)
    _check_trust(trust_remote_code)
    how: dict[str, Any] = {"dtype": dtype, "device_map": device_map, "attn_implementation": attention}
    with _naming(place):
        if original := originals.find(place.checkpoint, place.revision):
            model = weights.load(original, tokenizer_of(original), **how)
        else:
            if asked := hub.how_to_load(place.checkpoint):
                how["adapter_kwargs"] = asked  # because transformers looks for adapters on the hub all the same
            how |= _hub(place, trust_remote_code)
            _check_kind(place, trust_remote_code)
            model = AutoModelForImageTextToText.from_pretrained(place.checkpoint, **how)
    if device is not None and device_map is None:
        model = model.to(device)
    return model.eval()


def load_processor(place: Located, *, trust_remote_code: bool = False) -> ProcessorMixin:
    """Load the processor of a checkpoint, or make it for one in the authors' format, which has none."""
    _check_trust(trust_remote_code)
    with _naming(place):
        if original := originals.find(place.checkpoint, place.revision):
            return processor_of(original, tokenizer_of(original))
        return AutoProcessor.from_pretrained(place.checkpoint, **_hub(place, trust_remote_code))


def load_config(place: Located) -> Any:
    """Load the configuration of a checkpoint, or make it for one in the authors' format."""
    with _naming(place):
        if original := originals.find(place.checkpoint, place.revision):
            return original.config
        return AutoConfig.from_pretrained(place.checkpoint, **_hub(place, False))


def _hub(place: Located, trust_remote_code: bool) -> dict[str, Any]:
    how = {"revision": place.revision or "main", "trust_remote_code": trust_remote_code}
    return how | hub.how_to_load(place.checkpoint)


def _check_kind(place: Located, trust_remote_code: bool) -> None:
    """Refuse a checkpoint of a language model or a vision tower alone. Code of the checkpoint's own may load any."""
    config = AutoConfig.from_pretrained(place.checkpoint, **_hub(place, trust_remote_code))
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING and not hasattr(config, "auto_map"):
        raise ValueError(f"{place.checkpoint} holds a {config.model_type}, which is no vision-language model")


def _check_trust(trust_remote_code: bool) -> None:
    if not isinstance(trust_remote_code, bool):
        raise ValueError(f"trust_remote_code={trust_remote_code!r}: give True or False")


@contextmanager
def _naming(place: Located) -> Iterator[None]:
    """Name the checkpoint in what goes wrong, and say it in one line."""
    try:
        yield
    except (ImportError, OSError, ValueError, SafetensorError, UnpicklingError) as error:
        is_remote = not os.path.isdir(place.checkpoint)
        if is_remote and isinstance(error, OSError) and (hint := hub.hint(place.checkpoint)):
            raise OSError(hint) from error
        kind = next((kind for kind in (ImportError, OSError) if isinstance(error, kind)), ValueError)
        said = one_line(error)
        said = said if said.startswith(place.checkpoint) else f"{place.checkpoint} could not be loaded: {said}"
        raise kind(said) from error


def default_device() -> str:
    """Return "cuda" if there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_checkpoint(name: str) -> str:
    """Return the folder of `bundled/NAME` or of a path, or the id on the hub as it is. The hub is not asked.

    Raises:
        ValueError: there is no such bundled checkpoint or path, or the folder holds no model.
    """
    place = bundled.resolve(name)
    folder = Path(place)
    if not folder.exists():
        if os.path.isabs(place) or place.startswith(("./", "../", "~")) or place.count("/") > 1:
            raise ValueError(f"the path {place} does not exist")
        return place
    if not folder.is_dir():
        raise ValueError(f"{place} is a file; give the folder of a checkpoint")
    if not any((folder / file).is_file() for file in ("config.json", CONFIG)):
        holds = next((what for file, what in _NO_MODELS.items() if (folder / file).is_file()), "no model")
        raise ValueError(f"the folder {place} holds {holds}: there is no config.json in it")
    return place


def check_dtype(dtype: str | torch.dtype) -> None:
    """Refuse a dtype that no model can have.

    Raises:
        ValueError: which, and what to write instead.
    """
    known = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if dtype != "auto" and not (isinstance(known, torch.dtype) and known.is_floating_point):
        raise ValueError(f"dtype={dtype!r}: use float32, bfloat16, float16 or auto")


def check_device(device: str | torch.device | None) -> None:
    """Refuse a device that this machine does not have.

    Raises:
        ValueError: which, and what to write instead.
    """
    if device is None:
        return
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device={str(device)!r}: there is no such device; use cpu, cuda or cuda:0") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}: this PyTorch sees no GPU; use cpu")
    try:
        torch.zeros(1, device=device).cpu()
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device={str(device)!r} cannot be used: {one_line(error)}") from error


def check_attention(attention: str | None) -> None:
    """Refuse an attention implementation that transformers does not know. Names of kernels on the hub pass.

    Raises:
        ValueError: which, and what to write instead.
    """
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if attention is not None and attention not in known and "/" not in attention:
        hint = did_you_mean(attention, known)
        raise ValueError(f"attention={attention!r}: use eager, sdpa, flash_attention_2 or flex_attention.{hint}")
