"""Greedy answers of tiny models, and how the tests compare them."""

import torch
from torch import Tensor, nn


def lengths(cache) -> list[int]:
    """Tokens that each layer of a KV cache physically holds."""
    return [layer.keys.shape[-2] for layer in cache.layers]


GREEDY = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)


def greedy(model: nn.Module, inputs: dict, **options):
    """Greedy generation with the logits of every step, which are stacked to (B, T, V)."""
    out = model.generate(**inputs, **GREEDY | options)
    return out, torch.stack(out.logits, dim=1)


def answers(out, inputs: dict) -> list[list[int]]:
    """The tokens that were generated for each row."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def same_cache(a, b) -> None:
    """Two KV caches hold the same tokens, bit for bit."""
    assert lengths(a) == lengths(b)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert torch.equal(x.keys, y.keys)
        assert torch.equal(x.values, y.values)


def close(a: Tensor, b: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
