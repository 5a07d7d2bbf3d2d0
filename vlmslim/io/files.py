"""Files that are complete or absent, checks of where they go, and tables in Markdown."""

import glob
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

ABANDONED = 3600  # seconds without a write, after which a temporary file belongs to a process that died


@contextmanager
def atomically(path: Path) -> Iterator[Path]:
    """Yield a path to write to. It replaces `path` when the block ends, and is removed if the block fails.

    So a reader, or the next run after a crash, never sees half a file. Nobody can guess the name of the temporary file
    and put a link there. The next write deletes what a crash left, after an hour.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _delete_abandoned(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    part = Path(name)
    os.fchmod(handle, 0o666 & ~_umask())
    os.close(handle)
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _delete_abandoned(path: Path) -> None:
    """Delete temporary files of `path` that were last written to more than an hour ago."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        with suppress(OSError):  # another process deleted it first, or owns it
            if time.time() - part.lstat().st_mtime > ABANDONED:
                part.unlink()


def _umask() -> int:
    """Return the mask of file permissions, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_atomically(path: Path, text: str) -> None:
    """Write a text file `atomically`."""
    with atomically(path) as part:
        part.write_text(text, encoding="utf-8")


def check_writable(directory: Path | str) -> None:
    """Make a directory and write a temporary file into it.

    Raises:
        ValueError: a file is in the way, permission is missing, or the disk is full.
    """
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{directory} cannot be written to: {reason}") from error


def check_file(path: Path) -> None:
    """Check that a file can be written, without touching it.

    Raises:
        ValueError: the path is a directory, or its directory cannot be written to.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a directory; give a file")
    check_writable(path.parent)


def markdown_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns line up in the source too: the first to the left, the others to the right."""
    lines = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    pad = [str.ljust] + [str.rjust] * (len(widths) - 1)
    rule = ["-" * w if p is str.ljust else "-" * (w - 1) + ":" for p, w in zip(pad, widths, strict=True)]
    lines.insert(1, rule)
    return "\n".join(
        "| " + " | ".join(p(cell, w) for p, cell, w in zip(pad, line, widths, strict=True)) + " |" for line in lines
    )
