"""Peak memory of a generation, on a GPU and on a CPU, and the bytes that a KV cache holds."""

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def cache_bytes(cache: Any) -> int:
    """Count the bytes of the keys and values in a `transformers.Cache`, padding included."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def peak_memory(model: Any, inputs: Mapping, new_tokens: int = 2) -> int:
    """Measure the peak bytes that a greedy generation of `new_tokens` tokens allocates on top of what was allocated.

    Weights and inputs do not count. The bytes are those of PyTorch's own allocator, temporary tensors inside kernels
    included: on a GPU its peak counter, on a CPU the profiler's record of all allocations and releases. Scratch memory
    that a CPU library allocates for itself does not count. On a CPU the profiler is slow, so do not time this call.
    """
    options = dict(do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    with _no_collection(), torch.inference_mode():
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)
            torch.cuda.reset_peak_memory_stats(model.device)
            before = torch.cuda.memory_allocated(model.device)
            model.generate(**inputs, **options)
            return torch.cuda.max_memory_allocated(model.device) - before
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
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


@contextmanager
def _no_collection() -> Iterator[None]:
    """Stop Python's garbage collector, because it frees tensors in reference cycles at random moments."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
