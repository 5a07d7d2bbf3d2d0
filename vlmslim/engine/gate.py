"""The gate through which every forward of a patched model begins and ends.

A model may run in several threads or tasks at once, so nothing of a forward is kept on the model: each forward has a
`Call`, held by a context variable, and whatever ends the forward (Ctrl-C too) ends the call.
"""

import inspect
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from transformers import Cache

from vlmslim.engine.shadow import LOCK, Shadow

if TYPE_CHECKING:
    from vlmslim.engine.forward import Call
    from vlmslim.engine.hooks import Hooks

#: The forward that runs in this thread or task; None outside of one, and in one that vlmslim leaves alone.
RUNNING: ContextVar["Call | None"] = ContextVar("vlmslim_running", default=None)


class Gate(Shadow):
    """Stands in for `forward` of one model instance, for all the patches that it has or had.

    A patch that was removed stays in the gate as long as something needs it: a forward that runs in another thread, or
    a KV cache that holds a shortened prompt, so that a streamed answer ends as it began. New forwards begin unpatched.
    When nothing is left, the gate goes too.

    Args:
        core: the model without its head.
    """

    def __init__(self, core: Any):
        super().__init__(core, "forward", self._run)
        self.argument_names = list(inspect.signature(core.forward).parameters)
        self.patches: list[Hooks] = []  # the newest last
        self.caches = 0  # that hold a shortened prompt

    @classmethod
    def on(cls, core: Any) -> "Gate":
        """Return the gate of a model, a new one if it has none."""
        gate = cls.of(core, "forward")
        return gate if isinstance(gate, Gate) else cls(core)

    def __getstate__(self) -> dict:
        """Return the state of a copy of the model, which has no caches."""
        return vars(self) | {"caches": 0}

    def _run(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model's own forward, as a call of the newest patch."""
        kwargs |= dict(zip(self.argument_names, args, strict=False))  # LLaVA-NeXT passes input_ids by position
        with LOCK:
            hooks = self.patches[-1] if self.patches else None
            if hooks is not None:
                hooks.forwards += 1
        if hooks is None:
            return forward(**kwargs)
        before = RUNNING.get()
        try:
            call, kwargs = hooks.begin(kwargs)
            RUNNING.set(call)
            output = forward(**kwargs)
            if call is not None:
                hooks.check_ran(call)
            return output
        finally:
            RUNNING.set(before)
            with LOCK:
                hooks.forwards -= 1
                self.settle()

    def add(self, hooks: "Hooks") -> None:
        """Let in a new patch. It takes over the caches of those before it."""
        with LOCK:
            self.patches.append(hooks)
            self.stay_on_top()
            self.settle()

    def hold(self, cache: Cache) -> None:
        """Keep what is needed to decode with a shortened `cache`, as long as the cache lives."""
        with LOCK:
            self.caches += 1
        weakref.finalize(cache, self._let_go).atexit = False

    def _let_go(self) -> None:
        with LOCK:
            self.caches -= 1
            self.settle()

    def settle(self) -> None:
        """Let go of removed patches that nothing needs any more."""
        with LOCK:
            for hooks in self.patches[:]:
                decodes = self.caches > 0 and hooks is self.patches[-1]
                if hooks.removed and not hooks.forwards and not decodes:
                    hooks.detach()
                    self.patches.remove(hooks)
            if not self.patches:
                self.lift()
