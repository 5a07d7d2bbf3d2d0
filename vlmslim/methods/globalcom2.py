"""GlobalCom²: "Global Compression Commander" (AAAI 2026, arXiv 2501.05179)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmslim.compressor import Compressed, ImageTokens, Keep, Selector, check_choices
from vlmslim.engine.families import family_of, has_cls
from vlmslim.engine.layout import to_device
from vlmslim.ops.attention import cls_attention, cls_logits
from vlmslim.ops.newlines import NEWLINES, fill_budget
from vlmslim.ops.ranking import full_precision, membership, rank_within_groups


@dataclass
class GlobalCom2(Selector):
    """Let the thumbnail decide how many tokens each anyres crop keeps, and help to decide which.

    Every patch is scored by the CLS logits of the tower's last layer. The larger the part of the thumbnail's score
    that lies where a crop is, the larger is the crop's share of the budget. Within a crop, a patch is ranked by its
    own score plus the thumbnail's score at its place (the global score). An image of one view (LLaVA-1.5, small
    images) keeps its best patches by their own scores. A video has no thumbnail; as the paper sketches it, its frames
    are the crops, and the mean of the whole video takes the thumbnail's part.

    mode="released" reproduces the release (commit 96b2d00) with its faults, for LLaVA-NeXT only: thumbnail tokens
    come in order of score; crop tokens are written to the padded grid by their rank on the unpadded crop, which
    shuffles the rows and crops of padded images; padded and empty rows get newlines; `keep` is a share of each view,
    rounded down, to which newlines are added; what the cap at 1 cuts off is lost; crops count as equal parts of the
    thumbnail; images without crops are not compressed. The receipt tells how many tokens were kept. `keep=1.0`
    changes nothing in either mode; in the release it does.

    mode="corrected", the default, differs in each of these points: reading order; true positions; exactly `keep`
    tokens of the image in all, newlines included; what a full crop cannot take goes to the others; a crop is judged
    by the part of the thumbnail that it really covers, and parts of unequal area are compared by their means. In both
    modes scores are in fp32, ties go to the lower index, and every image is scored by its own views.

    keep        : visual tokens to keep per image, a count or a share
    mode        : "corrected" or "released"
    score       : "logit" (CLS logits, as released), "softmax" (CLS attention, which makes the shares almost equal),
                  "distance" (minus the cosine to the mean token of the view, the paper's way for towers without CLS,
                  here taken on projected tokens), or "auto": "logit" where the tower has a CLS token, else "distance"
    temperature : of the softmax over crops
    newline     : "rows" keeps the newline of each row that keeps a token, "all" keeps every newline, "drop" none; all
                  count within the budget. mode="released" has its own rule
    positions   : rotary positions: "auto", "original" or "renumbered" (as released)
    """

    keep: Keep = 0.25
    mode: str = "corrected"
    score: str = "auto"
    temperature: float = 10.0
    newline: str = "rows"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choices(
            self,
            mode=("corrected", "released"),
            score=("auto", "logit", "softmax", "distance"),
            newline=NEWLINES,
        )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: give a positive number; the paper uses 10")
        if self.mode == "released":
            self.reads_back = "the budget of each crop is rounded down, so the scores decide how many tokens stay"

    def setup(self, model: Any) -> None:
        """Choose `score` for this tower.

        Raises:
            ValueError: the tower has no CLS token but the score needs one, or the release has no such model.
        """
        cls = has_cls(model.model)
        if self.mode == "released" and not (cls and family_of(model).anyres):
            raise ValueError(
                "GlobalCom2's release works for anyres models with a CLS token only (LLaVA-NeXT); "
                "use mode='corrected' with this checkpoint"
            )
        if self.score == "auto":
            self.score = "logit" if cls else "distance"
            self.substitutes = () if cls else ("distance",)
        elif self.score != "distance" and not cls:
            raise ValueError(
                f"score={self.score!r} reads the vision tower's CLS token, and this tower has none; "
                "use score='distance' or 'auto'"
            )
        self.tower_layers = () if self.score == "distance" else (-1,)  # the last, whose CLS query scores the patches

    def compress(self, image: ImageTokens) -> Compressed:
        """Score and decide on the device, in fp64; the host knows the places of all tokens."""
        n, device = len(image.features), image.features.device
        k = self.budget(image)
        tiled = bool((image.grid_on_host[:, 0] > 0).any())  # unpadding leaves nothing of a very narrow strip's mosaic
        if k == n or self.mode == "released" and (image.video or not tiled):
            return image.pick_all()
        image.score = self.own_scores(image)
        if self.mode == "corrected":
            return image.pick(self._corrected(image, image.score.double(), k))
        grid, share = torch.from_numpy(image.grid_on_host), self.keep if isinstance(self.keep, float) else k / n
        order = release_order(image.score.cpu().double(), grid, image.tiles, image.side, share, self.temperature)
        newlines = (grid[:, 0] < 0).nonzero()[:, 0]  # all are the same vector
        number = (order < 0).cumsum(0).sub(1).clamp(min=0, max=len(newlines) - 1)
        index = torch.where(order < 0, newlines[number], order)
        return Compressed(image.features[index.to(device)], made_of=lambda: torch.eye(n)[index])

    def own_scores(self, image: ImageTokens) -> Tensor:
        """Score each patch within its own view: (n,) fp32, meaningless at newlines."""
        if self.score == "distance" or image.video:
            return unlikeness(image.features, image.grid[:, 0], views=int(image.grid_on_host[:, 0].max()) + 1)
        return image.at_tokens({"logit": cls_logits, "softmax": cls_attention}[self.score](*image.qk(-1)))

    def _corrected(self, image: ImageTokens, score: Tensor, k: int) -> Tensor:
        """Return the k tokens to keep, ascending."""
        grid = image.grid_on_host
        patches = np.flatnonzero(grid[:, 1] >= 0)
        patch, view = to_device(score.device, patches, grid[patches, 0])
        views, score = int(grid[:, 0].max()) + 1, score[patch]
        if image.video:
            global_score = unlikeness(image.features, image.grid[:, 0].clamp(max=0), views=1).double()[patch]
            weight = crop_weights(sums_within(global_score, view, views), self.temperature)
            score = combined_score(score, global_score, view, views)
        elif image.tiles[1] and views > 1:
            weight, score = self._led_by_thumbnail(image, score)
        else:
            weight = score.new_ones(views)
        order = patch[merge_rankings_by_quota(score, view, weight)]
        return fill_budget(order, grid, image.tiles, k, self.newline).sort().values

    def _led_by_thumbnail(self, image: ImageTokens, score: Tensor) -> tuple[Tensor, Tensor]:
        """Let the thumbnail weigh the crops and their patches.

        Args:
            image: the image, whose thumbnail comes first.
            score: (t,) each patch's score within its view.

        Returns:
            Weights (1 + crops,) of the views, thumbnail first, and final scores (t,).
        """
        crop, own = image.grid_on_host[:, 0], image.side**2
        tile, lines = crop[crop > 0] - 1, int((crop < 0).sum())
        thumbnail, score_of_crops = score[:own], score[own:]
        thumbnail = thumbnail.view(image.side, image.side)
        weight = crop_weights(covered_sums(thumbnail, tile, image.tiles), self.temperature)
        global_score = stretch(thumbnail, lines, len(tile) // lines).flatten()
        (group,) = to_device(score.device, tile)
        final = combined_score(score_of_crops, global_score, group, len(weight))
        return torch.cat([weight.new_ones(1), weight]), torch.cat([score[:own], final])


# --- scores ----------------------------------------------------------------------------------------------------------


def sums_within(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """Sum x (t, ...) within groups (t,): (groups, ...)."""
    return membership(group, groups).to(x) @ x


@full_precision
def unlikeness(x: Tensor, view: Tensor, views: int) -> Tensor:
    """Compute minus the cosine between each token and the mean token of its view.

    Args:
        x: (n, d) tokens.
        view: (n,) integers in [-1, views); newlines, at -1, are a view of their own.
        views: number of views.

    Returns:
        (n,).
    """
    total = sums_within(x, view + 1, views + 1)
    cosine = F.normalize(x, dim=-1) @ F.normalize(total, dim=-1).T  # with the mean of every view: there are few
    return -cosine.gather(1, view[:, None] + 1)[:, 0]


def stretch(thumbnail: Tensor, height: int, width: int) -> Tensor:
    """Stretch the thumbnail's score map over the unpadded mosaic: (side, side) -> (height, width), bilinear."""
    return F.interpolate(thumbnail[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def combined_score(own: Tensor, global_score: Tensor, crop: Tensor, crops: int) -> Tensor:
    """Add own and global scores (t,), each scaled to unit length within its crop (t,): (t,)."""
    return _unit_within(own, crop, crops) + _unit_within(global_score, crop, crops)


def _unit_within(x: Tensor, group: Tensor, groups: int) -> Tensor:
    return x / sums_within(x.square(), group, groups).sqrt().clamp(min=1e-12)[group]


# --- budgets ---------------------------------------------------------------------------------------------------------


def crop_weights(total: Tensor, temperature: float) -> Tensor:
    """Compute how much more or less than the average share each crop may keep.

    Args:
        total: (crops,) score sums.
        temperature: of the softmax over crops.

    Returns:
        (crops,) of mean 1.
    """
    raised = ((total - total.max()) / temperature).exp()
    share = raised / (raised.sum() + 1e-8)
    return 1 + share - share.mean()


def covered_sums(thumbnail: Tensor, tile: np.ndarray, tiles: tuple[int, int]) -> Tensor:
    """Sum the thumbnail's score over the part that each crop covers, scaled to parts of average size.

    The thumbnail shows the picture without padding, so the outer crops of a padded mosaic cover less of it. Means of
    unequal parts can be compared; sums cannot, because logits have an arbitrary offset. Without padding, and if the
    tiles divide the side, this is the sum over equal blocks.

    Args:
        thumbnail: (side, side).
        tile: (t,) the tile, from 0, of each token of the unpadded mosaic in reading order.
        tiles: rows and columns of tiles.

    Returns:
        (rows * columns,); -inf for a crop that consists of padding.
    """
    side, (rows, columns) = len(thumbnail), tiles
    down, across = to_device(
        thumbnail.device,
        _overlap(np.bincount(tile // columns, minlength=rows), side),
        _overlap(np.bincount(tile % columns, minlength=columns), side),
    )
    area = down.sum(1)[:, None] * across.sum(1)
    mean = (down @ thumbnail.double() @ across.T) / area
    return torch.where(area > 0, mean, -torch.inf).flatten() * (side**2 / (rows * columns))


def _overlap(length: np.ndarray, cells: int) -> np.ndarray:
    """Cut a line into `cells` equal cells, and into parts of `length` (parts,); return overlaps (parts, cells)."""
    end = length.cumsum() * cells / length.sum()
    start = np.append(0, end[:-1])
    cell = np.arange(cells)
    return (np.minimum(end[:, None], cell + 1) - np.maximum(start[:, None], cell)).clip(min=0)


def merge_rankings_by_quota(score: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """Merge the rankings of several groups into one, so that the first k tokens are shared as the weights demand.

    This is Webster's method for seats in a parliament: the token of rank r in a group of weight w and size m has its
    turn at (r + 1/2) / (w m). So every budget is met exactly, a group that is used up leaves its seats to the others,
    and a larger budget never drops a token that a smaller one kept.

    Args:
        score: (t,) the ranking within each group; ties go to the lower index.
        group: (t,) integers >= 0.
        weight: (groups,) positive.

    Returns:
        (t,) indices, first turn first.
    """
    rank = rank_within_groups(score[None], group[None])[0]
    size = sums_within(torch.ones_like(score), group, len(weight))
    return ((rank + 0.5) / (weight.double() * size)[group]).argsort(stable=True)


# --- the release -----------------------------------------------------------------------------------------------------


def release_sums(thumbnail: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Sum the thumbnail over the release's blocks: (side, side) -> (rows * columns,).

    If the tiles do not divide the side, the last block gets the remainder.
    """
    side = torch.arange(len(thumbnail))
    row, column = (torch.clamp(side // max(1, len(side) // parts), max=parts - 1) for parts in tiles)
    block = (row[:, None] * tiles[1] + column).flatten()
    return thumbnail.new_zeros(tiles[0] * tiles[1]).index_add(0, block, thumbnail.flatten())


def release_order(
    score: Tensor, grid: Tensor, tiles: tuple[int, int], side: int, share: float, temperature: float = 10.0
) -> Tensor:
    """Return the sequence that the release sends to the language model for one image with crops.

    Args:
        score: (n,) fp64, each patch's own score.
        grid: (n, 3) `ImageTokens.grid`.
        tiles: rows and columns of tiles.
        side: patches along one side of a view.
        share: of each view to keep.
        temperature: of the softmax over crops.

    Returns:
        (m,) indices in the order sent, -1 for a newline.
    """
    crop = grid[:, 0]
    mosaic = (crop > 0).nonzero()[:, 0]  # its tokens
    tile = crop[mosaic] - 1
    first = score[crop == 0]
    thumbnail = first.view(side, side)
    ratio = (share * crop_weights(release_sums(thumbnail, tiles), temperature)).clamp(max=1)
    count = (tile.bincount(minlength=len(ratio)) * ratio).long()
    height = int((crop < 0).sum())
    global_score = stretch(thumbnail, height, len(mosaic) // height).flatten()
    final = combined_score(score[mosaic], global_score, tile, len(ratio))
    kept = rank_within_groups(final[None], tile[None])[0] < count[tile]
    # The fault: a token's number among the valid tokens of its crop is taken for its place in the padded crop.
    number = rank_within_groups(torch.zeros(1, len(tile)), tile[None])[0]
    row, column = tile // tiles[1] * side + number // side, tile % tiles[1] * side + number % side
    width = tiles[1] * side
    place = (row * (width + 1) + column)[kept]
    best = first.argsort(descending=True, stable=True)[: int(side**2 * share)]
    # Padding rows get newlines too. Near share = 1 that is more than the image had; then the last ones are left out.
    lines = torch.arange(min(tiles[0] * side, len(grid) - len(best) - len(place))) * (width + 1) + width
    token = torch.cat([mosaic[kept], torch.full_like(lines, -1)])
    return torch.cat([(crop == 0).nonzero()[:, 0][best], token[torch.cat([place, lines]).argsort()]])
