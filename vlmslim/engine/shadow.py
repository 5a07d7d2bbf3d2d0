"""Functions that stand in for others on one object, and leave what was there before."""

import inspect
import threading
from collections.abc import Callable
from typing import Any

#: The lock of all shadows, one because Python may free a KV cache in the middle of any of these functions, which then
#: may lift the shadow of a `forward`. It is no attribute, because models are copied and pickled, and locks cannot be.
LOCK = threading.RLock()


class Shadow:
    """Stands in for the function `name` of one object, until it is lifted.

    The function that was there before is called, and put back: a method of the class, or a function that a user set on
    the object. If a user sets another function while the stand-in is there, `stay_on_top` stands in for that one too.

    Args:
        owner: the object.
        name: of the function.
        call: called in its place, with the function that was there and its arguments.
    """

    def __init__(self, owner: Any, name: str, call: Callable[..., Any]):
        self.owner, self.name, self.call = owner, name, call
        self.top: StandIn | None = None

    @staticmethod
    def of(owner: Any, name: str) -> "Shadow | None":
        """Return the shadow that stands in for a function of an object now; None without one."""
        found = vars(owner).get(name)
        return found.shadow if isinstance(found, StandIn) else None

    def stay_on_top(self) -> None:
        """Stand in for the function that is there now."""
        with LOCK:
            if self.top is None or vars(self.owner).get(self.name) is not self.top:
                self.top = StandIn(self, getattr(self.owner, self.name), vars(self.owner).get(self.name))
                setattr(self.owner, self.name, self.top)

    def lift(self) -> None:
        """Put back what was there. A function that was set later stays, and may go on calling the stand-in."""
        with LOCK:
            top, self.top = self.top, None
            if top is None or vars(self.owner).get(self.name) is not top:
                return
            if top.own is None:
                delattr(self.owner, self.name)
            else:
                setattr(self.owner, self.name, top.own)


class StandIn:
    """The function that a `Shadow` puts on its object.

    Args:
        shadow: the shadow to which it belongs.
        below: the function that it stands in for.
        own: the same, if a user set it on the object; None if it is of the class.
    """

    def __init__(self, shadow: Shadow, below: Callable[..., Any], own: Any):
        self.shadow, self.below, self.own = shadow, below, own
        self.__signature__ = inspect.signature(below)  # generate() picks its arguments by name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call in place of the function; or the function itself, under a later stand-in and after the patch."""
        if self.shadow.top is not self:
            return self.below(*args, **kwargs)
        return self.shadow.call(self.below, *args, **kwargs)
