"""Every operation of PyTorch while a test looks on."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Watch(TorchDispatchMode):
    """Notes the shape of every tensor that is made, and counts operations by name."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.shapes.append(tuple(x.shape))
        return out

    def syncs(self) -> int:
        """Operations that make the host wait for the device."""
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")
        return sum(self.calls.get(name, 0) for name in waiting)
