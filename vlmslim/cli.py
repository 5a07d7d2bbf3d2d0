"""The command `vlmslim`. Each command imports what it needs when it runs, so that help is instant."""

import errno
import gc
import os
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

if TYPE_CHECKING:
    from rich.console import Console


class _Stopped(BaseException):
    """A signal that ends the process."""

    def __init__(self, number: int):
        self.number = signal.Signals(number)


class _Commands(typer.core.TyperGroup):
    """Ends every command in one line: when a signal stops it (status 130, 143 or 129), and at an error (status 1)."""

    def invoke(self, context: Any) -> Any:
        """Run a command, while the signals that end a process raise an exception."""
        shows_traceback = context.params.get("traceback")

        def stop(number: int, _: object) -> NoReturn:
            raise _Stopped(number)

        before = {}
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
            ignored = [number for number in signals if signal.getsignal(number) is signal.SIG_IGN]  # as nohup asks
            before = {number: signal.signal(number, stop) for number in signals if number not in ignored}
        try:
            return super().invoke(context)
        except (_Stopped, KeyboardInterrupt) as stopped:
            number = getattr(stopped, "number", signal.SIGINT)
            word = "interrupted" if number is signal.SIGINT else f"stopped by {number.name}"
            hint = "; the same command goes on where it stopped" if context.invoked_subcommand == "run" else ""
            _fail(f"{word}{hint}", status=128 + number)
        except Exception as error:
            is_exit = isinstance(error, typer.Abort) or hasattr(error, "exit_code")  # its message is printed already
            if shows_traceback and (cause := error.__context__ if is_exit else error):
                traceback.print_exception(cause)
            if is_exit or getattr(error, "errno", None) == errno.EPIPE:  # nobody reads on: typer ends quietly
                raise
            from vlmslim.io.messages import one_line

            where = "" if shows_traceback else f"; vlmslim --traceback {context.invoked_subcommand} ... shows where"
            _fail(f"{type(error).__name__}: {one_line(error)}{where}", status=1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


app = typer.Typer(
    name="vlmslim",
    cls=_Commands,
    help="Visual-token compression for LLaVA-style models: compare methods, time them, check them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def _options(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error happened.")] = False,
) -> None:
    """Take the options of all commands; `_Commands` reads them."""


class Format(StrEnum):
    """Formats of a leaderboard."""

    md = "md"
    csv = "csv"
    json = "json"
    html = "html"
    parquet = "parquet"


class Tracker(StrEnum):
    """Experiment trackers."""

    wandb = "wandb"
    trackio = "trackio"


class ItemFormat(StrEnum):
    """Formats of a comparison of two runs."""

    md = "md"
    csv = "csv"
    json = "json"


class Scale(StrEnum):
    """What the averages of a leaderboard are measured on."""

    unpatched = "unpatched"
    vision_retained = "vision-retained"
    hard = "hard"


_Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]
_Attention = Annotated[str, typer.Option(help="eager, sdpa, flash_attention_2, ...")]
_METHOD_HELP = "As fastv:layer=3:keep=64, or path/to/file.py:Class:keep=64; repeat it for several."


def _fail(message: object, status: int = 2) -> NoReturn:
    typer.secho(f"vlmslim: {message}", err=True, fg="red")
    raise typer.Exit(status)


def _log(log: Path) -> str:
    """Append the exception that is being handled to a file, and say so; a full disk may leave no room for it."""
    try:
        with open(log, "a", encoding="utf-8") as file:
            traceback.print_exc(file=file)
    except OSError:
        return ""
    return f"; details in {log}"


@contextmanager
def _mistakes_in_one_line() -> Iterator[None]:
    """Print what a user can put right as one line: a wrong argument, no such checkpoint, a package that is missing."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        if getattr(error, "errno", None) == errno.EPIPE:
            raise
        from vlmslim.io.messages import one_line

        _fail(one_line(error))


def _quiet_transformers() -> None:
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of the profiler, which measures memory on a CPU
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _console() -> "Console":
    """Return a console that is wide enough for a table where the width is not known."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def _spare_modules() -> None:
    """Keep modules out of garbage collection: lmms-eval collects twice a cell, which takes half a second otherwise."""
    gc.collect()
    gc.freeze()


