"""The command `vlmslim`. Heavy imports wait until a command needs them, so that help is instant."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="vlmslim",
    help="Visual-token compression for LLaVA-style models: run comparisons, read leaderboards.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Format(StrEnum):
    """Formats of a leaderboard."""

    md = "md"
    csv = "csv"
    json = "json"
    html = "html"


def _fail(message: object, status: int = 2) -> None:
    typer.secho(f"vlmslim: {message}", err=True, fg="red")
    raise typer.Exit(status)


def _require_extra() -> None:
    """Say how to install what the commands need, if it is missing."""
    try:
        import lmms_eval  # noqa: F401
        import pydantic  # noqa: F401
    except ModuleNotFoundError as error:
        _fail(f'{error.name} is not installed; pip install "vlmslim[eval]"')


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="A YAML file such as eval_configs/quickstart.yaml.")],
    output: Annotated[Path | None, typer.Option(help="Directory for the results, instead of the file's.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Questions per task: a quick look, not a result.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Run nothing; write each cell as a file for python -m lmms_eval --config.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Throw away the results in the output directory.")] = False,
) -> None:
    """Evaluate methods on tasks, resuming where an earlier call stopped, and print the leaderboard."""
    _require_extra()
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; progress is shown by rich
    from vlmslim.evaluation.config import ConfigError, load_config

    try:
        settings = load_config(config, output=output, limit=limit)
        from vlmslim.evaluation import harness
        from vlmslim.evaluation.progress import RichDisplay
        from vlmslim.evaluation.render import render
        from vlmslim.evaluation.run import CellError, run

        if export is not None:
            harness.quiet()
            paths = harness.export(settings, harness.Tasks(settings), export)
            typer.echo(f"{len(paths)} files in {export}; evaluate one with\n  python -m lmms_eval --config {paths[0]}")
            return
        harness.quiet(settings.output / "run.log")
        try:
            with RichDisplay() as display:
                board = run(settings, fresh=fresh, display=display)
        except KeyboardInterrupt:
            _fail("interrupted; the same command goes on where it stopped", status=130)
        except CellError as error:
            _fail(f"{error}\nFinished cells are kept; details in {settings.output / 'run.log'}", status=1)
        typer.echo(render(board, "md"), nl=False)
    except ConfigError as error:
        _fail(error)


@app.command()
def leaderboard(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run, finished or not.")],
    format: Annotated[Format, typer.Option("--format", "-f", help="How to write it.")] = Format.md,
) -> None:
    """Rebuild the leaderboard from the results in DIRECTORY and print it."""
    _require_extra()
    from vlmslim.evaluation.config import ConfigError
    from vlmslim.evaluation.leaderboard import Leaderboard
    from vlmslim.evaluation.render import render

    try:
        typer.echo(render(Leaderboard.read(directory), format.value), nl=False)
    except ConfigError as error:
        _fail(error)


@app.command()
def methods() -> None:
    """List the compression methods with their options and defaults."""
    from dataclasses import MISSING, fields

    from rich.console import Console
    from rich.table import Table

    from vlmslim.methods import method_class, method_names

    table = Table("method", "options", "what it does", box=None, pad_edge=False)
    for name in method_names():
        cls = method_class(name)
        options = [f.name if f.default is MISSING else f"{f.name}={f.default!r}" for f in fields(cls) if f.init]
        table.add_row(name, ", ".join(options) or "–", (cls.__doc__ or "").strip().splitlines()[0])
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    app()
