"""The contents of `vlmslim.json`. Every damage to the file is a sentence."""

import json
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator

import vlmslim

FORMAT = 1
BASE = "base"
HERE = "."  # the name of a checkpoint that is in the folder of the patch
LARGEST = 2**20  # bytes: a real file has some 2,000

_File = Annotated[str, Field(pattern=r"^[^/\\\x00]+(/[^/\\\x00]+)*$")]


class _Strict(BaseModel):
    """Takes no value of another type, such as "1" for a number."""

    model_config = ConfigDict(strict=True)


class StageEntry(_Strict):
    """A method; the other keys are its options."""

    model_config = ConfigDict(extra="allow", strict=True)

    method: Annotated[str, Field(min_length=1)]


class Base(_Strict):
    """The checkpoint under the patch, as `backbone.describe` returns it.

    included : whether the folder contains a copy of the checkpoint
    folder   : the name of the copy
    files    : the files of the copy, because a later save deletes these and no others
    """

    name: str
    commit: str | None = None
    shape: dict[str, Any]
    signature: dict[str, list[FiniteFloat]] | None = None
    included: bool
    folder: Annotated[str, Field(pattern=r"^base(-[0-9a-f]{16})?$")] = BASE
    files: list[_File] = []

    @model_validator(mode="after")
    def _inside(self) -> Self:
        if any({".", ".."} & set(name.split("/")) for name in self.files):
            raise ValueError("files lie outside of the copy")
        return self


class Configuration(_Strict):
    """The whole file; `saving.folder.Saved` describes its entries."""

    format: Literal[1]
    versions: dict[str, str]
    methods: Annotated[list[StageEntry], Field(min_length=1)]
    trained: list[str]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    base: Base

    @model_validator(mode="after")
    def _sealed(self) -> Self:
        if self.trained and self.sha256 is None:
            raise ValueError("trained parts are named, but not the hash of their file")
        return self


def parse(data: bytes) -> Configuration:
    """Read the text of a configuration.

    Raises:
        ValueError: what is wrong, as the end of a sentence that begins with the name of the file.
    """
    if len(data) > LARGEST:
        raise ValueError(f"is no configuration of vlmslim: it has {len(data)} bytes")
    try:
        found = json.loads(data.decode("utf-8"), parse_constant=_refuse)
    except RecursionError:
        raise ValueError("is no configuration of vlmslim: it is nested too deeply") from None
    except ValueError as error:  # also of text that is not UTF-8, and of numbers with thousands of digits
        raise ValueError(f"is no configuration of vlmslim: {error}") from error
    if isinstance(found, dict) and type(number := found.get("format")) is int and number > FORMAT:
        versions = found.get("versions")
        newer = versions.get("vlmslim") if isinstance(versions, dict) else None
        raise ValueError(f"was written by vlmslim {newer or 'of a later version'}; this is {vlmslim.__version__}")
    try:
        return Configuration.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"is no configuration of vlmslim: {f'{where}: ' if where else ''}{message}") from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")
