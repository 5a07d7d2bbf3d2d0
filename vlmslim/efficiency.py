"""What a prompt costs: analytic FLOPs and KV-cache bytes under named conventions, and measured times.

FLOPs. One decoder layer that processes `n` tokens, with hidden size `d`, query width `q` (heads x head size), key and
value width `k` (KV heads x head size) and MLP width `m`, does

    n (2 d q + 2 d k)  projections        2 n^2 q  attention        3 n d m  MLP        (multiply-adds)

and one multiply-add is two FLOPs. Attention is counted in full: the causal mask is not worth a factor of one half,
because most kernels do the work. The language model alone is counted unless the tower, the projector or the LM head
are asked for. `CONVENTIONS` holds the older ways of counting, so that a paper's number can be reproduced.
"""

import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import nn
from transformers.generation.streamers import BaseStreamer


@dataclass(frozen=True)
class Convention:
    """How FLOPs are counted: FLOPs per multiply-add, and matrices in a gated MLP."""

    per_multiply_add: int
    mlp_matrices: int


#: LLaVA-1.5-7B with 622 tokens is 8.26 T, 4.13 T and 3.23 T in turn, for exactly the same work.
CONVENTIONS = {
    "flops": Convention(per_multiply_add=2, mlp_matrices=3),
    "sparsevlm": Convention(per_multiply_add=1, mlp_matrices=3),
    "fastv": Convention(per_multiply_add=1, mlp_matrices=2),  # the DivPrune paper too
}


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ValueError(f"unknown FLOPs convention {name!r}; choose from {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a language model that its cost depends on."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int

    @classmethod
    def from_config(cls, config) -> "DecoderShape":
        """Read a language model's config, or the `text_config` inside a LLaVA's."""
        config = getattr(config, "text_config", config)
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            mlp=config.intermediate_size,
            vocab=config.vocab_size,
        )

    def per_layer(self, tokens: float | Sequence[float]) -> list[float]:
        """One length per layer.

        Raises:
            ValueError: a list of another length than the number of layers.
        """
        if isinstance(tokens, int | float):
            return [tokens] * self.layers
        if len(tokens) != self.layers:
            raise ValueError(f"{len(tokens)} lengths for a language model of {self.layers} layers: give one per layer")
        return list(tokens)


def prefill_flops(
    shape: DecoderShape, tokens: float | Sequence[float], *, convention: str = "flops", lm_head_positions: int = 0
) -> float:
    """FLOPs of one prompt's prefill in the language model.

    Args:
        shape: sizes of the language model.
        tokens: text and visual tokens each layer processes, one number per layer, or one for all of them.
        convention: a key of `CONVENTIONS`.
        lm_head_positions: positions that go through the LM head: 0 leaves it out, `generate()` computes 1.

    Raises:
        ValueError: unknown convention, or a list of lengths that does not fit the layers.
    """
    how = _convention(convention)
    d, q, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    per_token = 2 * d * q + 2 * d * k + how.mlp_matrices * d * shape.mlp
    multiply_adds = sum(n * per_token + 2 * n * n * q for n in shape.per_layer(tokens))
    return how.per_multiply_add * (multiply_adds + lm_head_positions * d * shape.vocab)


def tower_flops(config, *, crops: int = 1, convention: str = "flops") -> float:
    """FLOPs of a CLIP or SigLIP vision tower for one image of `crops` crops, every layer and the patch embedding.

    Transformers runs all layers, and SigLIP's pooling head where the checkpoint has one, even where the projector
    reads an earlier layer, so all of it is counted. The MLP has two matrices under every convention.
    """
    config = getattr(config, "vision_config", config)
    siglip = "siglip" in config.model_type
    d, m = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    n = patches if siglip else patches + 1  # CLIP puts a CLS token in front
    embedding = patches * d * config.num_channels * config.patch_size**2
    layers = config.num_hidden_layers * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    pooling = 0
    if siglip and getattr(config, "vision_use_head", True):  # one query attends to all patches
        pooling = 2 * d * d + 2 * n * d * d + 2 * n * d + 2 * d * m
    return _convention(convention).per_multiply_add * crops * (embedding + layers + pooling)


def projector_flops(config, visual_tokens: float, *, convention: str = "flops") -> float:
    """FLOPs of a LLaVA's two-layer MLP projector for `visual_tokens` tokens (counted before compression)."""
    levels = config.vision_feature_layer
    width = config.vision_config.hidden_size * (1 if isinstance(levels, int) else len(levels))
    d = config.text_config.hidden_size
    return _convention(convention).per_multiply_add * visual_tokens * (width * d + d * d)


