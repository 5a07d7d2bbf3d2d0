"""Attention that fused kernels never hand out, recomputed for just the rows a method asks for."""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlmslim.ops.selection import full_precision


def tower_qk(layer: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of a CLIP or SigLIP encoder layer, unscaled.

    Args:
        layer: the encoder layer.
        hidden: (c, p, v) its input.

    Returns:
        q and k: (c, heads, p, v / heads) each.
    """
    attn = layer.self_attn
    x = layer.layer_norm1(hidden)
    return tuple(
        project(x).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2) for project in (attn.q_proj, attn.k_proj)
    )


@full_precision
def cls_logits(q: Tensor, k: Tensor) -> Tensor:
    """What CLS looks for in each patch, before the softmax, averaged over heads.

    Args:
        q: (c, heads, 1 + p, d) unscaled queries, CLS first.
        k: (c, heads, 1 + p, d) keys.

    Returns:
        (c, p).
    """
    return torch.einsum("chd,chpd->cp", q[:, :, 0], k[:, :, 1:].float()) / (q.shape[1] * q.shape[-1] ** 0.5)


@full_precision
def cls_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention that CLS pays to each patch, averaged over heads; CLS itself takes part in the softmax.

    Args:
        q: (c, heads, 1 + p, d) unscaled queries, CLS first.
        k: (c, heads, 1 + p, d) keys.

    Returns:
        (c, p).
    """
    return (torch.einsum("chd,chpd->chp", q[:, :, 0], k.float()) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 1:]


@full_precision
def received_attention(q: Tensor, k: Tensor) -> Tensor:
    """Attention that each patch receives, averaged over queries and heads: (c, heads, p, d) twice -> (c, p).

    One head at a time, so that no full map is held.
    """
    heads = zip((q / q.shape[-1] ** 0.5).unbind(1), k.float().unbind(1), strict=True)
    return sum((qh @ kh.transpose(1, 2)).softmax(-1).mean(1) for qh, kh in heads) / q.shape[1]


class DecoderAttention:
    """Attention logits of a decoder layer (Llama, Mistral, Qwen2 and relatives), for the query rows one asks for.

    Queries and logits are computed as they are wanted; keys once, or not at all where the KV cache has them.
    Submodules are called, never their weights read, so that offloaded layers work too.

    Args:
        layer: the decoder layer.
        hidden: (B, S, d) its input.
        rope: cosine and sine, (B or 1, S, head_dim) each.
        mask: (B, S), False at padding.
        keys: (B, kv heads, S, head_dim) the keys of the layer, rotated; computed if not given.
    """

    def __init__(
        self,
        layer: nn.Module,
        hidden: Tensor,
        rope: tuple[Tensor, Tensor],
        mask: Tensor,
        keys: Tensor | None = None,
    ):
        self.layer, self.attn, self.hidden = layer, layer.self_attn, hidden
        self.rope = tuple(t.to(hidden.device).expand(len(hidden), -1, -1) for t in rope)
        self.mask = mask.to(hidden.device)
        self.keys = (self._heads("k", hidden, *self.rope) if keys is None else keys).float()

    def logits(self, rows: Tensor, end: int | None = None) -> Tensor:
        """Scaled, masked logits of some rows.

        Args:
            rows: (B, q) indices of the query tokens.
            end: keys up to here only; rows must lie before. By default all.

        Returns:
            (B, heads, q, end) in fp32, -inf where a query may not look. A query always sees itself, so that a padding
            query does not become NaN.
        """
        q = self._heads("q", take(self.hidden, rows), *(take(t, rows) for t in self.rope))
        k, mask = self.keys[:, :, :end], self.mask[:, :end]
        q = q.unflatten(1, (k.shape[1], -1)).float()  # (B, kv heads, group, q, head_dim)
        with torch.autocast(q.device.type, enabled=False):
            logits = (q @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).mul_(self.attn.scaling)
        return logits.masked_fill_(~visible(mask, rows)[:, None], float("-inf"))

    def _heads(self, name: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Normalise, project, split into heads and rotate: (B, s, d) -> (B, heads, s, head_dim)."""
        x = getattr(self.attn, f"{name}_proj")(self.layer.input_layernorm(x)).unflatten(-1, (-1, self.attn.head_dim))
        if hasattr(self.attn, f"{name}_norm"):  # Qwen3 and relatives
            x = getattr(self.attn, f"{name}_norm")(x)
        x = x.transpose(1, 2)
        return apply_rotary_pos_emb(x, x, cos, sin)[0]


def visible(mask: Tensor, rows: Tensor) -> Tensor:
    """Which keys the queries `rows` (B, q) may look at, in a causal model and past padding: (B, q, S) bool.

    `mask` (B, S) is False at padding. A query always sees itself.
    """
    key = torch.arange(mask.shape[1], device=mask.device)
    return mask[:, None] & (key <= rows[..., None]) | (key == rows[..., None])


def weighted(logits: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Attention logits whose softmax is `exp(logit) * weight`, normalised; a query's own key counts in full.

    A weight of zero hides the key, and still has the gradient that tells what the key would have done.

    Args:
        logits: (B, heads, q, S) of the queries `rows`.
        weight: (B, S) in [0, 1].
        rows: (B, q).
    """
    floored = weight + (weight.clamp(min=1e-9) - weight).detach()
    key = torch.arange(weight.shape[1], device=weight.device)
    return logits + floored.log()[:, None].masked_fill(key == rows[..., None], 0)[:, None]


def soft_mask(mask: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A causal attention mask that adds the log of a weight per key: (B, 1, S, S), differentiable in the weights.

    Args:
        mask: (B, S), False at padding.
        weight: (B, S) in [0, 1].
        dtype: of the result.
    """
    rows = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    hidden = ~visible(mask, rows)[:, None]
    return weighted(hidden * 0.0, weight, rows).to(dtype).masked_fill(hidden, torch.finfo(dtype).min)


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the sequence: x (B, S, d), index (B, q) -> (B, q, d).

    Whole rows are copied; `gather` looks every element up, and takes ten times as long on a CPU.
    """
    return x[torch.arange(len(x), device=x.device)[:, None], index]
