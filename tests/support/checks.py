"""Properties that hold for every method, whatever its options."""

from dataclasses import dataclass

import torch
from compare import close, greedy, same_cache
from doubles import watched
from prompts import Picture, batch, words
from tiny import BOS
from torch import Tensor

import vlmslim
from vlmslim.engine.families import kv_cache

VIEWS = [BOS, Picture(1, (60, 60)), *words(0, 4)]  # a thumbnail and four tiles


def check_changes_nothing(model, inputs: dict, method) -> None:
    """Under `method` greedy decoding and its cache are what they are without a patch, bit for bit."""
    want, want_logits = greedy(model, inputs)
    with vlmslim.patch(model, method) as slim:
        got, logits = greedy(model, inputs)
        assert not slim.receipt.had_effect
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(logits, want_logits)
    same_cache(kv_cache(got), kv_cache(want))


def check_a_batch_is_its_rows(model, rows: list, method, inputs_of=batch) -> dict:
    """Rows decode together as each does alone; returns the receipt of the batch."""
    with vlmslim.patch(model, method) as slim:
        together, logits = greedy(model, inputs_of(model, rows))
        summary = slim.receipt.summary()
        for i, row in enumerate(rows):
            alone, single = greedy(model, inputs_of(model, [row]))
            close(logits[i], single[0], 5e-4)
            assert together.sequences[i, -6:].tolist() == alone.sequences[0, -6:].tolist()
    return summary


@torch.no_grad()
def kept_of(model, row: list, cls, **options) -> tuple[dict, Tensor, list, dict]:
    """Runs one row: its inputs, its logits (L, V), (image, result) of every image, and the receipt."""
    method, seen = watched(cls, **options)
    inputs = batch(model, [row])
    with vlmslim.patch(model, method) as slim:
        logits = model(**inputs).logits[0]
    return inputs, logits, seen, slim.receipt.summary()


@dataclass
class View:
    """One view of a picture.

    slots : (n,) its tokens among those of the image
    place : (n,) their patches in the tower
    own   : which of them a method kept, as indices into `slots`
    """

    slots: Tensor
    place: Tensor
    own: list[int]


def views(image, result) -> list[View]:
    """Tell apart what a method kept of each view, on a tower of 4 x 4 patches."""
    found = []
    for view in range(len(image.pixels)):
        slots = (image.grid[:, 0] == view).nonzero()[:, 0]
        own = (result.index[:, None] == slots).any(0).nonzero()[:, 0].tolist()
        found.append(View(slots, image.grid[slots, 1] * 4 + image.grid[slots, 2], own))
    return found


@torch.no_grad()
def cls_attention(model, image) -> Tensor:
    """(views, patches): what CLS pays to each patch in the last layer but one, in the mean over heads."""
    return model.model.vision_tower(image.pixels, output_attentions=True).attentions[-2][:, :, 0, 1:].mean(1)


@torch.no_grad()
def check_count(model, method, inputs: dict) -> None:
    """Compare `count` with what is sent of the pictures of a batch."""
    sent = []
    with vlmslim.patch(model, [method]) as slim:
        stage = slim.stages[0].method
        compress = stage.compress_images
        stage.compress_images = lambda images: sent.extend(zip(images, found := compress(images), strict=True)) or found
        model(**inputs)
        counts = [(stage.count(len(image.features), image.tiles, image.size), len(kept)) for image, kept in sent]
    assert sent
    assert all(known in (None, kept) for known, kept in counts), counts
