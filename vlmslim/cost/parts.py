"""FLOPs of a real prefill, by part: tower, projector, method, language model and LM head."""

from collections.abc import Callable, Mapping
from functools import partial, wraps
from math import prod
from typing import Any

import torch
from torch import Size
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vlmslim.engine.families import encoder, language_model, projector

PARTS = ("tower", "projector", "method", "language_model", "lm_head", "rest")


@torch.inference_mode()
def count_flops(model: Any, inputs: Mapping) -> dict[str, int]:
    """Count the FLOPs of the matrix products of one prefill by part, with `torch.utils.flop_counter`.

    "method" is the work inside `encode`, `compress_images` and `retain`, including modules of the model that a method
    calls, such as the projector. The engine's work with the answers of a method (gathering tokens, masks) is the
    language model's.

    Args:
        model: patched or not.
        inputs: inputs of one forward; a batch is counted as a whole.
    """
    with flop_counter() as counter, _FlopsByPart(model, counter.get_total_flops) as parts:
        model(**inputs, logits_to_keep=1, use_cache=True)
    return parts.flops


def flop_counter() -> FlopCounterMode:
    """Make PyTorch's counter, silent, and with the CPU's attention kernel, which torch before 2.15 does not count."""

    def attention(query: Size, key: Size, value: Size, *_: Any, **__: Any) -> int:
        return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={} if kernel in flop_registry else {kernel: attention})


class _FlopsByPart:
    """A context manager that splits a running total of FLOPs among `PARTS` while a model runs.

    Each part counts without the parts inside it, except that everything inside a method is the method's.
    """

    def __init__(self, model: Any, total: Callable[[], int]):
        self.model, self.total = model, total
        self.flops = dict.fromkeys(PARTS, 0)
        self.running = ["rest"]  # the parts that have been entered and not left
        self.undo: list[Callable[[], Any]] = []

    def __enter__(self) -> "_FlopsByPart":
        core = self.model.model
        modules = {
            "tower": encoder(core),
            "projector": projector(core),
            "language_model": language_model(core),
            "lm_head": self.model.lm_head,
        }
        for part, module in modules.items():
            self.undo += [
                module.register_forward_pre_hook(lambda *_, part=part: self._enter(part), prepend=True).remove,
                module.register_forward_hook(lambda *_: self._leave()).remove,
            ]
        slim = getattr(self.model, "_vlmslim", None)
        for stage in slim.stages if slim else ():
            for name in ("encode", "ask", "retain"):
                setattr(stage.method, name, self._counted(getattr(stage.method, name)))
                self.undo.append(partial(delattr, stage.method, name))
        self.mark = self.total()
        return self

    def __exit__(self, *_: object) -> None:
        self._add()
        for undo in reversed(self.undo):
            undo()

    def _counted(self, function: Callable) -> Callable:
        """Wrap a function of a method."""

        @wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            self._enter("method")
            result = function(*args, **kwargs)
            self._leave()
            return result

        return wrapper

    def _add(self) -> None:
        """Add what was counted since the last call to the part that is running."""
        total = self.total()
        self.flops["method" if "method" in self.running else self.running[-1]] += total - self.mark
        self.mark = total

    def _enter(self, part: str) -> None:
        self._add()
        self.running.append(part)

    def _leave(self) -> None:
        self._add()
        self.running.pop()
