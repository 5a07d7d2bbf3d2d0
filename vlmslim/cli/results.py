"""Commands that read the results of a run: leaderboard, receipt, compare, report, submit."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vlmslim.cli.shared import evaluation_command, fail, quiet_transformers


class Format(StrEnum):
    """Formats of a leaderboard."""

    md = "md"
    csv = "csv"
    json = "json"
    html = "html"
    parquet = "parquet"


class ItemFormat(StrEnum):
    """Formats of a comparison of two runs."""

    md = "md"
    csv = "csv"
    json = "json"


class Scale(StrEnum):
    """Scales of the average that a leaderboard tests and ranks."""

    unpatched = "unpatched"
    vision_retained = "vision-retained"
    hard = "hard"


def leaderboard(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run, finished or not.")],
    format: Annotated[Format, typer.Option("--format", "-f", help="How to write it.")] = Format.md,
    scale: Annotated[
        Scale, typer.Option(help="Of the average that is tested and ranked: by it rows are marked, too.")
    ] = Scale.unpatched,
    published: Annotated[
        bool, typer.Option("--published", help="Show published numbers of the same model, task, method and budget.")
    ] = False,
    published_tables: Annotated[
        Path | None,
        typer.Option(help="Directory of published tables, instead of those of vlmslim."),
    ] = None,
    single: Annotated[bool, typer.Option("--single", help="One HTML file, leaderboard.html, not a folder.")] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write html and parquet, instead of DIRECTORY.")
    ] = None,
) -> None:
    """Rebuild the leaderboard from the results in DIRECTORY. Print it, or write it as a page or as data frames."""
    with evaluation_command():
        from vlmslim.leaderboard.board import Leaderboard
        from vlmslim.leaderboard.published import DIRECTORY, Published, load_papers
        from vlmslim.leaderboard.render import render
        from vlmslim.leaderboard.report import write_folder, write_single

        if single and format is not Format.html:
            fail("--single is for --format html")
        if output is not None and format not in (Format.html, Format.parquet):
            fail(f"--output is for html and parquet; {format} goes to standard output, so write > {output}")
        board = Leaderboard.read(directory, scale.value)
        if format is Format.parquet:
            for path in board.to_frames().write(output or directory / "frames"):
                typer.echo(path)
            return
        theirs = None
        if published or published_tables is not None:
            theirs = Published.compare(board, load_papers(published_tables or DIRECTORY))
        if single:
            typer.echo(write_single(board, output or directory / "leaderboard.html", theirs))
        elif format is Format.html:
            typer.echo(write_folder(board, output or directory / "report", theirs))
        else:
            typer.echo(render(board, format.value, theirs), nl=False)


def receipt(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run, finished or not.")],
    label: Annotated[str | None, typer.Argument(help="A row of the run, such as fastv-64. Default: all rows.")] = None,
) -> None:
    """Print what the rows of a run really kept, task by task."""
    with evaluation_command():
        from vlmslim.evaluation.receipts import receipts

        for line in receipts(directory, label):
            typer.echo(line)


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Output directory of vlmslim run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one, with the same questions.")],
    format: Annotated[
        ItemFormat, typer.Option("--format", "-f", help="csv: one line per question; json: everything.")
    ] = ItemFormat.md,
) -> None:
    """Compare two runs question by question: the rows of the same label, with paired tests."""
    with evaluation_command():
        from vlmslim.leaderboard.two_runs import compare_runs, render

        typer.echo(render(compare_runs(first, second), format.value), nl=False)


def report(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run.")],
    samples: Annotated[
        int, typer.Option(min=1, help="Flipped questions whose tokens are recorded, of all tasks together.")
    ] = 50,
    device: Annotated[str | None, typer.Option(help="Default: the run's.")] = None,
    single: Annotated[bool, typer.Option("--single", help="One HTML file, leaderboard.html, not a folder.")] = False,
) -> None:
    """Record which tokens each row kept of flipped questions, with the checkpoint at hand, and write the report."""
    with evaluation_command():
        quiet_transformers()
        from vlmslim.evaluation.progress import RichDisplay, log_to
        from vlmslim.evaluation.recording import add_pictures
        from vlmslim.leaderboard.report import write_folder, write_single

        log_to(None)
        with RichDisplay() as display:
            board = add_pictures(directory, samples, device=device, display=display)
        folder = directory / "report"
        typer.echo(write_single(board, directory / "leaderboard.html") if single else write_folder(board, folder))


def submit(
    directory: Annotated[Path, typer.Argument(help="Output directory of a finished vlmslim run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: submission.json in DIRECTORY.")
    ] = None,
) -> None:
    """Check a run (complete, sealed, protocol stated) and write it as one file for the public board."""
    with evaluation_command():
        import json

        from vlmslim.io.files import write_atomically
        from vlmslim.leaderboard.submission import submission

        file = output or directory / "submission.json"
        content = submission(directory)
        write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    typer.echo(f"{file}: {len(content['cells'])} cells, sha256 {content['sha256']}")
