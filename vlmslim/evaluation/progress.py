"""Progress bars for `vlmslim run`."""

import sys

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from vlmslim.evaluation.run import Display


class RichDisplay(Display):
    """One bar for the grid of cells, and one for the cell at work. On stderr: stdout is for the leaderboard."""

    def __init__(self):
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(file=sys.stderr),  # this stream, even while lmms-eval's is sent elsewhere
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> "RichDisplay":
        self._progress.start()
        self._grid = self._progress.add_task("cells", total=None)
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def say(self, text: str) -> None:
        """Print above the bars."""
        self._progress.console.print(text, highlight=False, markup=False)

    def cells(self, total: int, done: int) -> None:
        """Show the grid."""
        self._progress.update(self._grid, total=total, completed=done)
        if done:
            self.say(f"resuming: {done} of {total} cells are finished")

    def cell(self, label: str, task: str) -> None:
        """Name the cell at work."""
        self._progress.update(self._grid, description=f"{label} / {task}")

    def finished(self) -> None:
        """Count a saved cell."""
        self._progress.advance(self._grid)

    def bar(self, total: int = 0, desc: str = "") -> "_Bar":
        """A bar below that of the grid."""
        return _Bar(self._progress, total, desc)


class _Bar:
    """The part of tqdm's interface that `VlmSlim` uses."""

    def __init__(self, progress: Progress, total: int, desc: str):
        self._progress = progress
        self._task = progress.add_task("timing" if desc == "timing" else "  questions", total=total)

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_) -> None:
        self._progress.remove_task(self._task)

    def update(self, n: int = 1) -> None:
        """Advance by n."""
        self._progress.advance(self._task, n)
