"""Attention that fused kernels never return, recomputed for only the rows that a method asks for."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from vlmslim.ops.ranking import full_precision

# --- vision towers ---------------------------------------------------------------------------------------------------


def tower_attention(layer: Any) -> Any:
    """Return the attention module of a vision-tower layer; None where it has another name than in known towers."""
    return getattr(layer, "self_attn", None) or getattr(layer, "attention", None)


def tower_norm(layer: Any) -> Any:
    """Return what normalises the input of a vision-tower layer's attention; None where it has another name."""
    return getattr(layer, "layer_norm1", None) or getattr(layer, "layernorm_before", None)


def head_makers(layer: Any) -> tuple[list[Any], list[Any]]:
    """Return the modules that make the queries of a CLIP, SigLIP or InternViT encoder layer, and those of the keys.

    They run one after the other: the projection, and in InternViT a norm.
    """
    attention = tower_attention(layer)
    steps = ("proj", "norm") if hasattr(attention, "q_norm") else ("proj",)
    queries, keys = ([getattr(attention, f"{part}_{step}") for step in steps] for part in "qk")
    return queries, keys


def split_heads(layer: Any, projected: Tensor) -> Tensor:
    """Split queries or keys of a tower layer: (c, p, v) -> (c, heads, p, v / heads)."""
    return projected.unflatten(-1, (tower_attention(layer).num_heads, -1)).transpose(1, 2)


def tower_qk(layer: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the queries and keys of a CLIP, SigLIP or InternViT encoder layer, unscaled.

    Args:
        layer: the encoder layer.
        hidden: (c, p, v) its input.

    Returns:
        q and k: (c, heads, p, v / heads) each.
    """
    x = tower_norm(layer)(hidden)
    q, k = (reduce(lambda made, module: module(made), makers, x) for makers in head_makers(layer))
    return split_heads(layer, q), split_heads(layer, k)


@full_precision
def cls_logits(q: Tensor, k: Tensor) -> Tensor:
    """Compute the attention logits from CLS to each patch, before the softmax, averaged over heads.

    Args:
        q: (c, heads, 1 + p, d) unscaled queries, CLS first.
        k: (c, heads, 1 + p, d) keys.

    Returns:
        (c, p).
    """
    return torch.einsum("chd,chpd->cp", q[:, :, 0], k[:, :, 1:].float()) / (q.shape[1] * q.shape[-1] ** 0.5)


@full_precision
def cls_attention(q: Tensor, k: Tensor) -> Tensor:
    """Compute the attention from CLS to each patch, averaged over heads. CLS itself takes part in the softmax.

    Args:
        q: (c, heads, 1 + p, d) unscaled queries, CLS first.
        k: (c, heads, 1 + p, d) keys.

    Returns:
        (c, p).
    """
    return (torch.einsum("chd,chpd->chp", q[:, :, 0], k.float()) / q.shape[-1] ** 0.5).softmax(-1).mean(1)[:, 1:]


@full_precision
def received_attention(q: Tensor, k: Tensor) -> Tensor:
    """Compute the attention that each patch receives, averaged over queries and heads.

    The function goes head by head, so that only one head's map is in memory.

    Args:
        q: (c, heads, p, d) unscaled queries.
        k: (c, heads, p, d) keys.

    Returns:
        (c, p).
    """
    received = torch.zeros(len(q), q.shape[2], device=q.device)
    for q_head, k_head in zip((q / q.shape[-1] ** 0.5).unbind(1), k.float().unbind(1), strict=True):
        received += (q_head @ k_head.transpose(1, 2)).softmax(-1).mean(1)
    return received / q.shape[1]


# --- decoders --------------------------------------------------------------------------------------------------------


#: What is read of the queries and keys that a layer makes.
Part: TypeAlias = Literal["both", "queries", "keys"]


@dataclass
class QueriesKeys:
    """Queries and keys with which an attention module attends, normalised and rotated.

    q       : (B, heads, s, head_dim)
    k       : (B, kv heads, s, head_dim)
    scaling : factor of the logits
    softcap : logits are squeezed into (-softcap, softcap); None if they are not
    sinks   : (heads,) logit of one more key, which takes attention and gives nothing; None without one
    window  : a query sees this many tokens, itself included; None if it sees all before it
    """

    q: Tensor
    k: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None


class Project(Protocol):
    """Makes queries and keys of some rows (B, q), or of all S rows for None."""

    def __call__(self, rows: Tensor | None = None, part: Part = "both") -> QueriesKeys:
        """Make at least the part that is read."""
        ...


class DecoderAttention:
    """Attention of one decoder layer, for the rows one asks for.

    Keys are taken from the KV cache, or projected once. Queries are projected on demand, and logits computed.

    Args:
        project: makes queries and keys.
        mask: (B, P + S) False at padding, of P tokens that were cached before and of the S tokens of this forward.
        keys: (B, kv heads, P + S, head_dim) the layer's rotated keys; None projects them, where P is 0.
        prefix: P.
        made: queries and keys of all S rows, if they have been projected already.
        blocks: (B, P + S) tokens of one block see each other both ways, -1 for none; None if all see only what is
            before them.
    """

    def __init__(
        self,
        project: Project,
        mask: Tensor,
        keys: Tensor | None = None,
        prefix: int = 0,
        made: QueriesKeys | None = None,
        blocks: Tensor | None = None,
    ):
        self._project, self.prefix, self.blocks = project, prefix, blocks
        self._sinks: Tensor | None = None
        if keys is None:
            keys = (made or project(part="keys")).k
        self._all, self.keys = made, keys.float()
        self.mask = mask.to(keys.device)

    def logits(self, rows: Tensor, end: int | None = None) -> Tensor:
        """Compute the scaled and masked logits of some rows.

        Args:
            rows: (B, q) indices of the query tokens among the S.
            end: look at the keys before `end` only, which is all that rows before `end` can see; None for all keys.

        Returns:
            (B, heads, q, P + end) in fp32, -inf where a query may not look. A query always sees itself, so that the
            softmax of a padding query does not become NaN.
        """
        made = self._made(rows)
        end = None if end is None else self.prefix + end
        k, mask = self.keys[:, :, :end], self.mask[:, :end]
        q = made.q.unflatten(1, (k.shape[1], -1)).float()  # (B, kv heads, group, q, head_dim)
        with torch.autocast(q.device.type, enabled=False):
            logits = (q @ k.unsqueeze(2).transpose(-1, -2)).flatten(1, 2).mul_(made.scaling)
            if made.softcap is not None:
                logits = made.softcap * (logits / made.softcap).tanh()
        self._sinks = made.sinks
        seen = visible(mask, self.prefix + rows, made.window, self.blocks)
        return logits.masked_fill_(~seen[:, None], float("-inf"))

    def softmax(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Turn logits (B, heads, q, P + S) into the attention that the S tokens receive: (B, heads, q, S)."""
        if self._sinks is None:
            return logits.div_(temperature).softmax(-1)[..., self.prefix :]
        sinks = self._sinks.float()[:, None, None].expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sinks], -1).div_(temperature).softmax(-1)[..., self.prefix : -1]

    def _made(self, rows: Tensor) -> QueriesKeys:
        if self._all is None:
            return self._project(rows, "queries")
        q = self._all.q
        return replace(self._all, q=q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3])))


