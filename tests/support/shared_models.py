"""The work of one of two processes that share a model, by tensor parallelism or by FSDP2."""

import os

import torch
import torch.distributed as dist
from prompts import ROWS, batch
from tiny import tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageTextToText

import vlmslim

METHODS = ("none", "divprune", "fastv", "todre", "aim")


@torch.no_grad()
def logits(model, method: str, **options) -> torch.Tensor:
    """Logits (B, L, V) of two prompts under a method."""
    with vlmslim.patch(model, method, **({} if method == "none" else {"keep": 5})):
        found = model(**batch(tiny("llava"), ROWS), **options).logits
    return found.full_tensor() if hasattr(found, "full_tensor") else found


def tensor_parallel(folder: str):
    return AutoModelForImageTextToText.from_pretrained(folder, tp_plan="auto").eval()


def sharded(folder: str):
    """A model whose decoder layers, tower layers and rest are sharded by FSDP2."""
    model, mesh = tiny("llava"), init_device_mesh("cpu", (2,))
    core = model.model
    for layer in (*core.language_model.layers, *core.vision_tower.encoder.layers):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def work(rank: int, port: int, folder: str) -> None:
    """One of the two processes: every method under every way to share a model."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for make in (tensor_parallel, sharded):
        for cache in (True, False):
            model = make(folder)
            found |= {(make.__name__, m, cache): logits(model, m, use_cache=cache) for m in METHODS}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
