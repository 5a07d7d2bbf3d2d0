"""The values that a method reads inside vLLM: what passed through the vision tower and the projector."""

from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from vllm.distributed import tensor_model_parallel_all_gather


class Seen:
    """Tensors that passed through tower and projector while images were encoded.

    pixels, tower : of all crops, one entry for each run
    layers        : tower layer, as the method names it -> its inputs, likewise
    heads         : tower layer, as the method names it -> queries and keys (c, heads, p, d) of all crops
    """

    def __init__(self, heads: int) -> None:
        self.count = heads
        self.pixels: list[Tensor] = []
        self.tower: list[Tensor] = []
        self.layers: defaultdict[int, list[Tensor]] = defaultdict(list)
        self.heads: dict[int, tuple[Tensor, Tensor]] = {}

    @staticmethod
    def note(into: list[Tensor], module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what goes into a module."""
        into.append(args[0] if args else next(iter(kwargs.values())))

    def heads_of(self, layer: int, projection: Any, args: tuple, output: Any) -> None:
        """Note queries and keys, of all heads where tensor parallelism spreads them over ranks."""
        q, k, _ = output[0].chunk(3, dim=-1)
        if projection.tp_size > 1:
            q, k = (tensor_model_parallel_all_gather(x.contiguous(), dim=-1) for x in (q, k))
        q, k = (x.unflatten(-1, (self.count, -1)).transpose(1, 2) for x in (q, k))
        self.heads[layer] = q, k
