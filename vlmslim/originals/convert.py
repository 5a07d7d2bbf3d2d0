"""`vlmslim convert`: write a checkpoint in the authors' format in the form of transformers, for other tools."""

import os
from pathlib import Path

import transformers

from vlmslim.io.files import check_writable
from vlmslim.loading import load
from vlmslim.originals.checkpoint import find


def convert(source: str, folder: str | os.PathLike[str], *, revision: str | None = None) -> Path:
    """Write a checkpoint as transformers has it: weights under its names and in their own dtype, and a processor.

    Args:
        source: a folder or a hub id, in the authors' format.
        folder: a new or empty folder.
        revision: branch, tag or commit on the hub.

    Returns:
        The folder.

    Raises:
        ValueError: the source is in the form of transformers already or cannot be loaded, or the folder is not empty.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty; give a new folder")
    if find(source, revision) is None:
        raise ValueError(f"{source} is no checkpoint in the format of LLaVA's authors, so there is nothing to convert")
    model, processor = load(source, revision=revision)
    check_writable(folder)
    # Other tools know the image processors of transformers by the name of the one that works on tensors.
    pictures: object = processor.image_processor  # type: ignore[attr-defined]
    name = type(pictures).__name__.removesuffix("Pil")
    processor.image_processor = getattr(transformers, name)(**_options(pictures))  # type: ignore[attr-defined]
    model.save_pretrained(folder, save_original_format=False)
    processor.save_pretrained(folder)
    return folder


def _options(pictures: object) -> dict:
    """Return the options of an image processor."""
    left_out = ("image_processor_type", "processor_class")
    return {key: value for key, value in pictures.to_dict().items() if key not in left_out}  # type: ignore[attr-defined]
