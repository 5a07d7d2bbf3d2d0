"""The settings of a fine-tuning run, and how a YAML file and the command line give them."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError
from pydantic.dataclasses import dataclass as checked

from vlmslim.training.config import command_line, override, read_config

#: YAML reads a bare `no` as false.
Precision = Annotated[Literal["bf16", "fp16", "no"], BeforeValidator(lambda given: "no" if given is False else given)]


@checked
class Settings:
    """A run. A batch has `batch` pictures in each process; a step takes `accumulate` batches of every process."""

    model: str = "bundled/tiny-llava"
    dtype: str = "float32"  # of frozen weights; bfloat16 halves their memory on a GPU. Trained weights are float32
    attn_implementation: str = "sdpa"
    data: str = "scenes"  # a .json or .jsonl file of conversations; "scenes" is the data set of the project's scripts
    images: str = "."  # the folder of the conversations' pictures
    on_error: Literal["raise", "skip"] = "raise"  # "skip" leaves bad records out and counts them
    pictures: PositiveInt = 2400  # scenes
    questions: PositiveInt = 8  # about each scene
    steps: NonNegativeInt = 300  # 0: as many as `epochs` take
    epochs: PositiveFloat = 1.0  # over the data, if `steps` is 0
    batch: PositiveInt = 8
    accumulate: PositiveInt = 1
    lr: PositiveFloat = 1e-3
    warmup: float = 0.03  # share of the steps
    decay: float = 0.0
    clip: PositiveFloat = 1.0
    precision: Precision = "bf16"
    seed: int = 0
    train_decoder: bool = False  # train the language model and the projector as well
    gradient_checkpointing: bool = False
    device: Literal["auto", "cpu"] = "auto"  # "cpu" forces the CPU
    workers: NonNegativeInt = 1
    log_every: PositiveInt = 10
    save_every: PositiveInt = 100
    method: dict = field(default_factory=dict)  # options of the method
    script: dict = field(default_factory=dict)  # options of the method's own training

    #: Settings that a continued run may change.
    MAY_CHANGE: ClassVar = ("workers", "device", "log_every", "save_every", "images")


def parse_arguments(description: str, config: Path) -> tuple[Settings, argparse.Namespace]:
    """Read the command line: `--config FILE --out DIR [--stop STEP] [--train-decoder] [KEY=VALUE ...]`.

    A mistake ends the program with a message.

    Returns:
        The settings, and the arguments `out` and `stop`.
    """
    parser = command_line(description, config, "the trained part ends up in OUT/final")
    parser.add_argument("--train-decoder", action="store_true", help="train the language model and projector as well")
    args = parser.parse_intermixed_args()
    try:
        settings = read_settings(args.config, args.overrides)
    except ValueError as error:
        parser.error(str(error))
    settings.train_decoder |= args.train_decoder
    return settings, args


def read_settings(config: Path, overrides: Sequence[str] = ()) -> Settings:
    """Read the settings in a YAML file; `overrides` are KEY=VALUE, or `method.KEY=VALUE` for one option of the method.

    Raises:
        ValueError: an unknown setting, a wrong value, or `epochs` beside a number of steps.
    """
    defaults, given = asdict(Settings()), read_config(config)
    if unknown := given.keys() - defaults.keys():
        raise ValueError(f"{config}: no setting {', '.join(sorted(unknown))}; there are {', '.join(defaults)}")
    try:
        settings = Settings(**override(defaults | given, overrides))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg']}" for e in error.errors()]
        raise ValueError(f"{config}: {'; '.join(wrong)}") from error
    if settings.steps and "epochs" in {*given, *(text.partition("=")[0] for text in overrides)}:
        raise ValueError(f"steps={settings.steps} leaves epochs without effect: give steps=0 with them")
    return settings
