"""Keys that a method looked at before a decoder layer: the layer attends with them, and does not project them again."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vlmslim.engine.sharding import tensor_parallel_mesh
from vlmslim.ops.attention import gather_rows

if TYPE_CHECKING:
    from vlmslim.engine.hooks import Hooks


@dataclass
class ComingKeys:
    """Output of the key projection of a decoder layer, from the look of a method until the layer has run.

    layer : number of the decoder layer
    made  : (B, S, v) of the tokens that enter it, before rotation; None until a method looks
    ready : only the tokens that stay are left, and the layer takes them
    """

    layer: int
    made: Tensor | None = None
    ready: bool = False

    def keep(self, index: Tensor | None, hidden: Tensor) -> "ComingKeys | None":
        """Return the keys of the tokens that stay; None where the layer has to make them itself.

        Args:
            index: (B, S') the tokens that stay; None if all do.
            hidden: (B, S, d) the tokens that entered. A method may have looked at fewer of them.
        """
        if self.made is None or self.made.shape[1] != hidden.shape[1] or torch.is_grad_enabled():
            return None
        made = self.made if index is None else gather_rows(self.made, index.to(self.made.device))
        return ComingKeys(self.layer, made, ready=True)


@dataclass
class KeyProjection:
    """The hooks of a layer's key projection: they note what it makes when a method looks, and give it to the layer.

    hooks : of the patch
    layer : number of the decoder layer
    """

    hooks: "Hooks"
    layer: int

    def attach(self, attention: Any) -> list[RemovableHandle]:
        """Register the hooks. A projection that is no plain linear layer, or makes part of the heads, gets none."""
        projection = getattr(attention, "k_proj", None)
        if type(projection) is not nn.Linear or tensor_parallel_mesh(attention) is not None:
            return []
        return [projection.register_forward_pre_hook(self.enter), projection.register_forward_hook(self.leave)]

    @property
    def keys(self) -> ComingKeys | None:
        """The keys of this layer in the forward that runs in this thread or task; None outside of a drop before it."""
        call = self.hooks.call
        return call.coming if call is not None and call.coming is not None and call.coming.layer == self.layer else None

    def enter(self, projection: nn.Module, args: tuple) -> tuple | None:
        """Leave no token to project if the keys are there."""
        return (args[0][:, :0],) if self.keys is not None and self.keys.ready else None

    def leave(self, projection: nn.Module, args: tuple, made: Tensor) -> Tensor | None:
        """Note the keys that a method looks at; return them when the layer runs."""
        call, keys = self.hooks.call, self.keys
        if call is None or keys is None:
            return None
        if not keys.ready:
            keys.made = made
            return None
        assert keys.made is not None
        call.coming = None
        return keys.made.to(made)
