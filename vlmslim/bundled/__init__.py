"""Checkpoints that ship with the package."""

from pathlib import Path

_HERE = Path(__file__).parent
_PREFIX = "bundled/"


def names() -> tuple[str, ...]:
    """Return the names that `resolve` knows, sorted."""
    return tuple(_PREFIX + path.name for path in sorted(_HERE.iterdir()) if path.is_dir() and path.name[0] not in "._")


def resolve(name: str) -> str:
    """Turn `bundled/NAME` into the folder of that checkpoint; return a path or an id on the hub as it is.

    Raises:
        ValueError: no checkpoint of that name is bundled.
    """
    if not name.startswith(_PREFIX):
        return name
    if name not in names():
        raise ValueError(f"no bundled checkpoint {name!r}; there are: {', '.join(names()) or 'none'}")
    return str(_HERE / name.removeprefix(_PREFIX))


def name_of(folder: str) -> str | None:
    """Return the name that `resolve` turns into a folder; None for the folder of another checkpoint."""
    path = Path(folder).resolve()
    return _PREFIX + path.name if path.parent == _HERE.resolve() else None
