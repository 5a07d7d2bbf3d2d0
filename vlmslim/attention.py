"""Attention that fused kernels never hand out, recomputed for just the rows a method asks for."""

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


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


def decoder_attention(
    layer: nn.Module, hidden: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, rows: Tensor
) -> Tensor:
    """Scaled, masked attention logits of a decoder layer for some of its query rows.

    Submodules are called, never their weights read, so that offloaded layers work too.

    Args:
        layer: the decoder layer (Llama, Mistral, Qwen2 and relatives).
        hidden: (B, S, d) its input.
        rope: cosine and sine, (B or 1, S, head_dim) each.
        mask: (B, S), False at padding.
        rows: (B, q) indices of the query tokens.

    Returns:
        (B, heads, q, S) in fp32, -inf where a query may not look. A query always sees itself, so that a padding
        query does not become NaN.
    """
    attn = layer.self_attn
    batch, size = hidden.shape[:2]
    x = layer.input_layernorm(hidden)
    q = attn.q_proj(take(x, rows)).unflatten(-1, (-1, attn.head_dim))
    k = attn.k_proj(x).unflatten(-1, (-1, attn.head_dim))
    if hasattr(attn, "q_norm"):  # Qwen3 and relatives
        q, k = attn.q_norm(q), attn.k_norm(k)
    cos, sin = (t.to(x.device).expand(batch, -1, -1) for t in rope)
    q, _ = apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), take(cos, rows), take(sin, rows))
    k, _ = apply_rotary_pos_emb(k.transpose(1, 2), k.transpose(1, 2), cos, sin)
    q = q.unflatten(1, (k.shape[1], -1)).float()  # (B, kv heads, group, q, head_dim)
    with torch.autocast(x.device.type, enabled=False):
        logits = (q @ k.float().unsqueeze(2).transpose(-1, -2)).flatten(1, 2) * attn.scaling
    key = torch.arange(size, device=x.device)
    visible = mask.to(x.device)[:, None] & (key <= rows[..., None]) | (key == rows[..., None])  # (B, q, S)
    return logits.masked_fill(~visible[:, None], float("-inf"))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the sequence: x (B, S, d), index (B, q) -> (B, q, d)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
