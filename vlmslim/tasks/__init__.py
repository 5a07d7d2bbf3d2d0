"""lmms-eval tasks that ship with the package."""

from pathlib import Path


def path() -> str:
    """Return the directory to give to lmms-eval as `--include_path`."""
    return str(Path(__file__).parent)
