"""Looking without touching: what a model is made of, what others see of it, and which tensors are made."""

import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import cache_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

#: Tables of functions that transformers looks up by name.
REGISTRIES = {
    "ALL_ATTENTION_FUNCTIONS": ALL_ATTENTION_FUNCTIONS,
    "ALL_MASK_ATTENTION_FUNCTIONS": ALL_MASK_ATTENTION_FUNCTIONS,
}


class Watch(TorchDispatchMode):
    """Notes the shape of every floating-point tensor that is made."""

    def __init__(self):
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.shapes.add(tuple(x.shape))
        return out


class Snapshot:
    """Names and values at a moment; a later one of the same thing tells what changed."""

    def __init__(self, values: dict[str, object]):
        self._values = values  # kept alive, so that identities are not given to newer objects

    def changes(self, later: "Snapshot") -> list[str]:
        """Names that were added, removed, or hold another value now."""
        ours, theirs = self._values, later._values
        missing = object()
        names = [*ours, *(name for name in theirs if name not in ours)]
        return [name for name in names if not _same(ours.get(name, missing), theirs.get(name, missing))]


def _same(a: object, b: object) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)


def anatomy(model: nn.Module) -> Snapshot:
    """Every attribute, hook, weight and setting of a model: whatever a patch could leave behind."""
    found: dict[str, object] = {"attention implementation": model.config.get_text_config()._attn_implementation}
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
    return Snapshot(found)


@torch.no_grad()
def _bits(tensors: Iterable[Tensor]) -> list[int]:
    """A checksum of the bits of each: it tells one bit changed, and two rows swapped. Nothing is copied."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

    def total(x: Tensor) -> Tensor:
        rows = x.detach().view(integers[x.element_size()])
        rows = rows.sum(dim=tuple(range(1, x.ndim)), dtype=torch.int64) if x.ndim > 1 else rows.long().flatten()
        return (rows * torch.arange(1, len(rows) + 1, device=x.device)).sum()

    with_values = [None if x.is_meta or x.is_complex() else total(x) for x in tensors]
    return [0 if x is None else int(x) for x in with_values]


def surroundings(model: nn.Module) -> Snapshot:
    """What a model shares with all others in the process.

    Its classes and those of caches and tensors, the functions that they call, global hooks, and the process's settings.
    """
    caches = {cls for cls in vars(cache_utils).values() if isinstance(cls, type)}
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}
    libraries = {sys.modules[cls.__module__] for cls in classes} | {nn.functional, torch, cache_utils}
    found: dict[str, object] = {}
    for owner in classes | caches | {Tensor}:
        name = f"{owner.__module__}.{owner.__qualname__}" if owner in caches else owner.__name__
        found |= {f"{name}.{k}": v for k, v in vars(owner).items() if _matters(k, v) or not k.startswith("__")}
    for owner in libraries:
        found |= {f"{owner.__name__}.{k}": v for k, v in vars(owner).items() if _matters(k, v)}
    for table, entries in vars(nn.modules.module).items():
        if table.startswith("_global_") and isinstance(entries, dict):
            found |= {f"{table}[{key}]": hook for key, hook in entries.items()}
    for table, entries in REGISTRIES.items():
        found |= {f"{table}[{key!r}]": entries[key] for key in entries}
    return Snapshot(found | _settings())


def _matters(name: str, value: object) -> bool:
    """Whether something of a class or module could change what others compute."""
    return callable(value) or isinstance(value, classmethod | staticmethod | property)


def _settings() -> dict[str, object]:
    """Settings of torch that hold for the whole process."""
    found = {
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


class Dice:
    """The random generators that a process shares: of torch, of each of its CUDA devices, of numpy and of Python."""

    def __init__(self):
        self.used: list[str] = []

    @staticmethod
    def _states() -> dict[str, object]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return {
            "random": random.getstate(),
            "numpy.random": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
            "torch": torch.get_rng_state().tolist(),
            "torch.cuda": [state.tolist() for state in cuda],
        }

    @contextmanager
    def watched(self) -> Iterator["Dice"]:
        """Note in `used` the generators that are drawn from, or seeded, meanwhile; give all back as they were."""
        python, library = random.getstate(), np.random.get_state()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            try:
                for i in devices:
                    torch.cuda.set_rng_state(torch.Generator(f"cuda:{i}").manual_seed(4321).get_state(), i)
                torch.default_generator.manual_seed(4321)  # not where an earlier seed of the method's would have put it
                np.random.seed(4321)
                random.seed(4321)
                before = self._states()
                yield self
                self.used = [name for name, state in self._states().items() if state != before[name]]
            finally:
                random.setstate(python)
                np.random.set_state(library)
