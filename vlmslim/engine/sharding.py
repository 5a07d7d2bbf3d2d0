"""Decoder layers that are spread over processes: by FSDP, or by tensor parallelism."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmslim.ops.attention import QueriesKeys

if torch.distributed.is_available():
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor, Replicate, Shard

    _FSDP: tuple[type, ...] = (FSDPModule, FullyShardedDataParallel)
else:
    _FSDP = ()


def is_sharded(layer: nn.Module) -> bool:
    """Tell whether a layer has its weights only while it runs, because FSDP shards them again afterwards."""
    return any(isinstance(module, _FSDP) for module in layer.modules())


def tensor_parallel_mesh(module: nn.Module) -> Any:
    """Return the `DeviceMesh` over which the heads of an attention module are split; None if they are not."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    for part in module.modules():
        mesh = getattr(part, "_hf_device_mesh", None)  # transformers before 5.24 keeps local tensors
        for weight in part.parameters(recurse=False):
            if isinstance(weight, DTensor) and any(placement.is_shard() for placement in weight.placements):
                mesh = weight.device_mesh
        if mesh is not None and mesh.size() > 1:
            return mesh
    return None


def whole_heads(x: Tensor, heads: int, mesh: Any) -> Tensor:
    """Gather the heads of all processes, (B, own heads, s, head_dim) -> (B, heads, s, head_dim), on every process.

    Raises:
        RuntimeError: the processes do not hold equal shares of the heads.
    """
    if isinstance(x, DTensor):
        x = x.full_tensor()
    elif x.shape[1] != heads:
        split = [Shard(1) if dim == mesh.ndim - 1 else Replicate() for dim in range(mesh.ndim)]
        x = DTensor.from_local(x, mesh, split, run_check=False).full_tensor()
    if x.shape[1] != heads:
        raise RuntimeError(
            f"{heads} attention heads are split unevenly over the processes; use a number of processes that divides "
            "them, or a method that works before the language model"
        )
    return x


def gathered(found: QueriesKeys, module: Any, mesh: Any) -> QueriesKeys:
    """Gather what an attention module of a tensor-parallel model attends with, so that all processes see all heads."""
    heads, sinks = module.config.num_attention_heads, found.sinks
    if sinks is not None:
        sinks = whole_heads(sinks[None, :, None, None], heads, mesh)[0, :, 0, 0]
    return replace(found, q=whole_heads(found.q, heads, mesh), k=whole_keys(found.k, module, mesh), sinks=sinks)


def whole_keys(keys: Tensor, module: Any, mesh: Any) -> Tensor:
    """Gather the keys (B, own kv heads, s, head_dim) of all processes."""
    heads = getattr(module.config, "num_key_value_heads", None) or module.config.num_attention_heads
    return whole_heads(keys, heads, mesh)
