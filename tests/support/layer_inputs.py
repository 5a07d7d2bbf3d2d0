"""Inputs of a method between layers, made by hand for one row with one image."""

import torch
from torch import Tensor


def one_image(hidden: Tensor, start: int, n: int) -> dict:
    """Return the fields of a `LayerInput` for a row (S, d) whose image has the tokens from `start` to `start + n`."""
    size = len(hidden)
    image = torch.zeros(1, size, dtype=torch.long)
    image[:, start : start + n] = 1
    place = torch.arange(size)[None]
    return dict(
        hidden=hidden[None],
        mask=torch.ones(1, size, dtype=torch.bool),
        image=image,
        slot=place - start,
        origin=place,
        last=torch.tensor([size - 1]),
        entered=[[n]],
        present=[[n]],
        image_last=[False],
        text_after=[[size - start - n]],
    )
