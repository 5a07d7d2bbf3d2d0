"""`vlmslim run --log wandb|trackio`: the tables and figures of a finished run, sent to an experiment tracker.

Both packages have the same functions: `init`, `Table`, a run with `log` and `finish`.
"""

from importlib import import_module
from importlib.util import find_spec

from vlmslim.evaluation.errors import ConfigError
from vlmslim.io.messages import one_line
from vlmslim.leaderboard.axes import cost_axes, quality_axes
from vlmslim.leaderboard.board import Leaderboard
from vlmslim.leaderboard.figures import scatter

PROJECT = "vlmslim"


def check_tracker(name: str) -> None:
    """Refuse a tracker that is not installed, before a run begins.

    Raises:
        ConfigError: the message has the line that installs it.
    """
    if find_spec(name) is None:
        raise ConfigError(f'--log {name}: {name} is not installed; pip install "vlmslim[{name}]"')


def send(board: Leaderboard, tracker: str, name: str) -> None:
    """Send the data frames of a leaderboard, without the single samples, and a figure for each cost.

    Args:
        board: of a finished run.
        tracker: `wandb` or `trackio`.
        name: of the run, as the tracker shows it.

    Raises:
        ConfigError: the tracker took nothing, because it cannot be reached, for example, or no user is logged in.
    """
    module = import_module(tracker)
    frames = board.to_frames()
    tables = {name: getattr(frames, name) for name in ("rows", "cells", "pairs")}
    average, costs = quality_axes(board)[:1], cost_axes(board)
    figures = {f"{axis.name} against {cost.name}": scatter(board, cost, axis) for axis in average for cost in costs}
    try:
        run = module.init(project=PROJECT, name=name, config=board.facts)
        run.log({name: module.Table(dataframe=frame) for name, frame in tables.items()} | figures)
        run.finish()
    except Exception as error:  # each tracker has errors of its own kinds
        raise ConfigError(
            f"--log {tracker}: {one_line(error)}; the results are kept, so the same vlmslim run sends them later"
        ) from error
