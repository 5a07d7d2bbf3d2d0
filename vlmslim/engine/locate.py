"""The places of images in prompts."""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from vlmslim.compressor import ImageTokens
from vlmslim.engine.families import Family, placeholders
from vlmslim.engine.forward import Call


@dataclass
class Placed:
    """An image in a prompt.

    row     : of the batch
    columns : (n,) indices of the image's placeholders in that row
    tokens  : the image
    """

    row: int
    columns: np.ndarray
    tokens: ImageTokens


def check_kinds(family: Family, kinds: Collection[str]) -> None:
    """Refuse a forward with pictures and videos of a family that has one placeholder for both.

    Raises:
        ValueError: transformers cannot tell whose features go where, and its own message compares counts only.
    """
    if len(kinds) > 1 and family.video_token == "image_token_id":
        raise ValueError(
            f"{family.name} has one placeholder for pictures and videos, so transformers takes no batch with both: "
            "send pictures and videos in separate calls, or give the video as pictures, one for each frame"
        )


def read_prompt(core: nn.Module, kwargs: dict, kinds: Collection[str]) -> dict[str, np.ndarray]:
    """Copy to the host what tells where the images of a forward are.

    This comes before the vision tower starts, so that the host has nothing else to wait for.

    Args:
        core: the model without its head.
        kwargs: the arguments of the forward.
        kinds: "image", "video" or both.

    Returns:
        Ids and mask, by the name of the argument, as far as the caller gave them; the placeholders of each kind, by its
        name; and without a mask the rotary positions, because they tell where samples end that were packed into a row.
    """
    mask = kwargs.get("attention_mask")
    sent = {"input_ids": kwargs.get("input_ids"), "attention_mask": mask}
    sent |= {"position_ids": kwargs.get("position_ids")} if mask is None else {}
    read = {name: x.cpu().numpy() for name, x in sent.items() if isinstance(x, Tensor) and x.ndim == 2}
    ids, embeds = read.get("input_ids"), kwargs.get("inputs_embeds")
    return read | {kind: placeholders(core, kind, ids, embeds) for kind in kinds}


def locate(call: Call, mask: np.ndarray, ids: np.ndarray | None, family: Family) -> tuple[list[Placed], np.ndarray]:
    """Find the images in the prompts.

    An image whose placeholders the caller's mask hides, all or in part, is left alone: what is visible of it stays.
    `generate` repeats a prompt's images when it expands prompts into beams; then a few rows share an image.

    Args:
        call: the forward.
        mask: (B, L) False at padding.
        ids: (B, L) of the tokens; None if the caller gave embeddings.
        family: tells which views belong to one picture.

    Returns:
        The images by row and position in the prompt, and (B, L) bool, the text tokens.

    Raises:
        ValueError: a row has more placeholders than images.
    """
    placed: list[Placed] = []
    hidden: list[tuple[int, np.ndarray]] = []
    is_text = mask
    for kind, encoded in call.encoded.items():
        is_placeholder = call.read[kind]
        is_text = is_text & ~is_placeholder
        first = 0  # the first image of the row
        for row, there in enumerate(is_placeholder):
            (columns,) = there.nonzero()
            number = first
            while len(columns):
                if number == len(encoded.images):
                    raise ValueError(
                        f"row {row} has more {kind} placeholders than there are {kind}s left for it; every prompt "
                        f"needs its own {kind}s (transformers 5.17 mixes them up itself where beams share a prompt)"
                    )
                image = encoded.images[number]
                n = len(image.features)
                if mask[row, columns[:n]].all():
                    placed.append(Placed(row, columns[:n], image))
                else:
                    hidden.append((row, columns[:n]))
                columns, number = columns[n:], number + 1
            if row % encoded.copies == encoded.copies - 1:
                first = number
    for row, columns in hidden:
        is_text[row, columns] = mask[row, columns]
    if family.joins is not None and ids is not None:
        placed = _joined(placed, ids, family.joins, family.thumbnail)
    placed.sort(key=lambda image: (image.row, image.columns[0]))
    return placed, is_text


def _joined(placed: list[Placed], ids: np.ndarray, joins: Callable[[np.ndarray], bool], thumbnail: int) -> list[Placed]:
    """Make one picture of the views that belong to one, as the tokens between them tell."""
    groups: list[list[Placed]] = []
    for image in placed:
        last = groups[-1][-1] if groups else None
        if last is not None and last.row == image.row:
            between = ids[image.row, last.columns[-1] + 1 : image.columns[0]]
            if joins(between):
                groups[-1].append(image)
                continue
        groups.append([image])
    return [
        Placed(
            group[0].row,
            np.concatenate([x.columns for x in group]),
            ImageTokens.joined([x.tokens for x in group], thumbnail),
        )
        if len(group) > 1
        else group[0]
        for group in groups
    ]