def _require_extra() -> None:
    """Refuse a command that needs the extra `eval`, if the extra is not installed."""
    try:
        import lmms_eval  # noqa: F401
        import plotly  # noqa: F401
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
    log: Annotated[Tracker | None, typer.Option(help="Send the tables and figures to a tracker at the end.")] = None,
    workers: Annotated[
        str | None,
        typer.Option(help="Ray workers: a number, auto (one for each GPU), or ray://HEAD:10001. Default: no Ray."),
    ] = None,
) -> None:
    """Evaluate methods on tasks, resuming where an earlier call stopped, and print the leaderboard."""
    _require_extra()
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; progress is shown by rich
    from vlmslim.evaluation.config import load_config
    from vlmslim.evaluation.errors import CellError, ConfigError

    try:
        settings = load_config(config, output=output, limit=limit)
        from vlmslim.evaluation.export import export_cells
        from vlmslim.evaluation.progress import RichDisplay, log_to
        from vlmslim.evaluation.run import run
        from vlmslim.evaluation.store import Store
        from vlmslim.io.messages import one_line
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
        _spare_modules()
        try:
            with RichDisplay() as display:
                board = run(settings, fresh=fresh, display=display, workers=crew)
        except ConfigError:
            raise
        except CellError as error:
            _fail(f"{error}\nFinished cells are kept; details in {settings.output / 'run.log'}", status=1)
        except Exception as error:
            details = _log(settings.output / "run.log")
            _fail(f"{type(error).__name__}: {one_line(error)}\nFinished cells are kept{details}", status=1)
        typer.echo(render(board, "md"), nl=False)
        where = shlex.quote(str(settings.output))
        typer.echo(f"What a row really kept: vlmslim receipt {where} LABEL", err=True)
        typer.echo(f"Do the same answers come out again? vlmslim verify {where}", err=True)
        if log is not None:
            send(board, log.value, settings.output.name)
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command()
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
    _require_extra()
    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.leaderboard.board import Leaderboard
    from vlmslim.leaderboard.published import DIRECTORY, Published, load_papers
    from vlmslim.leaderboard.render import render
    from vlmslim.leaderboard.report import write_folder, write_single

    if single and format is not Format.html:
        _fail("--single is for --format html")
    if output is not None and format not in (Format.html, Format.parquet):
        _fail(f"--output is for html and parquet; {format} goes to standard output, so write > {output}")
    try:
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
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command()
def receipt(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run, finished or not.")],
    label: Annotated[str | None, typer.Argument(help="A row of the run, such as fastv-64. Default: all rows.")] = None,
) -> None:
    """Print what the rows of a run really kept, task by task."""
    _require_extra()
    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.evaluation.receipts import receipts

    try:
        for line in receipts(directory, label):
            typer.echo(line)
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN_A", help="Output directory of vlmslim run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN_B", help="Another one, with the same questions.")],
    format: Annotated[
        ItemFormat, typer.Option("--format", "-f", help="csv: one line per question; json: everything.")
    ] = ItemFormat.md,
) -> None:
    """Compare two runs question by question: the rows of the same label, with paired tests."""
    _require_extra()
    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.leaderboard.two_runs import compare_runs, render

    try:
        typer.echo(render(compare_runs(first, second), format.value), nl=False)
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run.")],
    samples: Annotated[
        int, typer.Option(min=1, help="Flipped questions whose tokens are recorded, of all tasks together.")
    ] = 50,
    device: Annotated[str | None, typer.Option(help="Default: the run's.")] = None,
    single: Annotated[bool, typer.Option("--single", help="One HTML file, leaderboard.html, not a folder.")] = False,
) -> None:
    """Record which tokens each row kept of flipped questions, with the checkpoint at hand, and write the report."""
    _require_extra()
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; progress is shown by rich
    _quiet_transformers()
    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.evaluation.progress import RichDisplay, log_to
    from vlmslim.evaluation.recording import add_pictures
    from vlmslim.leaderboard.report import write_folder, write_single

    try:
        log_to(None)
        with RichDisplay() as display:
            board = add_pictures(directory, samples, device=device, display=display)
        folder = directory / "report"
        typer.echo(write_single(board, directory / "leaderboard.html") if single else write_folder(board, folder))
    except (ConfigError, OSError) as error:
        _fail(error)


