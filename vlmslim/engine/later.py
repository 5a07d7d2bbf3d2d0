"""Checks of values that the device has not computed yet, without waiting for it."""

import threading
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Later(threading.local):
    """The checks that wait for their values, in each thread.

    On a CPU a check runs at once. On a GPU the values travel to the host while the device works on, and the check runs
    once they have arrived: when the next forward of the model begins, or when the receipt is read.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Any, Tensor, Callable[[np.ndarray], None]]] = deque()

    def __reduce__(self) -> tuple:
        return Later, ()  # a copy of the model has nothing to check

    def check(self, values: Tensor, refuse: Callable[[np.ndarray], None]) -> None:
        """Look at values as soon as that costs no waiting: `refuse` raises if they are wrong."""
        values = values.detach()
        if values.device.type != "cuda":
            return refuse(values.cpu().numpy())
        on_host = values.to("cpu", non_blocking=True)
        self._waiting.append((torch.cuda.current_stream(values.device).record_event(), on_host, refuse))

    def settle(self) -> None:
        """Run the checks that wait."""
        while self._waiting:
            arrived, on_host, refuse = self._waiting.popleft()
            arrived.synchronize()
            refuse(on_host.numpy())
