"""Analytic FLOPs and KV-cache bytes of a prompt, under named conventions.

One decoder layer that processes `n` tokens, with hidden size `d`, query width `q` (heads x head size), key and value
width `k` (KV heads x head size) and MLP width `m`, does

    n (2 d q + 2 d k)  projections        2 n^2 q  attention        3 n d m  MLP        (multiply-adds)

and one multiply-add is two FLOPs. Attention counts in full, without a factor of one half for the causal mask and
without sliding windows, because most kernels do the work. Norms, softmax and activations do not count, as in FLOP
counters. `CONVENTIONS` has the other ways of counting that papers use, so that their numbers can be reproduced.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from vlmslim.cost.vision import Grid, crop_tokens, projector_multiply_adds, tower_multiply_adds


@dataclass(frozen=True)
class Convention:
    """A way to count FLOPs.

    per_multiply_add : FLOPs of one multiply-add, 1 or 2
    mlp_matrices     : matrices that count in the language model's gated MLP, which has three
    causal           : attention counts the n (n + 1) / 2 pairs under a causal mask, instead of n^2, and in a layer
                       with a sliding window only the pairs inside it
    elementwise      : norms, softmax, residual additions and activations count, too
    """

    per_multiply_add: int
    mlp_matrices: int
    causal: bool = False
    elementwise: bool = False


#: For the same work, LLaVA-1.5-7B with 622 tokens has 8.26, 8.16, 8.26, 4.13 and 3.23 TFLOPs, in this order.
CONVENTIONS = {
    "flops": Convention(per_multiply_add=2, mlp_matrices=3),
    "causal": Convention(per_multiply_add=2, mlp_matrices=3, causal=True),
    "roofline": Convention(per_multiply_add=2, mlp_matrices=3, elementwise=True),  # LLM-Viewer
    "sparsevlm": Convention(per_multiply_add=1, mlp_matrices=3),
    "fastv": Convention(per_multiply_add=1, mlp_matrices=2),  # also in the DivPrune paper
}


def _convention(name: str) -> Convention:
    if name not in CONVENTIONS:
        raise ValueError(f"unknown FLOPs convention {name!r}; choose from {', '.join(CONVENTIONS)}")
    return CONVENTIONS[name]


@dataclass(frozen=True)
class DecoderShape:
    """The sizes of a language model that decide its cost.

    windows : of each layer, the tokens that a sliding window lets a token see, itself included, 0 for all of them;
              empty if no layer slides
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    vocab: int
    windows: Sequence[int] = ()

    @classmethod
    def from_config(cls, config: Any) -> "DecoderShape":
        """Read the config of a language model, or the `text_config` in the config of a LLaVA."""
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
            windows=_windows(config),
        )

    def per_layer(self, tokens: float | Sequence[float]) -> list[float]:
        """Return one length per layer.

        Raises:
            ValueError: the list does not have one length per layer.
        """
        if isinstance(tokens, int | float):
            return [tokens] * self.layers
        if len(tokens) != self.layers:
            raise ValueError(f"{len(tokens)} lengths for a language model of {self.layers} layers: give one per layer")
        return list(tokens)


def _decoder(shape: DecoderShape, tokens: float | Sequence[float], how: Convention) -> dict[str, float]:
    """Count the FLOPs of the decoder layers by kind of work."""
    d, q, k = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    lengths = shape.per_layer(tokens)
    total = sum(lengths)
    windows = shape.windows or [0] * shape.layers
    pairs = sum(_causal_pairs(n, w) if how.causal else n * n for n, w in zip(lengths, windows, strict=True))
    unit = how.per_multiply_add
    return {
        "projections": unit * total * (2 * d * q + 2 * d * k),
        "attention": unit * 2 * pairs * q,
        "mlp": unit * total * how.mlp_matrices * d * shape.mlp,
        # as LLM-Viewer counts: two norms of 7 per element, 2 residual sums, 2 per activation; 5 per softmax element
        "elementwise": (18 * d * total + 5 * shape.heads * pairs) if how.elementwise else 0,
    }