@app.command()
def submit(
    directory: Annotated[Path, typer.Argument(help="Output directory of a finished vlmslim run.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Default: submission.json in DIRECTORY.")
    ] = None,
) -> None:
    """Check a run (complete, sealed, protocol stated) and write it as one file for the public board."""
    _require_extra()
    import json

    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.io.files import write_atomically
    from vlmslim.leaderboard.submission import submission

    file = output or directory / "submission.json"
    try:
        content = submission(directory)
        write_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except (ConfigError, OSError) as error:
        _fail(error)
    typer.echo(f"{file}: {len(content['cells'])} cells, sha256 {content['sha256']}")


@app.command()
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
        list[str] | None, typer.Option("--method", "-m", help=f"{_METHOD_HELP} Default: six of different kinds.")
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
    device: _Device = None,
) -> None:
    """Find the method and the budget for a goal, by a race on a part of the questions."""
    _require_extra()
    os.environ.setdefault("TQDM_DISABLE", "1")
    from vlmslim.cost.bench.arguments import parse_numbers
    from vlmslim.evaluation import advise as advisor
    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.evaluation.progress import RichDisplay, log_to
    from vlmslim.registry import parse_method

    log_to(None)
    _spare_modules()
    model = {"pretrained": checkpoint} | {k: v for k, v in {"dtype": dtype, "device": device}.items() if v is not None}
    try:
        with RichDisplay() as display:
            advice = advisor.advise(
                model,
                [name.strip() for name in tasks.split(",")],
                advisor.parse_goal(target, ttft),
                methods=None if method is None else [parse_method(text) for text in method],
                budgets=advisor.BUDGETS if budgets is None else parse_numbers(budgets),
                settings=advisor.Settings(limit, share, error, batch_size, seed),
                display=display,
            )
    except (ConfigError, OSError, ValueError) as problem:
        _fail(problem)
    typer.echo(advice.text(), nl=False)
    raise typer.Exit(1 if advice.chosen is None else 0)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="Output directory of vlmslim run, finished or not.")],
    questions: Annotated[int, typer.Option(min=1, help="Questions of each cell that are asked again.")] = 16,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default: half of the run's, or 2.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides which questions are asked.")] = 0,
) -> None:
    """Ask a sample of a run's questions again, in other batches. Exit status 1: something changed that should not."""
    _require_extra()
    os.environ.setdefault("TQDM_DISABLE", "1")
    from vlmslim.evaluation.errors import ConfigError
    from vlmslim.evaluation.progress import RichDisplay, log_to
    from vlmslim.evaluation.verify import verify
    from vlmslim.leaderboard.board import Leaderboard
    from vlmslim.leaderboard.report import write_all

    log_to(None)
    _spare_modules()
    try:
        with RichDisplay() as display:
            found = verify(directory, questions=questions, batch_size=batch_size, seed=seed, display=display)
        write_all(Leaderboard.read(directory), directory)
    except (ConfigError, OSError) as error:
        _fail(error)
    typer.echo(found.text(), nl=False)
    raise typer.Exit(0 if found.passed else 1)


