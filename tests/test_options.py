"""Options of methods, checked by their annotations: nothing that is nonsense is accepted, and the option is named."""

import math
import types
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from tiny import tiny

import vlmslim
from vlmslim import Compressor, method
from vlmslim.options.check import fits
from vlmslim.registry import method_class, options_of

HUGE = 10**5000
#: Values, and the types of options that may have them.
VALUES: list[tuple[Any, set[Any]]] = [
    *((value, set()) for value in (math.nan, math.inf, -math.inf, HUGE, -HUGE, {"a": 1}, {1}, b"x", object())),
    *((value, {bool}) for value in (True, False)),
    *((value, {int, float}) for value in (0, 3)),
    *((value, {float}) for value in (1.5, 2.0)),
    *((value, {str}) for value in ("x", "no", "off", "false", "3", "0.5", "nan", "")),
    (None, {type(None)}),
    ([], {Sequence, tuple}),
    ([[1]], set()),
]


def alternatives(hint):
    """Return the alternatives of an annotation, without `Union`."""
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else [hint]
    return [part for each in parts for part in (alternatives(each) if each is not hint else [each])]


def nonsense(hint):
    """Return values that an annotation of one of our options forbids, in lists too."""
    kinds = {get_origin(part) or part for part in alternatives(hint)}
    lists = [part for part in alternatives(hint) if get_origin(part) in (Sequence, tuple)]
    entries = [[value] * 3 for part in lists for value in nonsense(get_args(part)[0])]
    return [value for value, takers in VALUES if not takers & kinds] + entries


def cases():
    for name in vlmslim.method_names():
        cls = method_class(name)
        for field in fields(cls):
            hint = get_type_hints(cls)[field.name]
            if field.init:
                values = [math.nan, {"a": 1}, object(), 3, None][: 4 if field.default is None else 5]
                values = values if hint is Any else nonsense(hint)
                yield pytest.param(name, field.name, values, id=f"{name}.{field.name}")


@pytest.mark.parametrize(("name", "option", "values"), [*cases()])
def test_no_nonsense_is_accepted_and_every_refusal_names_the_option(name, option, values):
    needed = {"keep": 4} if "keep" in options_of(name) else {}
    for value in values:
        with pytest.raises(ValueError, match=rf"^{option}=") as refusal:
            method(name, **needed | {option: value})
        assert len(str(refusal.value)) < 400 and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("tokenflex", "expansion", 2**20),
        ("tokenflex", "expansion", 0),
        ("atp", "width", 2**40),
        ("schedule", "seed", -(2**64)),
        ("aim", "iterations", 10**9),
        ("random", "seed", 2**63),
        ("recoverable", "turn", "("),
        ("tokenflex", "weights", "random:x"),
        ("tokenflex", "weights", f"random:{'9' * 5000}"),
    ],
)
def test_what_would_take_forever_is_refused_at_once(name, option, value):
    needed = {"keep": 4} if "keep" in options_of(name) else {}
    with pytest.raises(ValueError, match=f"^{option}="):
        vlmslim.patch(tiny("llava"), name, **needed | {option: value})


@dataclass
class Own(Compressor):
    """A method of another author, which checks nothing itself."""

    ratio: float = 0.5
    exact: bool = False
    names: list[str] | None = None
    pair: tuple[int, float] = (1, 2.0)
    mode: Literal["fast", "slow", 3] = "fast"
    table: dict[str, int] | None = None
    noted: Annotated[int, "a note"] = 1
    later: "int | None" = None
    unknown: "NotImported" = None  # noqa: F821
    constant: ClassVar[int] = 3


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("ratio", math.nan),
        ("exact", "off"),
        ("names", "abc"),
        ("names", [1]),
        ("pair", (1,)),
        ("pair", (1.5, 2.0)),
        ("mode", "medium"),
        ("mode", 3.0),
        ("table", {"a": "b"}),
        ("table", {1: 1}),
        ("noted", True),
    ],
)
def test_options_of_other_authors_are_checked(option, value):
    with pytest.raises(ValueError, match=rf"^{option}=.*: give "):
        Own(**{option: value})
    with pytest.raises(ValueError, match=rf"^{option}="):
        Own(*(value if name == option else Own.__dataclass_fields__[name].default for name in POSITIONS[option]))


POSITIONS = {
    name: [field.name for field in fields(Own) if field.init][: place + 1]
    for place, name in enumerate(field.name for field in fields(Own) if field.init)
}


def test_what_the_annotations_allow_is_taken():
    own = Own(1, True, ["a"], [1, 2], 3, {"a": 1}, 2, 5, object())
    assert (own.ratio, own.pair, own.mode) == (1, [1, 2], 3)


@dataclass
class Strings(Compressor):
    """Annotations as text, as `from __future__ import annotations` makes them."""

    ratio: "float" = 0.5
    layers_of: "Sequence[int | float]" = (1,)


def test_annotations_that_are_text():
    Strings(1, [2, 0.5])
    for option, value in (("ratio", "x"), ("layers_of", [True])):
        with pytest.raises(ValueError, match=f"^{option}="):
            Strings(**{option: value})


class Plain(Compressor):
    """A method with its own constructor and no fields."""

    def __init__(self, anything):
        self.anything = anything


def test_a_constructor_of_ones_own_is_left_alone():
    assert Plain(math.nan).anything is not None


@pytest.mark.parametrize(
    ("value", "hint", "yes"),
    [
        (1, float, True),
        (True, int, False),
        (True, int | bool, True),
        (None, type(None), True),
        ([], list, True),
        ("ab", Sequence[str], False),
        ((1, 2), tuple[int, ...], True),
        ([1, "x"], tuple[int, ...], False),
        (print, types.BuiltinFunctionType, True),
        (object(), Any, True),
    ],
)
def test_fits(value, hint, yes):
    assert fits(value, hint) is yes
