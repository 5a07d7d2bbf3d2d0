"""Failures of a run as sentences: of a cell, of a check before the run, and of an error from another library."""

from collections.abc import Iterator
from contextlib import contextmanager

from vlmslim.evaluation.errors import CellError, ConfigError
from vlmslim.io.messages import one_line


def cell_failure(what: str, error: Exception) -> CellError:
    """Say what failed, and keep the reason as the cause."""
    failure = CellError(f"{what} failed: {type(error).__name__}: {error}")
    failure.__cause__ = error
    return failure


@contextmanager
def refusing(where: str) -> Iterator[None]:
    """Turn the error of a check or a loader into a mistake in the configuration, at the key `where`.

    Raises:
        ConfigError: instead of an OSError, a TypeError or a ValueError.
    """
    try:
        yield
    except ConfigError:
        raise
    except (OSError, TypeError, ValueError) as error:  # TypeError: a class of model that cannot be patched
        raise ConfigError(f"{where}: {one_line(error)}") from error


def message_of(error: Exception) -> str:
    """Return the message of an error, and its class unless it is one that speaks to the user."""
    attempt = getattr(error, "last_attempt", None)  # lmms-eval opens data several times; the last error has the reason
    if attempt is not None and isinstance(attempt.exception(), Exception):
        error = attempt.exception()
    known = isinstance(error, ImportError | OSError | ValueError)
    return one_line(error) if known else f"{type(error).__name__}: {one_line(error)}"


def as_written(stages: list[dict]) -> str:
    """Write stages as a user writes them."""
    return " + ".join(", ".join(f"{key}: {value}" for key, value in stage.items()) for stage in stages)
