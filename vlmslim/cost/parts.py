"""Who costs what in a real prefill: FLOPs and time, shared out among the parts of the model and the method."""

import time
from collections.abc import Callable
from functools import wraps
from math import prod

import torch
from torch import Size, nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from vlmslim.compressor import Compressor

PARTS = ("tower", "projector", "method", "language_model", "lm_head", "rest")


class Parts:
    """A context manager that shares out a running total among `PARTS` while a model runs.

    Each part is counted without the parts inside it, but what a method calls itself (the projector, a layer's query
    projection) is the method's. "method" is the time inside `compress_images` and `retain`; what the engine does with
    the answer (gathering tokens, masks, putting tokens back) is the language model's.

    Args:
        model: a LLaVA, patched or not.
        read: the running total, such as a clock's or a FLOP counter's.
    """

    def __init__(self, model: nn.Module, read: Callable[[], float]):
        self.model, self.read = model, read
        self.totals = dict.fromkeys(PARTS, 0.0)
        self.stack, self.undo = ["rest"], []

    def __enter__(self) -> "Parts":
        core = self.model.model
        modules = {
            "tower": core.vision_tower,
            "projector": core.multi_modal_projector,
            "language_model": core.language_model,
            "lm_head": self.model.lm_head,
        }
        for part, module in modules.items():
            self.undo += [
                module.register_forward_pre_hook(lambda *_, part=part: self._enter(part), prepend=True).remove,
                module.register_forward_hook(lambda *_: self._leave()).remove,
            ]
        for stage in _stages(self.model):
            for name in ("compress_images", "retain"):
                setattr(stage, name, self._inside("method", getattr(stage, name)))
                self.undo.append(lambda stage=stage, name=name: vars(stage).pop(name))
        self.mark = self.read()
        return self

    def __exit__(self, *_) -> None:
        self._share()
        while self.undo:
            self.undo.pop()()

    def _inside(self, part: str, function: Callable) -> Callable:
        @wraps(function)
        def watched(*args, **kwargs):
            self._enter(part)
            result = function(*args, **kwargs)
            self._leave()
            return result

        return watched

    def _share(self) -> None:
        now = self.read()
        owner = "method" if "method" in self.stack else self.stack[-1]
        self.totals[owner] += now - self.mark
        self.mark = now

    def _enter(self, part: str) -> None:
        self._share()
        self.stack.append(part)

    def _leave(self) -> None:
        self._share()
        self.stack.pop()


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, silent, and not blind to a CPU's attention kernel, which it misses before torch 2.15."""

    def attention(query: Size, key: Size, value: Size, *_, **__) -> int:
        return 2 * prod(query[:3]) * key[2] * (query[3] + value[3])

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={} if kernel in flop_registry else {kernel: attention})


def count_flops(model: nn.Module, inputs: dict) -> dict[str, int]:
    """FLOPs of the matrix products of one prefill, as `torch.utils.flop_counter` sees them, by part.

    Args:
        model: a LLaVA, patched or not.
        inputs: of one forward; a batch is counted as a whole.
    """
    with flop_counter() as counter, Parts(model, counter.get_total_flops) as parts:
        _prefill(model, inputs)
    return {part: int(total) for part, total in parts.totals.items()}


def time_parts(model: nn.Module, inputs: dict) -> dict[str, float]:
    """Milliseconds of one prefill, by part.

    On a GPU the device is waited for at every boundary, so the sum is a little more than an undisturbed prefill.
    """
    device = model.device

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return 1000 * time.perf_counter()

    with Parts(model, clock) as parts:
        _prefill(model, inputs)
    return parts.totals


def _stages(model: nn.Module) -> list[Compressor]:
    """The stages at work in a patched model, each once."""
    slim = getattr(model, "_vlmslim", None)
    if slim is None:
        return []
    return [stage.method for stage in slim.stages if stage.acts_before_llm or stage.layers]


@torch.inference_mode()
def _prefill(model: nn.Module, inputs: dict) -> None:
    model(**inputs, logits_to_keep=1, use_cache=True)
