"""The receipts of a run, in words: what each row really kept on each task."""

from collections.abc import Iterator
from pathlib import Path

from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.store import reading
from vlmslim.io.messages import did_you_mean
from vlmslim.leaderboard.board import open_run
from vlmslim.receipt import headline


def receipts(directory: Path | str, label: str | None = None) -> Iterator[str]:
    """Write the receipts of one row or of all, one line for each finished cell.

    Raises:
        ConfigError: the directory holds no run, or the row has no finished cell.
    """
    with reading(directory):
        store, run = open_run(directory)
        places = [(row["label"], task["task"]) for row in run["config"]["rows"] for task in run["config"]["tasks"]]
        cells = {place: cell for place in places if (cell := store.cell(*place)) is not None}
        finished = list(dict.fromkeys(name for name, _ in cells))
        if not finished:
            raise ConfigError(f"{directory} has no finished cell yet")
        if label is not None and label not in finished:
            hint = did_you_mean(label, finished)
            raise ConfigError(f"{directory} has no finished row {label!r}.{hint} It has {', '.join(finished)}")
        for (name, task), cell in cells.items():
            if label in (None, name):
                yield f"{name}, {task}: {headline(cell['receipt'])}"
