"""Methods made from their names and options."""

import ast
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, TypeAlias

from vlmslim.io.messages import did_you_mean, one_line
from vlmslim.registry.classes import class_of, method_class, method_names

if TYPE_CHECKING:  # names alone need no torch
    from vlmslim.compressor import Compressor

#: A method as a user writes it: its name, or a dictionary with its name under "method" and its options, or an object.
Spec: TypeAlias = "str | dict[str, Any] | Compressor"


def options_of(method: "str | Compressor | type[Compressor]") -> dict[str, Any]:
    """Return the options of a method and their defaults; `dataclasses.MISSING` for an option that must be given."""
    cls = method_class(method) if isinstance(method, str) else class_of(method)
    return {
        field.name: field.default if field.default_factory is MISSING else field.default_factory()
        for field in fields(cls)
        if field.init
    }


def method(name: str, **options: Any) -> "Compressor":
    """Make a method from its name and options.

    Raises:
        ValueError: an unknown name or option (the message names the nearest), a missing option, or a wrong value.
    """
    cls = method_class(name)
    known = options_of(cls)
    for option in options:
        _check_option(name, cls, option)
    for option, default in known.items():
        if default is MISSING and option not in options:
            raise ValueError(f"{name} needs the option {option}: give {option}=...; its options are {', '.join(known)}")
    try:
        return cls(**options)
    except TypeError as error:  # a value of the wrong type
        given = ", ".join(f"{option}={value!r}" for option, value in options.items())
        raise ValueError(f"{name} cannot be made with {given}: {one_line(error)}") from error


def build(spec: Spec) -> "Compressor":
    """Make a method from its name, or from a dictionary with the key "method"; return an object as it is.

    Raises:
        ValueError: as `method` does, or because `spec` is something else.
    """
    from vlmslim.compressor import Compressor

    if isinstance(spec, Compressor):
        return spec
    if isinstance(spec, str):
        return method(spec)
    if isinstance(spec, dict) and "method" in spec:
        return method(spec["method"], **{option: value for option, value in spec.items() if option != "method"})
    if isinstance(spec, type):
        raise ValueError(f"{spec.__name__} is a class: give an object, such as {spec.__name__}(keep=64)")
    raise ValueError(f"a stage is a name, a method object or a dictionary with the key 'method', not {spec!r}")


def parse_method(text: str) -> dict[str, Any]:
    """Read a method as the command line writes it, such as `fastv:layer=3:keep=64`, into a dictionary for `build`.

    Raises:
        ValueError: an unknown method or option, or an option without a value.
    """
    name, *parts = text.strip().split(":")
    if parts and "=" not in parts[0] and name not in method_names():  # path/to/file.py:Class
        name = f"{name}:{parts.pop(0)}"
    cls = method_class(name)
    stage: dict[str, Any] = {"method": name}
    for part in parts:
        option, equals, value = map(str.strip, part.partition("="))
        if not equals:
            raise ValueError(f"{text!r}: write options as name:option=value, such as fastv:layer=3")
        _check_option(name, cls, option)
        if option in stage:
            raise ValueError(f"{text!r} gives {option} twice")
        try:
            stage[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            stage[option] = value  # a word
    return stage


def _check_option(name: str, cls: type["Compressor"], option: str) -> None:
    from vlmslim.compressor import Compressor

    if option in (known := options_of(cls)):
        return
    hint = did_you_mean(option, known)
    if hasattr(cls, option) and not hasattr(Compressor, option):
        hint = f" An option needs an annotation: write {option}: float = ... in {cls.__name__}, for a number."
    raise ValueError(f"unknown option of {name} {option!r}.{hint} Known: {', '.join(known) or 'none'}")
