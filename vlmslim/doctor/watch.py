"""Looking without touching: what a model is made of, what others see of it, and which tensors are made."""

import sys

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode


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
    found: dict[str, object] = {}
    for path, module in model.named_modules():
        found[f"class of {path or 'the model'}"] = type(module)
        for name, value in vars(module).items():
            where = f"{path}.{name}" if path else name
            if isinstance(value, dict):
                found |= {f"{where}[{key!r}]": item for key, item in value.items()}
            else:
                found[where] = value
    found |= {f"values of {name}": p._version for name, p in model.named_parameters() if not p.is_inference()}
    found["config"] = repr(model.config.to_dict())
    found["generation config"] = repr(model.generation_config.to_dict())
    found["attention implementation"] = model.config.get_text_config()._attn_implementation
    return Snapshot(found)


def surroundings(model: nn.Module) -> Snapshot:
    """What a model shares with all others in the process: its classes, the functions they call, global hooks."""
    classes = {cls for module in model.modules() for cls in type(module).__mro__ if cls is not object}
    libraries = {sys.modules[cls.__module__] for cls in classes} | {nn.functional}
    shared = (classmethod, staticmethod, property)
    found: dict[str, object] = {}
    for owner in (*classes, *libraries):
        parts = vars(owner).items()
        found |= {f"{owner.__name__}.{k}": v for k, v in parts if callable(v) or isinstance(v, shared)}
    for table in ("_global_forward_hooks", "_global_forward_pre_hooks"):
        found |= {f"{table}[{key}]": hook for key, hook in getattr(nn.modules.module, table).items()}
    return Snapshot(found)
