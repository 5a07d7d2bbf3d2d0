"""Queries and keys of a decoder layer, as the layer's own attention module makes them.

The module runs up to the point at which it would attend, and no further. So norms, biases, rotations and scalings are
those of the module, whatever decoder it belongs to.
"""

import copy
import inspect
from collections.abc import Callable, Collection
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, NoReturn, Self, TypeAlias

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vlmslim.engine.sharding import gathered, is_sharded, tensor_parallel_mesh, whole_keys
from vlmslim.ops.attention import DecoderAttention, Part, QueriesKeys, gather_rows

_PROBE = "vlmslim_probe"
#: Arguments by which no attention weight changes once rows, mask and positions are known.
_WITHOUT_EFFECT = {
    *("attention_mask", "cache", "past_key_values", "layer_past", "cache_position", "use_cache", "output_attentions"),
    *("dropout", "is_causal", "position_ids", "target_dtype", "deterministic", "output_hidden_states", "return_dict"),
}


Rotary: TypeAlias = Tensor | tuple[Tensor, ...] | None
#: The projections that need not run for what is read of the result.
_IDLE: dict[Part, tuple[str, ...]] = {
    "both": ("v_proj",),
    "queries": ("k_proj", "v_proj"),
    "keys": ("q_proj", "v_proj"),
}


class _Reached(Exception):
    """Carries what a module was about to attend with."""

    def __init__(self, found: QueriesKeys):
        self.found = found


