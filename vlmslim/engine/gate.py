"""Where every forward of a patched model begins and ends.

A model may run in several threads or tasks at once, so nothing of a forward is kept on the model: each forward has a
`Call`, held by a context variable, and whatever ends the forward (Ctrl-C too) ends the call.
"""

import inspect
import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from transformers import Cache

if TYPE_CHECKING:
    from vlmslim.engine.forward import Call
    from vlmslim.engine.hooks import Hooks

#: The forward that runs in this thread or task; None outside of one, and in one that vlmslim leaves alone.
RUNNING: ContextVar["Call | None"] = ContextVar("vlmslim_running", default=None)

_LOCK = threading.RLock()  # of all gates: copying or pickling a model copies its gate, and locks cannot be copied


class Gate:
    """Stands in for `forward` of one model instance, for all the patches that it has or had.

    A patch that was removed stays behind the gate as long as something needs it: a forward that runs in another
    thread, or a KV cache that holds a shortened prompt, so that a streamed answer ends as it began. New forwards begin
    unpatched. When nothing is left, the gate goes too.

    Args:
        core: the model without its head.
    """

    def __init__(self, core: Any):
        self.core, self.forward, self.covered = core, core.forward, vars(core).get("forward")
        self.__signature__ = inspect.signature(self.forward)
        self.argument_names = list(self.__signature__.parameters)
        self.patches: list[Hooks] = []  # the newest last
        self.caches = 0  # that hold a shortened prompt

    @classmethod
    def of(cls, core: Any) -> "Gate":
        """Return the gate of a model, a new one if it has none."""
        gate = vars(core).get("forward")
        if not isinstance(gate, Gate):
            gate = core.forward = cls(core)
        return gate

    def __getstate__(self) -> dict:
        """Return the state of a copy of the model, which has no caches."""
        return vars(self) | {"caches": 0}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward, as a call of the newest patch."""
        kwargs |= dict(zip(self.argument_names, args, strict=False))  # LLaVA-NeXT passes input_ids by position
        with _LOCK:
            hooks = self.patches[-1] if self.patches else None
            if hooks is not None:
                hooks.forwards += 1
        if hooks is None:
            return self.forward(**kwargs)
        before = RUNNING.get()
        try:
            call, kwargs = hooks.begin(kwargs)
            RUNNING.set(call)
            output = self.forward(**kwargs)
            if call is not None:
                hooks.check_ran(call)
            return output
        finally:
            RUNNING.set(before)
            with _LOCK:
                hooks.forwards -= 1
                self.settle()

    def add(self, hooks: "Hooks") -> None:
        """Let in a new patch. It takes over the caches of those before it."""
        with _LOCK:
            self.patches.append(hooks)
            self.settle()

    def hold(self, cache: Cache) -> None:
        """Keep what is needed to decode with a shortened `cache`, as long as the cache lives."""
        with _LOCK:
            self.caches += 1
        weakref.finalize(cache, self._let_go).atexit = False

    def _let_go(self) -> None:
        with _LOCK:
            self.caches -= 1
            self.settle()

    def settle(self) -> None:
        """Let go of removed patches that nothing needs any more."""
        with _LOCK:
            for hooks in self.patches[:]:
                decodes = self.caches > 0 and hooks is self.patches[-1]
                if hooks.removed and not hooks.forwards and not decodes:
                    hooks.detach()
                    self.patches.remove(hooks)
            if not self.patches and vars(self.core).get("forward") is self:
                del self.core.forward
                if self.covered is not None:
                    self.core.forward = self.covered