def attention_rows(
    attend: Callable[[Tensor], Tensor], queries: Tensor, chunk: int = 128, heads: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute the attention of many query tokens, a few at a time, averaged over heads.

    Args:
        attend: softmax attention of query rows: (B, q) -> (B, heads, q, S), such as `LayerInput.attention`.
        queries: (B, S) bool.
        chunk: number of queries per step. A step needs memory for B x heads x chunk x S numbers.
        heads: keep the heads apart: (B, heads, q, S) is what each query pays.

    Yields:
        The indices (B, q) of some queries, and what each pays to each token, (B, q, S) in fp32. In rows with fewer
        queries than others, other tokens fill up the last steps; their attention is zero.
    """
    width = int(queries.sum(1).max())
    rows = queries.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
    for part in rows.split(chunk, dim=1) if width else ():
        paid, asked = attend(part).float(), queries.gather(1, part)[..., None]
        yield part, paid * asked[:, None] if heads else paid.mean(1) * asked


def visible(mask: Tensor, rows: Tensor, window: int | None = None, blocks: Tensor | None = None) -> Tensor:
    """Tell which keys the queries may look at: those before them that are not padding, and themselves.

    Args:
        mask: (B, S), False at padding.
        rows: (B, q) indices of the queries.
        window: queries see no token that is so many tokens before them, or more; None if they see all.
        blocks: (B, S) tokens of one block see each other both ways; -1 for none.

    Returns:
        (B, q, S) bool.
    """
    key = torch.arange(mask.shape[1], device=mask.device)
    seen = key <= rows[..., None]
    if blocks is not None:
        blocks = blocks.to(mask.device)
        own = blocks.gather(1, rows.to(mask.device))[..., None]
        seen = seen | (own == blocks[:, None]) & (own >= 0)
    if window is not None:
        seen = seen & (key > rows[..., None] - window)
    return mask[:, None] & seen | (key == rows[..., None])


def weighted_logits(logits: Tensor, weight: Tensor, rows: Tensor) -> Tensor:
    """Add weights to attention logits, so that their softmax is `exp(logit) * weight`, normalised.

    A query's own key counts in full. A weight of zero hides the key, and still has the gradient that tells what the
    key would have changed.

    Args:
        logits: (B, heads, q, S) of the queries `rows`.
        weight: (B, S) in [0, 1].
        rows: (B, q).

    Returns:
        (B, heads, q, S).
    """
    floored = weight + (weight.clamp(min=1e-9) - weight).detach()
    key = torch.arange(weight.shape[1], device=weight.device)
    return logits + floored.log()[:, None].masked_fill(key == rows[..., None], 0)[:, None]


def weighted_causal_mask(mask: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Make a causal attention mask that adds the logarithm of a weight per key, differentiable in the weights.

    Args:
        mask: (B, S), False at padding.
        weight: (B, S) in [0, 1].
        dtype: of the result.

    Returns:
        (B, 1, S, S).
    """
    rows = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    hidden = ~visible(mask, rows)[:, None]
    return weighted_logits(hidden * 0.0, weight, rows).to(dtype).masked_fill(hidden, torch.finfo(dtype).min)


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Gather along the sequence: x (B, S, d), index (B, q) -> (B, q, d).

    Indexing copies whole rows. `Tensor.gather` looks up every element, which takes ten times as long on a CPU.
    """
    return x[torch.arange(len(x), device=x.device)[:, None], index]
