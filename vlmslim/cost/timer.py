"""The time of a block on a CPU or a GPU, measured without making the host wait."""

import time
from collections.abc import Callable
from typing import Any

import torch

ReadClock = Callable[[], float]  # returns seconds


class Timer:
    """A context manager that times a block.

    On a GPU it records two events on the current stream, because a synchronisation would slow down what it measures.

    Args:
        device: where the work of the block runs.
        clock: read on a CPU; by default the wall clock.
    """

    def __init__(self, device: torch.device, clock: ReadClock | None = None):
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._clock = clock or time.perf_counter
        self._ms: float | None = None

    def __enter__(self) -> "Timer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Begin."""
        self._start = self._now()

    def stop(self) -> None:
        """End."""
        self._stop = self._now()

    def _now(self) -> Any:
        if self._stream is None:
            return self._clock()
        return self._stream.record_event(torch.cuda.Event(enable_timing=True))

    @property
    def finished(self) -> bool:
        """Return whether `ms` can be read without waiting for the device."""
        return self._ms is not None or self._stream is None or self._stop.query()

    @property
    def ms(self) -> float:
        """Milliseconds between start and stop; waits until the device has come to the stop."""
        if self._ms is None:
            if self._stream is None:
                self._ms = 1000 * (self._stop - self._start)
            else:
                self._stop.synchronize()
                self._ms = self._start.elapsed_time(self._stop)
        return self._ms

    def __reduce__(self) -> tuple:  # a copy holds the number, because events belong to their process
        return _measured, (self.ms,)


def _measured(ms: float) -> Timer:
    timer = Timer(torch.device("cpu"))
    timer._ms = ms
    return timer
