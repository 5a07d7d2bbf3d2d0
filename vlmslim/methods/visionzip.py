"""VisionZip: "Longer is Better but Not Necessary in Vision Language Models" (CVPR 2025, arXiv 2412.04467)."""

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlmslim.compressor import Compressed, ImageTokens, Keep, Part
from vlmslim.engine.families import projects_patches
from vlmslim.engine.layout import to_device
from vlmslim.methods._selection import ScoredSelection, check_selection, one_hot, with_padding
from vlmslim.ops.merging import ended, nearest, sum_joined


class View(NamedTuple):
    """The patches of one crop or frame, by their places in the image.

    dominant : (d,) those that are sent as they are, ascending
    targets  : (c,) those that take others in, ascending
    others   : (m,) those that join a target
    joined   : (m,) the target that each joins
    """

    dominant: Tensor
    targets: Tensor
    others: Tensor
    joined: Tensor


@dataclass
class VisionZip(ScoredSelection):
    """Keep the patches that CLS attends to most, and merge the others into a few.

    Of the T tokens of a crop or frame, C = round(T x contextual) are contextual and the others dominant. Dominant are
    the patches of most attention from CLS. Of the others in reading order, C evenly spaced ones are targets. Every
    further patch joins the target whose key, averaged over heads, has the largest cosine to its own. Merging comes
    before the projector, except on OneVision, which resizes tokens after it, and where a token is made of several
    patches (our extension).

    mode="released" follows the release (commit 3151f6d), for LLaVA-1.5 and LLaVA-NeXT: CLS itself is one of the
    dominant tokens; a contextual token is the target plus the mean of its members, which doubles its norm; padded
    patches compete; every view has the same budget, rounded down; a view sends CLS, dominant and contextual tokens,
    and tiles send dominant ones in the order of the mosaic, then their CLS, then contextual ones. mode="corrected",
    the default, sends no CLS, because projector and language model never saw one; a contextual token is the mean of
    target and members; all tokens come in reading order, at the places of dominant patches and targets. The budget is
    met exactly. In both modes newlines of tiles are gone, and ties go to the lower index.

    keep       : visual tokens to send per image, a count or a share; the paper uses 192, 128 and 64 of 576
    mode       : "corrected" or "released"
    contextual : part of the budget for merged tokens; the paper uses 10 of 64
    score      : attention from CLS ("cls"), mean attention received ("received", as in the paper for towers without
                 CLS), or "auto": "cls" if the tower has CLS
    positions  : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    pool = "view"
    newline = "drop"
    merges = True

    keep: Keep = 0.111
    mode: str = "corrected"
    contextual: Part = 10 / 64
    score: str = "auto"

    def __post_init__(self) -> None:
        check_selection(self)

    def setup(self, model: Any) -> None:
        """Find out whether merging comes before the projector, and the layer whose input has CLS.

        Raises:
            ValueError: mode="released" and the tower has no CLS token.
        """
        super().setup(model)
        if self.mode == "released" and not self.cls:
            raise ValueError("mode='released' sends the CLS token, and this tower has none; use mode='corrected'")
        self.before_projector = model.config.model_type != "llava_onevision" and projects_patches(model.model)
        if not self.before_projector:
            self.substitutes = (*self.substitutes, "late merge")
        self.tower_layers = (*self.tower_layers, -1) if self.mode == "released" else self.tower_layers

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return keys averaged over heads, and attention."""
        keys = image.qk(self.score_layer)[1].float().mean(1)[:, int(self.cls) :]
        return image.at_tokens(keys), self.scores(image)

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress the images one by one."""
        return super().select_images(images) if self.mode == "released" else [self.compress(x) for x in images]

    def compress(self, image: ImageTokens) -> Compressed:
        """Merge within every view, then project."""
        n, k = len(image.features), self.budget(image)
        if k == n:
            return image.pick_all()
        views = self.views(image, k)
        whole = View(*map(torch.cat, zip(*views, strict=True)))
        index = torch.cat([whole.dominant, whole.targets])
        features = merged(image.tower_tokens if self.before_projector else image.features, views, False)[index]
        features = image.project(features) if self.before_projector else features
        sent = torch.zeros(n, dtype=torch.uint8, device=index.device).index_fill(0, index, 1)
        spare = sent.argsort(stable=True)[: k - len(index)]  # newlines, once all patches are sent
        index, order = torch.cat([index, spare]).sort()
        features = torch.cat([features.to(image.features), image.features[spare]])[order]
        return Compressed(features, index, partial(ended, n, index, whole.others, whole.joined))

    def released(self, image: ImageTokens, k: int) -> Compressed:
        """Merge within every view, padding included, and send CLS tokens too."""
        given = with_padding(image)
        views = self.views(given, k)
        order = released_order(views, len(given.features))

        def sequence(x: Tensor) -> Tensor:
            return merged(x, views, True)[order]

        features = image.project(sequence(torch.cat([given.tower_tokens, image.cls]))).to(image.features)
        return Compressed(features, made_of=lambda: sequence(one_hot(image, given, len(views)).to(features.device)))

    def views(self, image: ImageTokens, k: int) -> list[View]:
        """Split the patches of every view; in the release, CLS is one of the tokens of its view."""
        views, cls = [], int(self.mode == "released")
        for pool in self.pools(image, k):
            keys, attention = pool.read
            keys = self.compared(keys[None])[0][0]
            parts = zipped(keys, attention, pool.k - cls, round(pool.k * self.contextual))
            views.append(View(*(pool.slots[places] for places in parts)))
        return views


def zipped(keys: Tensor, attention: Tensor, k: int, contextual: int) -> View:
    """Split n patches into k tokens and those that they take in.

    Args:
        keys: (n, w) what similarity is measured on.
        attention: (n,).
        k: number of tokens, at most n.
        contextual: number of targets, as far as k allows.
    """
    contextual = min(contextual, k)
    order = attention.argsort(descending=True, stable=True)
    dominant, left = (part.sort().values for part in order.tensor_split([k - contextual]))
    if not contextual:
        return View(dominant, *[left[:0]] * 3)
    step = len(left) // contextual
    evenly = slice(0, step * contextual, step)
    (rest,) = to_device(left.device, np.delete(np.arange(len(left)), evenly))
    targets, others = left[evenly], left[rest]
    return View(dominant, targets, others, nearest(keys, others, targets))


def merged(x: Tensor, views: list[View], released: bool) -> Tensor:
    """Put contextual tokens at the places of their targets among the tokens x (n, v) of an image: (n, v).

    They are means of targets and others, or as `released`, targets plus means of others.
    """
    made = x.clone()
    for view in views:
        total, size = sum_joined(x, view.others, view.joined, view.targets)
        own = x[view.targets].float()
        contextual = own + total / size.clamp(min=1) if released else (own + total) / (1 + size)
        made[view.targets] = contextual.to(x)
    return made


def released_order(views: list[View], n: int) -> Tensor:
    """Put the n tokens of an image into the order in which the release sends them.

    Returns:
        (m,) places; n + i is the CLS token of view i.
    """
    cls = torch.arange(n, n + len(views), device=views[0].targets.device)
    mosaic = torch.cat([cls[:0], *(view.dominant for view in views[1:])]).sort().values
    contextual = [view.targets for view in views]
    return torch.cat([cls[:1], views[0].dominant, contextual[0], mosaic, cls[1:], *contextual[1:]])
