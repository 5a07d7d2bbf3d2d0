"""One encoding of the same pictures for several patches."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor

from vlmslim.engine.encoded import put_record, record_of


class SharedEncoding:
    """The latest outputs of a model's encoder, for patches that take turns on the same inputs.

    It holds one output for images and one for videos, so its memory is that of one batch. Inputs are the same if they
    are the same tensors, so a caller who writes into a tensor must not share it.

    Args:
        tower_layers: the layers of the vision tower that any of the patches reads.
        counts_only: none of the patches looks at pictures.
    """

    def __init__(self, tower_layers: Iterable[int], counts_only: bool):
        self.tower_layers, self.counts_only = tuple(sorted(set(tower_layers))), counts_only
        self._held: dict[str, tuple[dict[str, Any], Any]] = {}

    def find(self, kind: str, given: dict[str, Any]) -> Any:
        """Return the output for the arguments `given` of an encoding, or None."""
        before, output = self._held.get(kind, ({}, None))
        same = before.keys() == given.keys() and all(_same(before[name], value) for name, value in given.items())
        return _copied(output) if same and output is not None else None

    def hold(self, kind: str, given: dict[str, Any], output: Any) -> None:
        """Keep an output in place of the one before."""
        self._held[kind] = given, _copied(output)

    def forget(self) -> None:
        """Free the memory."""
        self._held.clear()


def _same(a: Any, b: Any) -> bool:
    """Tell whether two arguments of an encoding are one tensor, or equal settings."""
    return a is b or not isinstance(a, Tensor) and repr(a) == repr(b)


def _copied(output: Any) -> Any:
    """Copy an output and share its tensors, because `generate` puts others in their place when it expands beams.

    The hidden states of all layers of the tower stay out of the copy, because they are the most of its memory and the
    model reads them no more.
    """
    copied = type(output)(**{k: v for k, v in output.items() if k not in ("hidden_states", "attentions")})
    copied.pooler_output = output.pooler_output  # transformers 5.17 has outputs whose fields it is not among
    put_record(copied, record_of(output))
    return copied
