"""Snapshots of everything that a patch could leave behind: on its model, in the process, and in classes."""

import copy
import sys
from collections.abc import Iterable

import torch
from compare import greedy
from prompts import ROWS, batch
from torch import Tensor, nn
from transformers import cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmslim
from vlmslim import Compressor

#: Tables of functions that transformers looks up by name.
REGISTRIES = {
    "ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS,
    "ALL_MASK_ATTENTION_FUNCTIONS": ALL_MASK_ATTENTION_FUNCTIONS,
}

Snapshot = dict[str, object]  # it holds the values themselves, so that no identity is given to another object


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """Return the names that were added, were removed, or hold another value in `after`."""
    missing = object()
    names = [*before, *(name for name in after if name not in before)]
    return [name for name in names if not _same(before.get(name, missing), after.get(name, missing))]


def _same(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)


def model_state(model: nn.Module) -> Snapshot:
    """Take a snapshot of every attribute, hook, weight and setting of a model."""
    text = model.config.get_text_config()
    found: Snapshot = {"attention implementation": text._attn_implementation}
    configs: dict[int, object] = {}
    for path, module in model.named_modules():
        found[f"class of {path or 'the model'}"] = type(module)
        for name, value in vars(module).items():
            where = f"{path}.{name}" if path else name
            if isinstance(value, dict):
                found |= {f"{where}[{key!r}]": item for key, item in value.items()}
            else:
                found[where] = value
        config = getattr(module, "config", None)
        if config is not None and configs.setdefault(id(config), module) is module:  # many modules share one
            found[f"attention of {path or 'the model'}"] = getattr(config, "_attn_implementation", None)
    found |= {f"values of {name}": p._version for name, p in model.named_parameters() if not p.is_inference()}
    tensors = dict(model.named_parameters()) | {f"buffer {name}": b for name, b in model.named_buffers()}
    found |= {f"bits of {name}": total for name, total in zip(tensors, _bits(tensors.values()), strict=True)}
    for name, tensor in tensors.items():
        found[f"requires_grad of {name}"] = tensor.requires_grad
        for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            hooks = getattr(tensor, table, None) or {}
            found |= {f"{table} of {name}[{key}]": hook for key, hook in hooks.items()}
    found["config"] = repr(model.config.to_dict())
    found["generation config"] = repr(model.generation_config.to_dict())
    return found


@torch.no_grad()
def _bits(tensors: Iterable[Tensor]) -> list[int]:
    """Compute a checksum of the bits of each tensor, which changes with one bit and when two rows are swapped."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def checksum(x: Tensor) -> int:
        rows = x.detach().view(integers[x.element_size()])
        rows = rows.sum(dim=tuple(range(1, x.ndim)), dtype=torch.int64) if x.ndim > 1 else rows.long().flatten()
        return int((rows * torch.arange(1, len(rows) + 1)).sum())

    return [checksum(x) for x in tensors]


def process_state(model: nn.Module) -> Snapshot:
    """Take a snapshot of what a model shares with all others in the process.

    That is its classes and those of caches and tensors, the functions that they call, global hooks, and settings.
    """
    caches = {cls for cls in vars(cache_utils).values() if isinstance(cls, type)}
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}
    libraries = {sys.modules[cls.__module__] for cls in classes} | {nn.functional, torch, cache_utils}
    found: Snapshot = {}
    for owner in classes | caches | {Tensor}:
        name = f"{owner.__module__}.{owner.__qualname__}" if owner in caches else owner.__name__
        found |= {f"{name}.{k}": v for k, v in vars(owner).items() if _matters(v) or not k.startswith("__")}
    for library in libraries:
        found |= {f"{library.__name__}.{k}": v for k, v in vars(library).items() if _matters(v)}
    for table, entries in vars(nn.modules.module).items():
        if table.startswith("_global_") and isinstance(entries, dict):
            found |= {f"{table}[{key}]": hook for key, hook in entries.items()}
    for table, entries in REGISTRIES.items():
        found |= {f"{table}[{key!r}]": entries[key] for key in entries}
    return found | _settings()


def _matters(value: object) -> bool:
    """Return whether a value of a class or a module could change what others compute."""
    return callable(value) or isinstance(value, classmethod | staticmethod | property)


def _settings() -> Snapshot:
    """Take a snapshot of the settings of torch that hold for the whole process."""
    found: Snapshot = {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "number of threads": torch.get_num_threads(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "cudnn.deterministic": torch.backends.cudnn.deterministic,
    }
    for name in ("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled"):
        found[name] = getattr(torch.backends.cuda, name)()
    return found


def class_memories(methods: Iterable[Compressor]) -> Snapshot:
    """Take a snapshot of the lists, sets and dictionaries that classes of methods, and their modules, hold."""
    stages = [stage for method in methods for stage in (method, *method.stages())]
    classes = {cls for stage in stages for cls in type(stage).__mro__ if issubclass(cls, Compressor)}
    owners = [(cls.__qualname__, cls) for cls in classes]
    owners += [(cls.__module__, sys.modules[cls.__module__]) for cls in classes]
    return {
        f"{owner}.{name}": repr(value)
        for owner, holder in owners
        for name, value in vars(holder).items()
        if isinstance(value, dict | list | set) and not name.startswith("__")
    }


@torch.no_grad()
def left_behind(model, method: Compressor | list[Compressor]) -> list[str]:
    """Patch a model, use it, and remove the patch; return what another model, or this one later, would notice."""
    other, inputs = copy.deepcopy(model), batch(model, ROWS)
    methods = method if isinstance(method, list) else [method]
    want = model(**inputs).logits  # in a first run, transformers sets up a few things for good
    assert torch.equal(other(**inputs).logits, want)
    before, around, memories = model_state(model), process_state(model), class_memories(methods)
    slim = vlmslim.patch(model, method)
    greedy(model, inputs)
    found = [f"{name}, while patched" for name in changes(around, process_state(model))]
    if not torch.equal(other(**inputs).logits, want):
        found.append("the other model's answers")
    slim.remove()
    found += changes(before, model_state(model)) + changes(around, process_state(model))
    found += changes(memories, class_memories(methods))
    if not torch.equal(model(**inputs).logits, want):
        found.append("the model's answers")
    return found
