"""Parts that several commands share: how a command ends, options, and the console."""

import errno
import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

if TYPE_CHECKING:
    from rich.console import Console

Device = Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")]
Attention = Annotated[str, typer.Option(help="eager, sdpa, flash_attention_2, ...")]
METHOD_HELP = "As fastv:layer=3:keep=64, or path/to/file.py:Class:keep=64; repeat it for several."


class _Stopped(BaseException):
    """A signal that ends the process."""

    def __init__(self, number: int):
        self.number = signal.Signals(number)


class Commands(typer.core.TyperGroup):
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
            fail(f"{word}{hint}", status=128 + number)
        except Exception as error:  # any error at all: a user reads one line, and asks for the traceback if needed
            is_exit = isinstance(error, typer.Abort) or hasattr(error, "exit_code")  # its message is printed already
            if shows_traceback and (cause := error.__context__ if is_exit else error):
                traceback.print_exception(cause)
            if is_exit or _reader_has_gone(error):  # typer ends quietly
                raise
            from vlmslim.io.messages import one_line

            where = "" if shows_traceback else f"; vlmslim --traceback {context.invoked_subcommand} ... shows where"
            fail(f"{type(error).__name__}: {one_line(error)}{where}", status=1)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fail(message: object, status: int = 2) -> NoReturn:
    """Print a message in red on standard error, and end the command."""
    typer.secho(f"vlmslim: {message}", err=True, fg="red")
    raise typer.Exit(status)


def _reader_has_gone(error: BaseException) -> bool:
    """Return whether the program that reads the output has ended, as `head` does after ten lines."""
    return getattr(error, "errno", None) == errno.EPIPE


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Print what a user can put right as one line: a wrong argument, no such checkpoint, a package that is missing."""
    try:
        yield
    except (ImportError, OSError, TypeError, ValueError) as error:
        if _reader_has_gone(error):
            raise
        from vlmslim.io.messages import one_line

        fail(one_line(error))


@contextmanager
def evaluation_command(*also: type[Exception]) -> Iterator[None]:
    """Refuse a command if the extra `eval` is not installed, and print a `ConfigError` or `OSError` without traceback.

    Args:
        also: Further errors that are printed in the same way.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported; progress is shown by rich
    try:
        import lmms_eval  # noqa: F401
        import plotly  # noqa: F401
        import pydantic  # noqa: F401
    except ModuleNotFoundError as error:
        fail(f'{error.name} is not installed; pip install "vlmslim[eval]"')
    from vlmslim.evaluation.errors import ConfigError

    mistakes: tuple[type[Exception], ...] = (ConfigError, OSError, *also)
    try:
        yield
    except mistakes as error:
        if _reader_has_gone(error):
            raise
        fail(error)


def quiet_transformers() -> None:
    """Keep warnings, progress bars and the profiler's log of other libraries off the screen."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # of the profiler, which measures memory on a CPU
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def console() -> "Console":
    """Return a console that is wide enough for a table where the width is not known."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def spare_modules() -> None:
    """Keep modules out of garbage collection: lmms-eval collects twice a cell, which takes half a second otherwise."""
    gc.collect()
    gc.freeze()
