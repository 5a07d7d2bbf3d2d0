"""Helpers of the methods that select an image's tokens before the language model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from vlmslim.compressor import Compressed, ImageTokens, Selector, check_choices
from vlmslim.engine.families import family_of, has_cls, tower
from vlmslim.engine.layout import to_device
from vlmslim.ops.attention import cls_attention, received_attention
from vlmslim.ops.budgets import share_out
from vlmslim.ops.centring import centred
from vlmslim.ops.newlines import fill_budget


@dataclass
class Pool:
    """Tokens that one search chooses among.

    image : that they belong to
    slots : (m,) their positions among the image's tokens
    k     : how many of them to choose
    read  : tensors (m, ...) with what the search reads of each token
    slots_on_host : the same as `slots`, so that what follows from places needs no waiting for the device
    """

    image: ImageTokens
    slots: Tensor
    k: int
    read: tuple[Tensor, ...]
    slots_on_host: np.ndarray


@dataclass
class Selection(Selector):
    """Candidates, budgets, batching, newlines and order of a selection; subclasses override `search`.

    centre : subtract the mean token before cosines ("Centering before Pruning", Cen-Prune). `divprune` and `cdpruner`
             also weigh tokens by how little they resemble the others, as the paper does, which gains 1.4 and 0.7 points
             at 64 tokens of LLaVA-1.5 there; without the weight, the paper loses 2 points at 32

    Attributes:
        newline: "pool" lets newline tokens compete with patches; "rows" and "drop" as in `fill_budget`.
        order: "raster" feeds the kept tokens in reading order, "selection" in the order in which they were picked.
        pool: "image" searches all tokens of an image together; "view" searches each crop or frame by itself, with a
            budget in proportion to its tokens; "frame" does so with the frames of a video alone.
        every_view: each view keeps a token at least, if the budget suffices.
        mode: "released" sees images with tiles as most releases do: every patch of every view competes, also where
            the view is padding; each view has the same budget, rounded down; no newline is kept.
        compares: whether the search takes cosines from which `centre` may subtract the mean.
        merges: whether the method merges what it drops, so that `rectify` has nothing to merge.
    """

    compares: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    newline = "pool"
    order = "raster"
    pool = "image"
    every_view = False
    mode = "corrected"

    centre: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.centre and not self.compares:
            raise ValueError(f"{name} ranks by no plain cosine, so there is no mean to subtract; leave out centre")
        if self.rectify and self.merges:
            raise ValueError(f"{name} merges what it drops itself; leave out rectify")
        if self.mode == "released" and (self.centre or self.rectify):
            raise ValueError("mode='released' does what the release does; use mode='corrected' with centre and rectify")

    def read(self, image: ImageTokens) -> tuple[Tensor, ...]:
        """Return what the search reads of each token of an image: tensors (n, ...). By default its features."""
        return (image.features,)

    def search(self, k: int, pools: Sequence[Pool], *read: Tensor) -> Tensor:
        """Pick k candidates of every pool.

        Args:
            k: number of picks.
            pools: b pools of m tokens each.
            *read: tensors (b, m, ...) with what `read` returned for the candidates.

        Returns:
            (b, k) indices into the candidates, best first.
        """
        raise NotImplementedError

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int | None:
        """Return the budget; a release divides it among the views of an image, and rounds down."""
        k, views = self.requested(n), 1 + math.prod(tiles)
        if k is None or self.mode != "released" or self.pool != "view" or not tiles[1]:
            return k
        return max(1, k // views) * views

    def released(self, image: ImageTokens, k: int) -> Compressed:
        """Compress one image to k tokens as a release does that does not choose as the corrected mode does."""
        raise NotImplementedError

    def compared(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return what to take cosines of tokens x (b, n, d) from, and with `centre` how distinctive each is, (b, n)."""
        return centred(x) if self.centre else (x, None)

    def setup(self, model: Any) -> None:
        """Check that mode="released" fits the model.

        Raises:
            ValueError: the release has no such model.
        """
        family = family_of(model)
        if self.mode == "released" and family.model_type not in ("llava", "llava_next"):
            raise ValueError(
                f"{type(self).__name__}'s release does not support {family.name} as it is; use mode='corrected' with it"
            )

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Search the images of a forward, pools of equal size and budget together.

        Together, because the picks of a search follow one another: a loop over picks takes as long for many images as
        for one.
        """
        counts = [self.budget(image) for image in images]
        if self.mode == "released" and type(self).released is not Selection.released:
            return [
                image.pick_all() if k == len(image.features) else self.released(image, k)
                for image, k in zip(images, counts, strict=True)
            ]
        seen = [with_padding(image) for image in images] if self.mode == "released" else images
        pools = [
            [] if k == len(image.features) and self.order == "raster" else self.pools(given, k)
            for image, given, k in zip(images, seen, counts, strict=True)
        ]
        groups: dict[object, list[Pool]] = {}
        for pool in (pool for found in pools for pool in found):
            groups.setdefault((pool.k, *(x.shape for x in pool.read)), []).append(pool)
        picks: dict[int, Tensor] = {}
        for members in groups.values():
            stacked = [torch.stack(each) for each in zip(*(pool.read for pool in members), strict=True)]
            for pool, found in zip(members, self.search(members[0].k, members, *stacked), strict=True):
                picks[id(pool)] = pool.slots[found]
        results = []
        for image, given, k, found in zip(images, seen, counts, pools, strict=True):
            if not found:
                results.append(image.pick_all())
                continue
            order = interleave([picks[id(pool)] for pool in found])
            if given is image and sum(len(pool.slots) for pool in found) < len(image.features):
                order = fill_budget(order, image.grid_on_host, image.tiles, k, self.newline)  # newlines count, too
            index = order.sort().values if self.order == "raster" else order
            if given is image:
                results.append(image.pick(index))
            else:
                results.append(Compressed(given.features[index], made_of=partial(picked, image, given, index)))
        return results

    def pools(self, image: ImageTokens, k: int) -> list[Pool]:
        """Return the pools of an image of which k tokens are to be kept; those without a budget are left out."""
        n, device = len(image.features), image.features.device
        own, apart = [np.arange(n)], self.pool == "view" or (self.pool == "frame" and image.video)
        if k < n and (self.newline != "pool" or apart):
            crop = image.grid_on_host[:, 0]
            kinds = np.unique(crop[crop >= 0]) if apart else [None]
            own = [np.flatnonzero(crop >= 0 if kind is None else crop == kind) for kind in kinds]
        sizes = [len(places) for places in own]
        budgets = share_out(min(k, sum(sizes)), sizes, self.every_view)
        if self.mode == "released" and len(own) > 1:
            budgets = [min(max(1, k // len(own)), size) for size in sizes]
        read = self.read(image)
        return [
            Pool(image, slots, budget, tuple(x[slots] for x in read), places)
            for slots, places, budget in zip(to_device(device, *own), own, budgets, strict=True)
            if budget
        ]


class ScoredSelection(Selection):
    """A selection that reads how much attention each patch gets in the vision tower.

    Attributes:
        score: "cls" is the attention from CLS to each patch, "received" the mean attention that a patch receives,
            "auto" the first on a tower with a CLS token and the second on others.
        score_layer: tower layer of the attention. -2 is the one whose output LLaVA reads.
        received_layer: the same, for the attention that a patch receives.
    """

    score: str
    score_layer: int = -2
    received_layer: int = -2

    def setup(self, model: Any) -> None:
        """Choose the score for this tower.

        Raises:
            ValueError: the tower has no CLS token and the score needs one.
        """
        super().setup(model)
        cls = has_cls(model.model)
        if self.score == "cls" and not cls:
            raise ValueError(
                f"score='cls' needs a CLS token, and {type(tower(model.model)).__name__} has none; "
                "use score='received', which is what 'auto' takes there"
            )
        if self.score == "auto":
            self.score = "cls" if cls else "received"
            self.substitutes = () if cls else ("received",)
        self.cls = cls
        self.score_layer = self.score_layer if self.score == "cls" else self.received_layer
        self.tower_layers = tuple({*self.tower_layers, self.score_layer})

    def scores(self, image: ImageTokens, layer: int | None = None) -> Tensor:
        """Return the attention that each token of an image gets: (n,) fp32, 0 at newlines."""
        image.score = image.at_tokens(self.patch_scores(image, layer))
        return image.score

    def patch_scores(self, image: ImageTokens, layer: int | None = None) -> Tensor:
        """Return the attention that each patch of each crop gets in a tower layer, by default `score_layer`: (c, p)."""
        q, k = image.qk(self.score_layer if layer is None else layer)
        return cls_attention(q, k) if self.score == "cls" else received_attention(q, k)[:, int(self.cls) :]


def check_selection(options: Any, score: tuple[str, ...] = ("auto", "cls", "received")) -> None:
    """Check the options that selections share.

    Raises:
        ValueError: names the option, and what to give instead.
    """
    Selection.__post_init__(options)
    known = {"newline": ("rows", "drop"), "score": score, "mode": ("corrected", "released")}
    names = {f.name for f in fields(options)}
    check_choices(options, **{name: values for name, values in known.items() if name in names})


def interleave(orders: list[Tensor]) -> Tensor:
    """Merge rankings into one: of every ranking, equal fractions come first, those of earlier rankings on ties."""
    if len(orders) == 1:
        return orders[0]
    turn = torch.cat([(torch.arange(len(order)) + 0.5) / len(order) for order in orders])
    return torch.cat(orders)[turn.argsort(stable=True).to(orders[0].device)]


def with_padding(image: ImageTokens) -> ImageTokens:
    """Return an image with tiles as releases see it that do not unpad: all patches, and no newline.

    The thumbnail comes first, then the mosaic row by row, across tiles. An image without tiles is returned itself.
    """
    side, (rows, columns) = image.side, image.tiles
    if not columns:
        return image
    y, x = torch.meshgrid(torch.arange(rows * side), torch.arange(columns * side), indexing="ij")
    mosaic = torch.stack([1 + y // side * columns + x // side, y % side, x % side], dim=-1).flatten(0, 1)
    thumbnail = torch.cartesian_prod(torch.zeros(1, dtype=torch.long), torch.arange(side), torch.arange(side))
    grid = torch.cat([thumbnail, mosaic])
    crop, row, column = grid.to(image.tower.device).unbind(1)
    with torch.no_grad():
        features = image.project(image.tower[:, -(side**2) :])[crop, row * side + column]
    return replace(image, features=features.to(image.features), make_grid=lambda: grid)


def picked(image: ImageTokens, given: ImageTokens, index: Tensor) -> Tensor:
    """Return `Compressed.made_of` of the tokens `index` (k,) of `given`, which `one_hot` describes."""
    return one_hot(image, given)[index.cpu()]


def one_hot(image: ImageTokens, given: ImageTokens, cls: int = 0) -> Tensor:
    """Tell which of an image's n tokens each of the m tokens of `given` is: (m, n), with rows of zeros for padding.

    A method that chooses and sums these rows instead of features gets `Compressed.made_of`.

    Args:
        image: as it came.
        given: the same object, or `with_padding(image)`.
        cls: how many rows of zeros follow, for the CLS tokens of the views.
    """
    if given is image:
        return functional.pad(torch.eye(len(image.features)), (0, 0, 0, cls))
    slot = {tuple(place): i for i, place in enumerate(image.grid_on_host.tolist())}
    own = torch.tensor([slot.get(tuple(place), -1) for place in given.grid_on_host.tolist()])
    return functional.pad(functional.one_hot(own + 1, len(image.features) + 1)[:, 1:].float(), (0, 0, 0, cls))