def _windows(config: Any) -> tuple[int, ...]:
    types = getattr(config, "layer_types", None) or ()
    windows = tuple(config.sliding_window if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else ()


def _causal_pairs(n: float, window: int) -> float:
    """Count the pairs of n tokens under a causal mask, each of which sees itself and what a window shows before it."""
    seen = min(n, window or n)
    return seen * (seen + 1) / 2 + (n - seen) * seen


def prefill_flops(
    shape: DecoderShape, tokens: float | Sequence[float], *, convention: str = "flops", lm_head_positions: int = 0
) -> float:
    """Count the FLOPs of one prompt's prefill in the language model.

    Args:
        shape: sizes of the language model.
        tokens: text and visual tokens that each layer processes, one number per layer, or one for all of them.
        convention: a key of `CONVENTIONS`.
        lm_head_positions: positions that go through the LM head: none by default; `generate()` computes 1.

    Raises:
        ValueError: unknown convention, or a list of lengths that does not fit the layers.
    """
    how = _convention(convention)
    return sum(_decoder(shape, tokens, how).values()) + _lm_head(shape, lm_head_positions, how)


def _lm_head(shape: DecoderShape, positions: int, how: Convention) -> float:
    """Count the FLOPs of the LM head."""
    return how.per_multiply_add * positions * shape.hidden * shape.vocab


def tower_flops(config: Any, *, crops: int = 1, grid: Grid | None = None, convention: str = "flops") -> float:
    """Count the FLOPs of a vision tower for `crops` crops: all layers and the patch embedding.

    Under every convention attention has no causal mask, and all matrices of an MLP count. `vlmslim.cost.vision` has
    the details.

    Args:
        config: of a model, or of its tower.
        crops: crops, or images, as they enter the tower.
        grid: frames, rows and columns of patches of an image, for a tower that takes any size.
        convention: a key of `CONVENTIONS`.

    Raises:
        ValueError: unknown convention, or no grid for a tower that takes any size.
    """
    return _convention(convention).per_multiply_add * crops * tower_multiply_adds(config, grid)


def projector_flops(config: Any, visual_tokens: float, *, convention: str = "flops") -> float:
    """Count the FLOPs of a model's projector for `visual_tokens` tokens (before compression)."""
    return _convention(convention).per_multiply_add * visual_tokens * projector_multiply_adds(config)


def kv_bytes(shape: DecoderShape, tokens: float | Sequence[float], bytes_per_number: int = 2) -> float:
    """Count the bytes of one prompt's KV cache: keys and values of the tokens that each layer caches, without padding.

    A layer with a sliding window of w tokens keeps the last w - 1, because the next token brings its own.

    Args:
        shape: sizes of the language model.
        tokens: text and visual tokens in each layer's cache, one number per layer, or one for all of them.
        bytes_per_number: 2 for float16 and bfloat16, 4 for float32 (`dtype.itemsize`).
    """
    lengths = shape.per_layer(tokens)
    if shape.windows:
        lengths = [min(n, w - 1) if w else n for n, w in zip(lengths, shape.windows, strict=True)]
    return 2 * shape.kv_heads * shape.head_dim * bytes_per_number * sum(lengths)


def equivalent_tokens(per_layer: Sequence[float]) -> float:
    """Average visual tokens over layers: FastV that keeps 144 of 576 from layer 2 of 32 on costs 171, not 144."""
    return sum(per_layer) / len(per_layer)


@dataclass(frozen=True)
class Ledger:
    """FLOPs of one prompt's prefill under one convention, by part. `print(ledger)` shows a table.

    tower, projector : all crops; no method here makes them cheaper
    method           : the method's own matrix products, as `count_flops` counts them
    projections, attention, mlp, elementwise : the language model
    lm_head          : the positions that generation computes; one by default
    """

    convention: str
    tower: float
    projector: float
    method: float
    projections: float
    attention: float
    mlp: float
    elementwise: float
    lm_head: float

    @classmethod
    def of(
        cls,
        config: Any,
        tokens: float | Sequence[float],
        *,
        crops: int = 1,
        grid: Grid | None = None,
        method: float = 0.0,
        convention: str = "flops",
        lm_head_positions: int = 1,
    ) -> "Ledger":
        """Count one prompt.

        Args:
            config: the config of the model.
            tokens: text and visual tokens that each decoder layer processes, one number per layer, or one for all.
            crops: crops (or frames) of all images of the prompt, as they enter the tower.
            grid: frames, rows and columns of patches of an image, for a tower that takes any size.
            method: FLOPs of the method, two per multiply-add.
            convention: a key of `CONVENTIONS`.
            lm_head_positions: positions that go through the LM head.

        Raises:
            ValueError: unknown convention, or a list of lengths that does not fit the layers.
        """
        how, shape = _convention(convention), DecoderShape.from_config(config)
        return cls(
            convention=convention,
            tower=tower_flops(config, crops=crops, grid=grid, convention=convention),
            projector=projector_flops(config, crops * crop_tokens(config, grid), convention=convention),
            method=method * how.per_multiply_add / 2,
            lm_head=_lm_head(shape, lm_head_positions, how),
            **_decoder(shape, tokens, how),
        )

    @property
    def language_model(self) -> float:
        """FLOPs of the decoder layers alone, which papers usually quote."""
        return self.projections + self.attention + self.mlp + self.elementwise

    @property
    def total(self) -> float:
        """FLOPs of all parts."""
        return self.tower + self.projector + self.method + self.language_model + self.lm_head

    def as_dict(self) -> dict[str, Any]:
        """Return all parts and sums, ready for JSON."""
        return asdict(self) | {"language_model": self.language_model, "total": self.total}

    def __str__(self) -> str:
        inner = ("projections", "attention", "mlp", "elementwise")
        parts = ["tower", "projector", "method", "language_model", *inner, "lm_head", "total"]
        values = self.as_dict()
        lines = [f"{'FLOPs of one prefill (' + self.convention + ')':<34}{'GFLOPs':>12}{'share':>8}"]
        for part in parts:
            if values[part] or part not in ("method", "elementwise"):
                name = ("  " if part in inner else "") + part.replace("_", " ")
                share = values[part] / values["total"]
                lines.append(f"{name:<34}{values[part] / 1e9:>12,.3f}{share:>8.1%}")
        return "\n".join(lines)
