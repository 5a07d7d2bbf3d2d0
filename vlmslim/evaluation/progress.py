"""What a run shows on the terminal, and what it keeps off it."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Protocol

from loguru import logger
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tqdm import tqdm


class Bar(Protocol):
    """The part of a tqdm bar that an evaluation uses."""

    def update(self, n: int = 1) -> object:
        """Advance by `n` steps."""


#: Makes a bar, and is called as tqdm is: `progress(total=100, desc="vlmslim")`.
MakeBar = Callable[..., AbstractContextManager[Bar]]


class Display:
    """Receives the progress of a run, and shows nothing; `RichDisplay` shows it."""

    def message(self, text: str) -> None:
        """Tell the user something in one line."""

    def start(self, total: int, done: int) -> None:
        """Begin with a grid of `total` cells, of which `done` are finished."""

    def start_cell(self, label: str, task: str) -> None:
        """Begin with a cell."""

    def finish_cell(self) -> None:
        """Count a cell that was saved."""

    def bar(self, total: int = 0, desc: str = "") -> AbstractContextManager[Bar]:
        """Return a bar for the progress within a cell."""
        return tqdm(total=total, desc=desc, disable=True)


class RichDisplay(Display):
    """One bar for the grid of cells, and one for the cell at work. On stderr, because stdout is for the leaderboard."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),  # this stream, also while lmms-eval's is sent elsewhere
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._grid = self._progress.add_task("cells", total=None, visible=False)

    def __enter__(self) -> "RichDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False)

    def start(self, total: int, done: int) -> None:
        """Show the grid."""
        self._progress.update(self._grid, total=total, completed=done, visible=True)
        if done:
            self.message(f"resuming: {done} of {total} cells are finished")

    def start_cell(self, label: str, task: str) -> None:
        """Name the cell at work."""
        self._progress.update(self._grid, description=f"{label} / {task}")

    def finish_cell(self) -> None:
        """Advance the bar of the grid."""
        self._progress.advance(self._grid)

    def bar(self, total: int = 0, desc: str = "") -> "_RichBar":
        """Return a bar below that of the grid."""
        return _RichBar(self._progress, total, desc)


class _RichBar(AbstractContextManager["_RichBar"]):
    def __init__(self, progress: Progress, total: int, desc: str):
        self._progress = progress
        self._task = progress.add_task("timing" if desc == "timing" else "  questions", total=total)

    def __exit__(self, *_: object) -> None:
        self._progress.remove_task(self._task)

    def update(self, n: int = 1) -> None:
        """Advance by `n` steps."""
        self._progress.advance(self._task, n)


@contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Send what lmms-eval and its tasks print, progress bars included, to the end of a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield


def log_to(log: Path | None = None) -> None:
    """Keep the log of lmms-eval off the terminal, and write it to a file if one is given."""
    import lmms_eval.evaluator  # when these two are imported they start to log to the terminal
    import lmms_eval.models  # noqa: F401

    logger.remove()
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        logger.add(log, level="INFO")