@app.command()
def bench(
    checkpoint: Annotated[str | None, typer.Argument(help="A path, a hub id, or bundled/NAME.")] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="llava-1.5-7b, llava-1.5-13b, llava-next-7b or llava-onevision-7b: random weights."),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help=f"{_METHOD_HELP} Default: random, divprune and fastv."),
    ] = None,
    compare_with: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH:CLASS", help="A peer's method, at the same budgets; repeat it for several."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Visual tokens to keep per image, counts or shares. Default: 1/3, 2/9, 1/9.")
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    images: Annotated[int, typer.Option(min=1, help="Images in a prompt.")] = 1,
    image_size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH; decides tiles, or tokens of any size.")] = None,
    text_tokens: Annotated[int, typer.Option(min=2, help="Words in a prompt.")] = 46,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens generated.")] = 32,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; each one times every method once.")] = 10,
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Processor time, for a CPU shared with others.")] = False,
    layers: Annotated[int | None, typer.Option(min=1, help="Decoder layers of --shape, instead of all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU.")] = None,
    device: _Device = None,
    attention: _Attention = "sdpa",
    output: Annotated[
        Path | None,
        typer.Option(help="JSON file, or a folder for a file named after model, card and date; the table goes beside."),
    ] = None,
) -> None:
    """Measure FLOPs, time and memory of methods against the unpatched model and against the ideal.

    The last line of the output is one JSON object with the medians of all rows.
    """
    _quiet_transformers()
    from rich.console import Console

    from vlmslim.cost.bench import arguments
    from vlmslim.cost.bench.report import file_in, summary, write
    from vlmslim.cost.bench.run import Workload
    from vlmslim.cost.bench.run import bench as measure
    from vlmslim.io.files import check_file, check_writable
    from vlmslim.registry import parse_method

    if output is not None and output.suffix != ".json" and not output.is_dir():
        _fail(f"--output {output}: give a file that ends in .json, or a folder that exists")
    with Console(stderr=True).status("loading") as status, _mistakes_in_one_line():
        if output is not None and output.is_dir():
            check_writable(output)
        elif output is not None:
            check_file(output)  # now, not when everything is measured
            check_file(output.with_suffix(".md"))
        stages = [parse_method(text) for text in method or ("random", "divprune", "fastv")]
        peers = [arguments.parse_peer(text) for text in compare_with or ()]
        workload = Workload(
            batches=arguments.parse_batches(batch),
            images=images,
            image_size=arguments.parse_size(image_size),
            text_tokens=text_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            cpu_time=cpu_time,
        )
        keeps = None if budgets is None else arguments.parse_numbers(budgets)
        name, model = arguments.model_of(
            checkpoint, shape, layers=layers, dtype=dtype, device=device, attention=attention
        )
        record = measure(model, stages, keeps, workload, peers=peers, name=name, progress=status.update)
        if output is not None and output.is_dir():
            output = file_in(output, checkpoint or str(shape), str(model.device))
        text = write(record, output)
    typer.echo(f"{text}\n{summary(record)}")