def kv_bytes(shape: DecoderShape, tokens: float | Sequence[float], dtype: torch.dtype | str = torch.float16) -> float:
    """Bytes of one prompt's KV cache: keys and values of the tokens cached by each layer, without padding."""
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    return 2 * shape.kv_heads * shape.head_dim * dtype.itemsize * sum(shape.per_layer(tokens))


def equivalent_tokens(per_layer: Sequence[float]) -> float:
    """Visual tokens averaged over layers: FastV that keeps 144 of 576 from layer 2 of 32 on costs 171, not 144."""
    return sum(per_layer) / len(per_layer)


@dataclass(frozen=True)
class Timing:
    """One timed generation: time to first token, and time of each later token; milliseconds."""

    prefill_ms: float
    decode_ms: float
    peak_bytes: int | None  # peak CUDA memory of this generation alone; None on a CPU


@dataclass(frozen=True)
class Spread:
    """Median and interquartile range of repeated measurements."""

    median: float
    iqr: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Summarise one value or more."""
        values = sorted(values)
        if len(values) == 1:
            return cls(values[0], 0.0)
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, high - low)


class _Clock(BaseStreamer):
    """Notes when `generate()` hands out tokens. It copies them to the host first, so the device has finished."""

    def __init__(self):
        self.ticks = []

    def put(self, value) -> None:
        self.ticks.append(time.perf_counter())

    def end(self) -> None:
        pass


def time_generation(model: nn.Module, inputs: dict, new_tokens: int) -> Timing:
    """Time one greedy generation of exactly `new_tokens` tokens.

    `prefill_ms` is the time to first token: image encoding, compression, prefill and the first choice. The length is
    fixed, so a worse model that would stop earlier does not look faster.

    Raises:
        ValueError: fewer than 2 tokens, of which no decoding time can be had.
    """
    if new_tokens < 2:
        raise ValueError(f"new_tokens={new_tokens}: at least 2 are needed to tell prefill from decoding")
    cuda = model.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
        torch.cuda.synchronize(model.device)
    clock = _Clock()
    start = time.perf_counter()
    with torch.inference_mode():
        model.generate(
            **inputs, streamer=clock, do_sample=False, num_beams=1, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
    first, last = clock.ticks[1], clock.ticks[new_tokens]  # tick 0 is the prompt
    peak = torch.cuda.max_memory_allocated(model.device) if cuda else None
    return Timing(1000 * (first - start), 1000 * (last - first) / (new_tokens - 1), peak)


def measure(model: nn.Module, inputs: dict, new_tokens: int = 16, repeats: int = 5, warmup: int = 1) -> list[Timing]:
    """Time a generation `repeats` times after `warmup` unrecorded ones.

    To compare methods, interleave them with `measure_together` instead: machines drift.
    """
    for _ in range(warmup):
        time_generation(model, inputs, new_tokens)
    return [time_generation(model, inputs, new_tokens) for _ in range(repeats)]


def measure_together(
    model: nn.Module, attach: dict, prompts: Sequence[dict], new_tokens: int = 16, repeats: int = 5, warmup: int = 1
) -> dict:
    """Time several treatments of one model on the same prompts, in turn, so that drift hits all alike.

    Args:
        model: the model that is timed.
        attach: name -> a callable without arguments that returns a context manager; the treatment is on inside it.
        prompts: `generate()` inputs of one prompt each.
        new_tokens: tokens generated for each prompt.
        repeats: recorded rounds.
        warmup: unrecorded rounds before them.

    Returns:
        name -> list of `Timing`, one per (round, prompt), in the same order for every name.
    """
    timings = {name: [] for name in attach}
    for turn in range(warmup + repeats):
        for name, treatment in attach.items():
            with ExitStack() as stack:
                stack.enter_context(treatment())
                turns = [time_generation(model, inputs, new_tokens) for inputs in prompts]
            if turn >= warmup:
                timings[name] += turns
    return timings


def summarise(timings: Sequence[Timing], reference: Sequence[Timing]) -> dict:
    """Medians and spreads of `timings`, and their ratios to `reference`, pair by pair: JSON-able."""

    def ratio(field: str) -> float:
        pairs = zip(timings, reference, strict=True)
        return statistics.median(getattr(ours, field) / getattr(theirs, field) for ours, theirs in pairs)

    prefill, decode = Spread.of(t.prefill_ms for t in timings), Spread.of(t.decode_ms for t in timings)
    peaks = [t.peak_bytes for t in timings if t.peak_bytes is not None]
    return {
        "prefill_ms": prefill.median,
        "prefill_ms_iqr": prefill.iqr,
        "prefill_ratio": ratio("prefill_ms"),
        "decode_ms": decode.median,
        "decode_ms_iqr": decode.iqr,
        "decode_ratio": ratio("decode_ms"),
        "peak_bytes": max(peaks) if peaks else None,
        "samples": len(timings),
    }
