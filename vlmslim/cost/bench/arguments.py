"""Reads the arguments of `vlmslim bench`."""

from typing import Any

import torch

from vlmslim import registry
from vlmslim.cost.bench.shapes import SHAPES, random_model, shape_config
from vlmslim.loading import check_device, check_dtype, default_device, load_model


def parse_numbers(text: str) -> tuple[int | float, ...]:
    """Read `192,128,64` or `0.33,0.11`.

    Raises:
        ValueError: a part of the text is no number.
    """
    try:
        return tuple(float(part) if "." in part else int(part) for part in text.split(","))
    except ValueError as error:
        raise ValueError(f"{text!r}: write numbers with commas between them, such as 192,128,64") from error


def parse_batches(text: str) -> tuple[int, ...]:
    """Read batch sizes, such as `1,8`.

    Raises:
        ValueError: a part of the text is no whole number from 1 up.
    """
    batches = tuple(batch for batch in parse_numbers(text) if isinstance(batch, int) and batch >= 1)
    if len(batches) < len(text.split(",")):
        raise ValueError(f"batch {text!r}: write whole numbers from 1 up, such as 1,8")
    return batches


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Read `672x1008` as height and width.

    Raises:
        ValueError: the text does not have this form.
    """
    if text is None:
        return None
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise ValueError(f"image size {text!r}: write HEIGHTxWIDTH in pixels, such as 672x672")
    return int(height), int(width)


def parse_peer(text: str) -> dict[str, Any]:
    """Read the method of another author, such as `path/to/file.py:Class`, options after it.

    Raises:
        ValueError: as `registry.parse_method` does, or the name is one of vlmslim's own methods.
    """
    stage = registry.parse_method(text)
    if stage["method"] in registry.method_names():
        raise ValueError(
            f"--compare-with {text}: give a peer's method as path/to/file.py:Class; -m takes {text} by name"
        )
    return stage


def model_of(
    checkpoint: str | None = None,
    shape: str | None = None,
    *,
    layers: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    attention: str = "sdpa",
) -> tuple[str, Any]:
    """Load a checkpoint, or make a named shape with random weights, on one device.

    Returns:
        The name of the model in the record, and the model.

    Raises:
        ValueError: neither or both are given, or the shape, the dtype or the device do not exist or do not fit.
        OSError: there is no such checkpoint.
    """
    if layers is not None and shape is None:
        raise ValueError("--layers goes with --shape; a checkpoint has the layers it has")
    device = device or default_device()
    dtype = dtype or ("bfloat16" if device.startswith("cuda") else "float32")
    if checkpoint is not None and shape is None:
        return checkpoint, load_model(checkpoint, dtype=dtype, device=device, attention=attention)
    if shape is None or checkpoint is not None:
        raise ValueError(f"give a checkpoint or --shape, one of the two; shapes: {', '.join(SHAPES)}")
    check_device(device)
    check_dtype(dtype)
    name = shape if layers is None else f"{shape}, {layers} decoder layers"
    model = random_model(shape_config(shape, layers), dtype=getattr(torch, dtype), device=device, attention=attention)
    return f"{name}, random weights", model