@app.command()
def doctor(
    checkpoint: Annotated[str, typer.Argument(metavar="PRETRAINED", help="A path, a hub id, or bundled/NAME.")],
    method: Annotated[
        list[str] | None,
        typer.Option("--method", "-m", help=f"{_METHOD_HELP} Stages with +. Default: the saved one, or all."),
    ] = None,
    keep: Annotated[
        float | None,
        typer.Option(help="Visual tokens per image of methods given without keep. Default: 0.25, or their own."),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32 proves most; bfloat16 or float16 have wide tolerances.")
    ] = "float32",
    device: _Device = None,
    attention: _Attention = "sdpa",
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Every finding, not only failures.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Prove on a checkpoint that methods do what they say and nothing else. Exit status 1: a check failed."""
    _quiet_transformers()
    from rich.console import Console

    from vlmslim.doctor import examine, parse
    from vlmslim.loading import default_device, load
    from vlmslim.saving.folder import read

    budget = int(keep) if keep is not None and keep > 1 and keep.is_integer() else keep
    with Console(stderr=True).status("loading") as status, _mistakes_in_one_line():
        saved = [checkpoint] if method is None and read(checkpoint) is not None else None
        methods = saved if method is None else [parse(text, budget) for text in method]
        model, processor = load(checkpoint, dtype=dtype, device=device or default_device(), attention=attention)
        report = examine(
            model,
            processor,
            methods,
            keep=budget,
            on_finding=lambda finding: status.update(f"{finding.method}: {finding.check}"),
        )
    if as_json:
        typer.echo(report.to_json())
    else:
        _console().print(report.render(verbose))
    raise typer.Exit(0 if report.passed else 1)


@app.command()
def show(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A path, a hub id, bundled/NAME, or a saved patch.")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Pictures or videos, in this order.")],
    question: Annotated[str, typer.Option("--question", "-q", help="The text after the pictures.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help=f"{_METHOD_HELP} Stages with +. Default: the saved one.")
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="A .png or a .html file.")] = Path("kept.png"),
    new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 32,
    size: Annotated[int, typer.Option(min=32, max=2048, help="Pixels of the longer side of a picture.")] = 320,
    dtype: Annotated[str, typer.Option(help="Default: that of the checkpoint.")] = "auto",
    device: _Device = None,
    attention: _Attention = "sdpa",
) -> None:
    """Draw which visual tokens each method keeps of pictures, and what the model then answers."""
    _quiet_transformers()
    from rich.console import Console

    from vlmslim.doctor import parse
    from vlmslim.io.files import check_file
    from vlmslim.loading import default_device, load
    from vlmslim.pictures.ask import ask, readable
    from vlmslim.pictures.show import check_format, write
    from vlmslim.saving.folder import read

    with Console(stderr=True).status("loading") as status, _mistakes_in_one_line():
        check_format(output)
        check_file(output)
        names = method or ([checkpoint] if read(checkpoint) is not None else [])
        if not names:
            _fail("no method given; name one or several, such as -m divprune:keep=64")
        methods = [(name, parse(name)) for name in names]
        media = [readable(path) for path in images]
        model, processor = load(checkpoint, dtype=dtype, device=device or default_device(), attention=attention)
        status.update("asking")
        answers = ask(model, processor, question, media, methods, new_tokens=new_tokens)
        status.update("drawing")
        write(output, question, answers, processor, size)
    for answer in answers:
        typer.echo(f"{answer.method}: {answer.text}")
    typer.echo(output)


@app.command()
def demo(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="A path, a hub id, or bundled/NAME.")
    ] = "bundled/tiny-llava",
    host: Annotated[str, typer.Option(help="Address to listen on. The default is this machine alone.")] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Default: the first free one from 7860 on.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Default: that of the checkpoint.")] = "auto",
    device: _Device = None,
    attention: _Attention = "sdpa",
) -> None:
    """Ask about pictures in a browser: answers, kept tokens and costs of two methods beside the unpatched model."""
    _quiet_transformers()
    from rich.console import Console

    with Console(stderr=True).status("loading"), _mistakes_in_one_line():
        from vlmslim.demo.page import serve
        from vlmslim.loading import default_device, load

        model, processor = load(checkpoint, dtype=dtype, device=device or default_device(), attention=attention)
    with _mistakes_in_one_line():
        serve(model, processor, checkpoint, host=host, port=port)


@app.command()
def convert(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A folder or a hub id, in the format of LLaVA's authors.")
    ],
    folder: Annotated[Path, typer.Argument(metavar="DST", help="A new folder.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Write a checkpoint of LLaVA's authors in the form of transformers, for other tools. vlmslim needs none."""
    _quiet_transformers()
    from vlmslim.originals.convert import convert

    with _mistakes_in_one_line():
        convert(source, folder, revision=revision)
    typer.echo(f"{folder} holds {source} in the form of transformers")


@app.command()
def methods(
    name: Annotated[
        str | None, typer.Argument(help="One method, such as fastv or path/to/file.py:Class: all about it.")
    ] = None,
) -> None:
    """List the compression methods, or print the description and the options of one."""
    from dataclasses import MISSING, is_dataclass
    from inspect import getdoc

    from rich.table import Table
    from rich.text import Text

    from vlmslim.compressor import Compressor
    from vlmslim.registry import listings, method_class, options_of

    if name is not None:
        with _mistakes_in_one_line():
            cls = method_class(name)
        typer.echo(f"{getdoc(sys.modules[cls.__module__]) or cls.__name__}\n\n{getdoc(cls)}\n")
        for base in cls.__mro__[1:]:  # options that methods share
            if base is not Compressor and is_dataclass(base):
                typer.echo(f"{base.__name__}: {(getdoc(base) or '').partition('Attributes:')[0].strip()}\n")
        typer.echo("options:")
        for option, default in options_of(cls).items():
            typer.echo(f"  {option}" + ("  (must be given)" if default is MISSING else f" = {default!r}"))
        return
    table = Table("method", "kind", "paper", "what it does", "source", box=None, pad_edge=False)
    for listing in listings():
        paper = f"arXiv {listing.paper}" if listing.paper else "–"
        what, style = (listing.problem, "red") if listing.problem else (listing.summary, "")
        row = (listing.name, listing.kind, paper, what, listing.source)
        table.add_row(*(Text(cell, style) for cell in row))
    _console().print(table)


@app.command()
def vllm(
    method: Annotated[str, typer.Argument(help="As divprune:keep=64, or a folder that save_pretrained wrote.")],
    model: Annotated[
        str, typer.Option(help="A LLaVA-1.5, LLaVA-NeXT or LLaVA-OneVision checkpoint: a folder or a hub id.")
    ] = "llava-hf/llava-1.5-7b-hf",
) -> None:
    """Print the command that serves a checkpoint in vLLM with a method (experimental)."""
    import shlex

    _quiet_transformers()
    from vlmslim.vllm.plan import command

    with _mistakes_in_one_line():
        typer.echo(shlex.join(command(method, model)))


if __name__ == "__main__":
    app()
