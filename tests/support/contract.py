"""Methods that the contract tests examine: all that have a name, or those of the option `--method` alone."""

import pytest

from vlmslim.registry import BrokenMethod, method_names, options_of

_chosen: list[str] = []


def add_option(parser: pytest.Parser) -> None:
    """Add `--method`, as often as there are methods to examine."""
    parser.addoption(
        "--method",
        action="append",
        default=[],
        metavar="NAME",
        help="examine this method alone, such as path/to/norm.py:Norm; may be given several times",
    )


def choose(config: pytest.Config) -> None:
    """Note what `--method` says, before tests are collected."""
    _chosen[:] = config.getoption("--method")


def contract_methods(*options: str, without: tuple[str, ...] = ()) -> list[str]:
    """Return the names of the methods to examine: all, or those that have `options` and none of `without`.

    A broken method is among all of them alone, where its test fails; it stops no other test from being collected.
    """
    names = _chosen or list(method_names())
    return [name for name in names if not (options or without) or _has(name, {*options}, {*without})]


def _has(name: str, options: set[str], without: set[str]) -> bool:
    try:
        known = options_of(name).keys()
    except BrokenMethod:
        return False
    return options <= known and not without & known
