"""A method as it was before it saw any prompt."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from vlmslim.compressor import Compressor
from vlmslim.patching import Slim


def twin_of(model: nn.Module) -> nn.Module:
    """Another model of the same classes, which shares the weights: no memory, and it notices if they are changed."""
    return copy.deepcopy(model, _shared(model))


def _shared(model: nn.Module) -> dict[int, object]:
    return {id(t): t for t in (*model.parameters(), *model.buffers())}


class Fresh:
    """The methods of a patch as they are now, with what their classes remember, to be put on another model later.

    What a method keeps where neither its object nor its class holds it is beyond reach.
    """

    def __init__(self, slim: Slim):
        self._parts = {
            name: {k: v.clone() for k, v in part.state_dict().items()} for name, part in slim.trained.items()
        }
        model = slim.model
        models = {id(x): x for x in (*model.modules(), *model.parameters(), *model.buffers())}
        self._methods = [_copied(method, models) for method in slim.methods]
        stages = [stage for method in slim.methods for stage in method.stages()]
        classes = {cls for x in (*slim.methods, *stages) for cls in type(x).__mro__ if issubclass(cls, Compressor)}
        self._memories = [
            (cls, name, _copied(value, models))
            for cls in classes - {Compressor}
            for name, value in vars(cls).items()
            if isinstance(value, dict | list | set) and not name.startswith("__")
        ]

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Slim]:
        """A patch of `model`, which nobody has patched, with these methods. Once only: they remember it."""
        now = [(cls, name, vars(cls)[name]) for cls, name, _ in self._memories]
        for cls, name, value in self._memories:
            setattr(cls, name, value)
        try:
            with Slim(model, self._methods) as slim:
                for name, state in self._parts.items():
                    slim.trained[name].load_state_dict(state)
                yield slim
        finally:
            for cls, name, value in now:
                setattr(cls, name, value)


def _copied(value: object, shared: dict[int, object]) -> object:
    """A deep copy that shares the model's parts; the value itself if it cannot be copied."""
    try:
        return copy.deepcopy(value, dict(shared))
    except Exception:  # a method may hold anything: a file, a lock
        return value
