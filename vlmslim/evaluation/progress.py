"""The progress of a run on the terminal, and the logs that take all other output."""

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
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


@dataclass(frozen=True)
class RowLine:
    """The line of a finished row, in the table that grows while a run goes on.

    label   : of the row
    kept    : visual tokens of an image, as on the board: "36.0", or "144.0 → 36.0" where layers drop some
    score   : average over the tasks in % of the unpatched model's; None where it is not known
    seconds : wall time of the row's cells
    remarks : on how many prompts a stage acted that decides itself
    """

    label: str
    kept: str
    score: float | None
    seconds: float
    remarks: tuple[str, ...] = ()

    @staticmethod
    def head(width: int) -> str:
        """Write the first line of the table; labels have at most `width` characters."""
        return f"{'method':<{width}}  {'tokens kept':>16}  {'% of unpatched':>14}  {'seconds':>7}"

    def text(self, width: int) -> str:
        """Write the line; labels have at most `width` characters."""
        score = "–" if self.score is None else f"{self.score:.1f}"
        line = f"{self.label:<{width}}  {self.kept:>16}  {score:>14}  {self.seconds:>7.1f}"
        return "  ".join([line, *self.remarks])


class Display:
    """Receives the progress of a run, and shows nothing; `RichDisplay` shows it."""

    def message(self, text: str) -> None:
        """Tell the user something in one line."""

    def start(self, total: int, done: int, width: int) -> None:
        """Begin with a grid of `total` cells, of which `done` are finished; labels have at most `width` characters."""

    def start_cell(self, label: str, task: str) -> None:
        """Begin with a cell."""

    def finish_cell(self) -> None:
        """Count a cell that was saved."""

    def finish_row(self, line: RowLine) -> None:
        """Tell the user what a row scored, after its last cell."""

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
        self._width = 0
        self._has_head = False

    def __enter__(self) -> "RichDisplay":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def message(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def start(self, total: int, done: int, width: int) -> None:
        """Show the grid."""
        self._progress.update(self._grid, total=total, completed=done, visible=True)
        self._width = max(width, len("method"))
        if done:
            self.message(f"resuming: {done} of {total} cells are finished")

    def start_cell(self, label: str, task: str) -> None:
        """Name the cell at work."""
        self._progress.update(self._grid, description=f"{label} / {task}")

    def finish_cell(self) -> None:
        """Advance the bar of the grid."""
        self._progress.advance(self._grid)

    def finish_row(self, line: RowLine) -> None:
        """Add a line to the table of finished rows."""
        if not self._has_head:
            self.message(RowLine.head(self._width))
            self._has_head = True
        self.message(line.text(self._width))

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
