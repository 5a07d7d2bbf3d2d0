"""Commands that put the questions of tasks to methods: run, advise, verify."""

import shlex
import traceback
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vlmslim.cli.shared import METHOD_HELP, Device, evaluation_command, fail, spare_modules

if TYPE_CHECKING:
    from vlmslim.evaluation.config import RunConfig
    from vlmslim.leaderboard.board import Leaderboard


class Tracker(StrEnum):
    """Experiment trackers."""

    wandb = "wandb"
    trackio = "trackio"


def run(
    config: Annotated[Path, typer.Argument(help="A YAML file such as eval_configs/quickstart.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Directory for the results, instead of the file's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task: a quick look, not a result.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Run nothing; write each cell as a file for python -m lmms_eval --config.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away the results in the output directory.")] = False,
    log: Annotated[Tracker | None, typer.Option(help="Send the tables and figures to a tracker at the end.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(help="Ray workers: a number, auto (one for each GPU), or ray://HEAD:10001. Default: no Ray."),
    ] = None,
) -> None:
    """Evaluate methods on tasks, resuming where an earlier call stopped, and print the leaderboard."""
    with evaluation_command():
        from vlmslim.evaluation.config import load_config

        settings = load_config(config, output=output, limit=limit)
        from vlmslim.evaluation.export import export_cells
        from vlmslim.evaluation.progress import log_to
        from vlmslim.evaluation.store import Store
        from vlmslim.leaderboard.render import render
        from vlmslim.leaderboard.trackers import check_tracker, send

        if log is not None:
            check_tracker(log.value)
        if export is not None:
            log_to(None)
            paths = export_cells(settings, export)
            typer.echo(f"{len(paths)} files in {export}; evaluate one with\n  python -m lmms_eval --config {paths[0]}")
            return
        crew = None
        if workers is not None:
            from vlmslim.evaluation.workers import check_workers

            crew = check_workers(workers)
        Store(settings.output).prepare()
        log_to(settings.output / "run.log")
        board = _evaluate(settings, fresh, crew)
        typer.echo(render(board, "md"), nl=False)
        where = shlex.quote(str(settings.output))
        typer.echo(f"What a row really kept: vlmslim receipt {where} LABEL", err=True)
        typer.echo(f"Do the same answers come out again? vlmslim verify {where}", err=True)
        if log is not None:
            send(board, log.value, settings.output.name)


def _evaluate(settings: "RunConfig", fresh: bool, crew: str | int | None) -> "Leaderboard":
    """Run what a file asks for. An error ends the command with status 1 and says that finished cells are kept."""
    from vlmslim.evaluation.errors import CellError, ConfigError
    from vlmslim.evaluation.progress import RichDisplay
    from vlmslim.evaluation.run import run
    from vlmslim.io.messages import one_line

    log = settings.output / "run.log"
    spare_modules()
    try:
        with RichDisplay() as display:
            return run(settings, fresh=fresh, display=display, workers=crew)
    except ConfigError:
        raise
    except CellError as error:
        fail(f"{error}\nFinished cells are kept; details in {log}", status=1)
    except Exception as error:  # any error at all: hours of work are kept, and the user must know it
        details = _append_traceback(log)
        fail(f"{type(error).__name__}: {one_line(error)}\nFinished cells are kept{details}", status=1)


def _append_traceback(log: Path) -> str:
    """Append the exception that is being handled to a file, and say so; a full disk may leave no room for it."""
    try:
        with open(log, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f"; details in {log}"


def advise(
    checkpoint: Annotated[str, typer.Argument(help="A path, a hub id, or bundled/NAME.")],
    tasks: Annotated[str, typer.Option(help="lmms-eval tasks or groups, comma-separated.")],
    target: Annotated[
        str | None, typer.Option(help='The score to reach at the least cost, such as "98% of unpatched".')
    ] = None,
    ttft: Annotated[
        float | None, typer.Option(help="Most TTFT, as a share of the unpatched model's; the best score is searched.")
    ] = None,
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help=f"{METHOD_HELP} Default: six of different kinds.")
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Visual tokens to keep per image, counts or shares. Default: 0.5,0.25,0.11.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each task on the full board.")] = 100,
    share: Annotated[float, typer.Option(help="Most answers, as a share of the full board's.")] = 0.25,
    error: Annotated[float, typer.Option(help="Most probable error of the rows that are dropped.")] = 0.05,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts per forward.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Decides the order of the questions.")] = 0,
    dtype: Annotated[str | None, typer.Option(help="Default: float32 on a CPU, else the checkpoint's own.")] = None,
    device: Device = None,
) -> None:
    """Find the method and the budget for a goal, by a race on a part of the questions."""
    with evaluation_command(ValueError):
        from vlmslim.cost.bench.arguments import parse_numbers
        from vlmslim.evaluation import advise as advisor
        from vlmslim.evaluation.progress import RichDisplay, log_to
        from vlmslim.registry import parse_method

        log_to(None)
        spare_modules()
        given = {"pretrained": checkpoint, "dtype": dtype, "device": device}
        with RichDisplay() as display:
            advice = advisor.advise(
                {key: value for key, value in given.items() if value is not None},
                [name.strip() for name in tasks.split(",")],
                advisor.parse_goal(target, ttft),
                methods=None if method is None else [parse_method(text) for text in method],
                budgets=advisor.BUDGETS if budgets is None else parse_numbers(budgets),
                settings=advisor.Settings(limit, share, error, batch_size, seed),
                display=display,
            )
    typer.echo(advice.text(), nl=False)
    raise typer.Exit(1 if advice.chosen is None else 0)


def verify(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run, finished or not.")],
    questions: Annotated[int, typer.Option(min=1, help="Questions of each cell that are asked again.")] = 16,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: half of the run's, or 2.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which questions are asked.")] = 0,
    workers: Annotated[
        str | None, typer.Option(help="Ray workers that answer in turn: a number, auto, or ray://HEAD:10001.")
    ] = None,
) -> None:
    """Ask a sample of a run's questions again, in other batches. Exit status 1: something changed that should not."""
    with evaluation_command():
        from vlmslim.evaluation.errors import CellError
        from vlmslim.evaluation.progress import RichDisplay, log_to
        from vlmslim.evaluation.verify import verify
        from vlmslim.evaluation.workers import check_workers
        from vlmslim.leaderboard.board import Leaderboard
        from vlmslim.leaderboard.report import write_all

        log_to(None)
        spare_modules()
        crew = None if workers is None else check_workers(workers)
        try:
            with RichDisplay() as display:
                found = verify(
                    directory, questions=questions, batch_size=batch_size, seed=seed, workers=crew, display=display
                )
        except CellError as error:  # workers died, and the end of a log is worth several lines
            fail(error, status=1)
        write_all(Leaderboard.read(directory), directory)
    typer.echo(found.text(), nl=False)
    raise typer.Exit(0 if found.passed else 1)
