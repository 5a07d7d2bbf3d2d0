"""What a generation takes in memory: the peak, on a GPU and on a CPU, and what a KV cache really holds."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Cache


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds, padding included."""
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))


def peak_memory(model: nn.Module, inputs: dict, new_tokens: int = 2) -> int:
    """Peak bytes that a greedy generation of `new_tokens` tokens allocates beyond what was allocated before it.

    Weights and inputs are not in it. Both devices are read at PyTorch's own allocator, temporaries inside kernels
    included: on a GPU its peak counter is reset first, on a CPU the profiler records every allocation and release.
    A CPU library's private scratch memory is not seen. The pass is slow on a CPU: don't time it.
    """
    with _no_collection():
        return _peak(model, inputs, new_tokens)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's garbage collector from freeing tensors in reference cycles at moments of its own choosing."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _peak(model: nn.Module, inputs: dict, new_tokens: int) -> int:
    device = model.device
    options = dict(do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        with torch.inference_mode():
            model.generate(**inputs, **options)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record, torch.inference_mode():
        model.generate(**inputs, **options)
    changes = sorted(
        (event.start_ns(), event.nbytes())
        for event in record.profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type() == torch.autograd.DeviceType.CPU
    )
    live = peak = 0
    for _, nbytes in changes:
        live += nbytes
        peak = max(peak, live)
    return peak