def _stop(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> NoReturn:
    """Stand in for an attention function of transformers."""
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown:
        raise RuntimeError(
            f"{type(module).__name__} attends with {', '.join(unknown)}, by which vlmslim cannot recompute attention; "
            "use a method that works before the language model"
        )
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    raise _Reached(QueriesKeys(query, key, scaling, softcap, s_aux, sliding_window))


ALL_ATTENTION_FUNCTIONS.register(_PROBE, _stop)


class _Probing:
    """A model's configuration, except that it names the attention function above."""

    _attn_implementation = _PROBE

    def __init__(self, config: Any):
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def attention_of(layer: nn.Module) -> nn.Module | None:
    """Find the module of a decoder layer that attends through transformers' attention interface; None without one."""
    candidates = [module for module in layer.modules() if module is not layer and _uses_interface(type(module))]
    return candidates[0] if len(candidates) == 1 else None


def _uses_interface(kind: type) -> bool:
    forward = inspect.unwrap(kind.forward) if hasattr(kind, "forward") else None
    return "ALL_ATTENTION_FUNCTIONS" in getattr(getattr(forward, "__code__", None), "co_names", ())


class _Entered(Exception):
    """Ends a layer at its attention module, and carries what the layer gave to it."""

    def __init__(self, found: "LayerAttention"):
        self.found = found


#: The layer that runs up to its attention module and no further, in this thread or task.
_COMING: ContextVar[nn.Module | None] = ContextVar("vlmslim_coming", default=None)


@dataclass
class LayerAttention:
    """The attention of a decoder layer: its attention module, and what the layer gave to it.

    module   : the attention module
    hidden   : (B, S, d)
    rotary   : cosine and sine, (B or 1, S, head_dim) each, or what else turns heads; None where it is given nothing
    position : (B or 1, S) rotary positions; None where the module is given none
    mesh     : the processes over which the heads are split; None if they are not
    made     : queries and keys of all rows, where they can be made only while the layer runs
    held     : (B, own kv heads, P, head_dim) keys that the KV cache held before this forward, where `attend` is given
               none; None if there were none
    """

    module: nn.Module
    hidden: Tensor
    rotary: Rotary = None
    position: Tensor | None = None
    mesh: Any = None
    made: QueriesKeys | None = None
    held: Tensor | None = None

    @classmethod
    def coming(cls, layer: nn.Module, hidden: Tensor, kwargs: dict, held: Tensor | None) -> "LayerAttention":
        """Find out with what a layer is about to attend, before it runs.

        The layer runs up to its attention module, on which `stop_if_coming` is a hook, so that its own norm counts.

        Args:
            layer: the decoder layer.
            hidden: (B, S, d) what enters it.
            kwargs: with which it will be called.
            held: see `held`.

        Raises:
            RuntimeError: the layer has its weights only while it runs.
        """
        device = next(layer.parameters()).device
        if is_sharded(layer) or device.type == "meta":
            raise RuntimeError(
                f"{type(layer).__name__} has its weights only while it runs, because of FSDP or offloading, so the "
                "attention that it will pay is unknown before; use a method that reads the layer before, such as fastv"
            )
        moved = {name: _each(x, lambda x: x.to(device)) for name, x in kwargs.items() if name == "position_embeddings"}
        kind: Any = type(layer)
        running = _COMING.set(layer)
        try:
            kind.forward(layer, hidden.to(device), **kwargs | moved)
        except _Entered as entered:
            return replace(entered.found, held=held)
        finally:
            _COMING.reset(running)
        raise RuntimeError(f"{kind.__name__} did not reach its attention module")

    @classmethod
    def entered(cls, layer: nn.Module, module: nn.Module, args: tuple, kwargs: dict) -> "LayerAttention":
        """Note the arguments with which a layer that is running calls its attention module.

        Raises:
            RuntimeError: the module takes something else that belongs to single tokens.
        """
        names = list(inspect.signature(type(module).forward).parameters)[1:]
        named = dict(zip(names, args, strict=False)) | kwargs
        hidden = named[names[0]]
        for name, value in named.items():
            # other arguments are on their way through the model, such as `logits_to_keep`
            matters = name in names[1:] and name not in ("position_embeddings", *_WITHOUT_EFFECT)
            if matters and isinstance(value, Tensor):
                raise RuntimeError(
                    f"{type(module).__name__} is given {name}, with which vlmslim cannot recompute attention; "
                    "use a method that works before the language model"
                )
        rotary, position = named.get("position_embeddings"), named.get("position_ids")
        found = cls(module, hidden, rotary, position, tensor_parallel_mesh(module))
        if is_sharded(layer):
            found.made = found.project()
        return found

    def project(self, rows: Tensor | None = None, part: Part = "both") -> QueriesKeys:
        """Make queries and keys of some rows (B, q), or of all; of all heads, on every process.

        Args:
            rows: indices (B, q); None for all.
            part: what is read of the result, so that nothing else needs to be made.
        """
        hidden, position = self.hidden, self.position
        rotary = _each(self.rotary, lambda x: x.to(hidden.device))
        if rows is not None:
            at, batch = rows.to(hidden.device), len(hidden)
            hidden = gather_rows(hidden, at)
            rotary = _each(rotary, lambda x: gather_rows(x.expand(batch, -1, -1), at))
            if position is not None:
                position = position.to(at.device).expand(batch, -1).gather(1, at)
        if self.mesh is not None:
            return gathered(probe(self.module, hidden, rotary, position), self.module, self.mesh)
        return probe(self.module, hidden, rotary, position, part)

    def first(self, count: int) -> Self:
        """Return the same without the tokens after the first `count` of every row."""
        return replace(
            self,
            hidden=self.hidden[:, :count],
            rotary=_each(self.rotary, lambda x: x[:, :count]),
            position=None if self.position is None else self.position[:, :count],
            made=None
            if self.made is None
            else replace(self.made, q=self.made.q[:, :, :count], k=self.made.k[:, :, :count]),
        )

    def attend(
        self, mask: Tensor, keys: Tensor | None, prefix: int = 0, blocks: Tensor | None = None
    ) -> DecoderAttention:
        """Return the attention of the layer.

        Args:
            mask: (B, P + S) False at padding, of P tokens that were cached before and of the S tokens of this forward.
            keys: (B, own kv heads, P + S, head_dim) the layer's keys in the KV cache; None if it does not have them.
            prefix: P.
            blocks: (B, P + S) tokens of one block see each other both ways, -1 for none; None if all are causal.
        """
        made, given = self.made, self.held if keys is None else keys
        if given is not None and self.mesh is not None:
            given = whole_keys(given, self.module, self.mesh)
        if keys is None and given is not None:
            made = self.project() if made is None else made
            given = torch.cat([given, made.k], dim=2)
        return DecoderAttention(self.project, mask, given, prefix, made, blocks)


def stop_if_coming(layer: nn.Module, module: nn.Module, args: tuple, kwargs: dict) -> None:
    """End a layer that `LayerAttention.coming` runs, at its attention module: a forward pre-hook of that module."""
    if _COMING.get() is layer:
        raise _Entered(LayerAttention.entered(layer, module, args, kwargs))


def _each(rotary: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change cosine and sine, or what else turns heads; None stays None."""
    if rotary is None:
        return None
    return change(rotary) if isinstance(rotary, Tensor) else tuple(map(change, rotary))


def tower_heads(module: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
    """Make the queries and keys of an attention module of a vision tower that takes the patches of all images at once.

    Args:
        module: the attention module.
        args: of its call.
        kwargs: of its call. Bounds between images are left out, because no patch attends here.

    Returns:
        (heads, N, head_dim) each, turned by position and unscaled.
    """
    kind: Any = type(module)
    if "cu_seqlens" in kwargs:
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = kwargs | {"cu_seqlens": kwargs["cu_seqlens"].new_tensor([0, len(hidden)])}
    try:
        kind.forward(_twin(module, _IDLE["both"]), *args, **kwargs)
    except _Reached as reached:
        return reached.found.q[0], reached.found.k[0]
    raise RuntimeError(f"{kind.__name__} does not attend through transformers' attention interface")


def _twin(module: nn.Module, idle: Collection[str] = ()) -> nn.Module:
    """Copy a module, without hooks and without the `forward` that accelerate puts on an instance.

    Projections named in `idle` make zeros in the copy.
    """
    twin = copy.copy(module)
    twin.config = _Probing(module.config)  # type: ignore[assignment]
    twin._modules = dict(module._modules)
    for name in idle:
        width = getattr(twin._modules.get(name), "out_features", None)
        if width is not None:
            twin._modules[name] = _Zeros(width)
    return twin


class _Zeros(nn.Module):
    """Stands in for a linear layer whose output is not read, because computing it would take time."""

    def __init__(self, width: int):
        super().__init__()
        self.out_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], self.out_features)


def probe(
    module: nn.Module,
    hidden: Tensor,
    rotary: Rotary = None,
    position: Tensor | None = None,
    part: Part = "both",
) -> QueriesKeys:
    """Run an attention module up to the point at which it would attend.

    A shallow copy of the module runs, with a configuration of its own, because other threads use the module meanwhile.

    Args:
        module: an attention module of transformers.
        hidden: (B, s, d) its input.
        rotary: what turns the heads, cosine and sine (B or 1, s, head_dim) in most models.
        position: (B or 1, s) rotary positions.
        part: what is read of the result. The rest may be zeros, in modules that make it by a projection of its own.

    Raises:
        RuntimeError: the module does not attend through transformers' attention interface.
    """
    kind: Any = type(module)
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    required = {p.name: None for p in parameters[1:] if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    offered = {"position_embeddings": rotary, "position_ids": position}
    named = {p.name for p in parameters}
    given = {name: x for name, x in offered.items() if name in named or takes_more and x is not None}
    try:
        kind.forward(_twin(module, _IDLE[part]), hidden, **required | given)
    except _Reached as reached:
        return reached.found
    raise RuntimeError(f"{kind.__name__} does not attend through transformers' attention interface")
