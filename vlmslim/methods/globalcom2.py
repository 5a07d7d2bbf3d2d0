"""GlobalCom²: "Global Compression Commander" (AAAI 2026, arXiv 2501.05179)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_choices, check_keep, resolve_keep
from vlmslim.engine.families import family_of, has_cls
from vlmslim.ops.attention import cls_attention, cls_logits
from vlmslim.ops.newlines import NEWLINES, spend
from vlmslim.ops.selection import full_precision, rank_within_groups


@dataclass
class GlobalCom2(Compressor):
    """Let the thumbnail decide how many tokens each anyres crop may keep, and help to decide which.

    Every patch is scored by the CLS logits of the tower's last layer. The more of the thumbnail's score lies in the
    part that a crop covers, the larger the crop's share; within a crop a patch counts by its own score plus the
    thumbnail's score at its place. One view alone (LLaVA-1.5, small images) keeps its best patches by its own score.
    A video has no thumbnail: as the paper sketches it, frames are the crops and the whole video commands them.

    mode="released" reproduces the release (commit 96b2d00), slips included, for LLaVA-NeXT only: thumbnail tokens in
    order of score; crop tokens written to the padded grid by their rank on the unpadded crop, which shuffles rows and
    crops of padded images; newlines for padded and empty rows; `keep` as a share per view, newlines on top, rounded
    down, and what the cap at 1 cuts off is lost; crops taken for equal parts of the thumbnail; images without crops
    are left alone. The receipt says what it kept. `keep=1.0` is the identity in either mode; in the release it is not.

    mode="corrected", the default, differs in each of these points: reading order; true positions; `keep` tokens of
    the image in all, exactly, newlines included; what a full crop cannot take goes to the others; a crop commands
    that part of the thumbnail which it really covers, and parts of unequal area compare by their mean. In either
    mode scores are in fp32, ties go to the lower index and every image is scored by its own views.

    keep        : visual tokens to keep per image, a count or a share
    mode        : "corrected" or "released"
    score       : "logit" (CLS logits, as released), "softmax" (CLS attention: shares come out all but equal),
                  "distance" (minus the cosine to the mean token of the view, which is the paper's way for towers
                  without CLS; taken on projected tokens), or "auto": "logit" where the tower has a CLS token
    temperature : of the softmax over crops
    newline     : "rows" keeps the newline of each row that keeps a token, "all" keeps every newline, "drop" none; all
                  within the budget. mode="released" has its own rule
    positions   : "renumbered" (as released) or "original" rotary positions
    """

    keep: Keep = 0.25
    mode: str = "corrected"
    score: str = "auto"
    temperature: float = 10.0
    newline: str = "rows"
    positions: str = "renumbered"

    def __post_init__(self):
        check_keep(self.keep)
        check_choices(
            self,
            mode=("corrected", "released"),
            score=("auto", "logit", "softmax", "distance"),
            newline=NEWLINES,
        )
        if not self.temperature > 0:
            raise ValueError(f"temperature={self.temperature}: it must be positive; the paper uses 10")
        if self.mode == "released" and self.positions == "original":
            raise ValueError("mode='released' moves tokens away from their places; use positions='renumbered' with it")

    @property
    def tower_layers(self) -> tuple[int, ...]:
        """The last layer, whose CLS query scores the patches."""
        return () if self.score == "distance" else (-1,)

    def setup(self, model: nn.Module) -> None:
        """Settle `score` for this tower.

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
        elif self.score != "distance" and not cls:
            raise ValueError(
                f"score={self.score!r} reads the vision tower's CLS token, and this tower has none; "
                "use score='distance' or 'auto'"
            )

    def compress(self, image: ImageTokens) -> Compressed:
        """Score on the device; decide on the CPU, in fp64, which costs one copy of n numbers."""
        n = len(image.features)
        k = resolve_keep(self.keep, n)
        if k == n:
            return image.pick(torch.arange(n, device=image.features.device))
        grid, score = image.grid.cpu(), self.own_scores(image).cpu().double()
        if self.mode == "released":
            if not image.tiles[1]:
                return image.pick(torch.arange(n, device=image.features.device))
            share = self.keep if isinstance(self.keep, float) else k / n
            order = release_order(score, grid, image.tiles, image.side, share, self.temperature)
            order = torch.where(order < 0, int((grid[:, 0] < 0).nonzero()[0, 0]), order)
            return Compressed(image.features[order.to(image.features.device)])
        patch = (grid[:, 1] >= 0).nonzero()[:, 0]
        crop = grid[patch, 0]
        if image.video:
            command = unlikeness(image.features, image.grid[:, 0].clamp(max=0)).cpu().double()[patch]
            total = torch.zeros(int(crop.max()) + 1, dtype=command.dtype).index_add(0, crop, command)
            weight, score = crop_weights(total, self.temperature), holistic(score[patch], command, crop)
        elif image.tiles[1]:
            weight, score = self._commanded(score[patch], crop, image, int((grid[:, 0] < 0).sum()))
        else:
            weight, score = torch.ones(1, dtype=score.dtype), score[patch]
        order = patch[by_quota(score, crop, weight)]
        kept = spend(order, grid, image.tiles, k, self.newline).sort().values
        return image.pick(kept.to(image.features.device))

    def own_scores(self, image: ImageTokens) -> Tensor:
        """(n,) fp32: how much each patch matters within its own view; at newlines the number means nothing."""
        if self.score == "distance" or image.video:
            return unlikeness(image.features, image.grid[:, 0])
        maps = {"logit": cls_logits, "softmax": cls_attention}[self.score](*image.qk(-1))
        crop, row, column = image.grid.clamp(min=0).unbind(1)
        return maps[crop, row * image.side + column]

    def _commanded(self, score: Tensor, crop: Tensor, image: ImageTokens, height: int) -> tuple[Tensor, Tensor]:
        """View weights (1 + crops,), thumbnail first, and final scores (patches,); `height` is the mosaic's."""
        tiled = crop > 0
        thumbnail = score[~tiled].view(image.side, image.side)
        tile = crop[tiled] - 1
        weight = crop_weights(covered_sums(thumbnail, tile, image.tiles), self.temperature)
        command = stretch(thumbnail, height, len(tile) // height).flatten()
        final = score.clone()
        final[tiled] = holistic(score[tiled], command, tile)
        return torch.cat([weight.new_ones(1), weight]), final


# -- scores -----------------------------------------------------------------------------------------------------------


@full_precision
def unlikeness(x: Tensor, group: Tensor) -> Tensor:
    """Minus the cosine between each token and the mean token of its group: (n, d) and (n,) integers >= -1 -> (n,)."""
    total = F.one_hot(group + 1).T.to(x) @ x  # scattered sums would not repeat to the last bit on a GPU
    cosine = F.normalize(x, dim=-1) @ F.normalize(total, dim=-1).T  # with every group's mean: there are few
    return -cosine.gather(1, group[:, None] + 1)[:, 0]


def stretch(thumbnail: Tensor, height: int, width: int) -> Tensor:
    """Lay the thumbnail's score map over the unpadded mosaic: (side, side) -> (height, width), bilinear."""
    return F.interpolate(thumbnail[None, None], size=(height, width), mode="bilinear", align_corners=False)[0, 0]


def holistic(own: Tensor, command: Tensor, crop: Tensor) -> Tensor:
    """Own score plus the commander's, each of unit length within a crop: (t,), (t,) and (t,) >= 0 -> (t,)."""
    return sum(x / _norms(x, crop)[crop] for x in (own, command))


def _norms(x: Tensor, group: Tensor) -> Tensor:
    return x.new_zeros(int(group.max()) + 1).index_add(0, group, x.square()).sqrt().clamp(min=1e-12)


# -- budgets ----------------------------------------------------------------------------------------------------------


def crop_weights(total: Tensor, temperature: float) -> Tensor:
    """How much more or less than the average share each crop may keep: (crops,) score sums -> (crops,) of mean 1."""
    raised = ((total - total.max()) / temperature).exp()
    share = raised / (raised.sum() + 1e-8)
    return 1 + share - share.mean()


def covered_sums(thumbnail: Tensor, tile: Tensor, tiles: tuple[int, int]) -> Tensor:
    """The score of the part of the thumbnail that each crop covers, as its mean times an average part's size.

    The thumbnail shows the picture without padding, so the outer crops of a padded mosaic cover less of it; means
    compare, sums would not, because logits have an arbitrary offset. Without padding, and with a side that the tiles
    divide, this is the sum over equal blocks.

    Args:
        thumbnail: (side, side).
        tile: (t,) the tile, from 0, of each token of the unpadded mosaic in reading order.
        tiles: rows and columns of tiles.

    Returns:
        (rows * columns,); -inf for a crop that is padding altogether.
    """
    side, (rows, columns) = len(thumbnail), tiles
    down = _overlap((tile // columns).bincount(minlength=rows), side)
    across = _overlap((tile % columns).bincount(minlength=columns), side)
    area = down.sum(1)[:, None] * across.sum(1)
    mean = (down @ thumbnail.double() @ across.T) / area
    return torch.where(area > 0, mean, -torch.inf).flatten() * (side**2 / (rows * columns))


def _overlap(length: Tensor, cells: int) -> Tensor:
    """Cut a line into `cells` equal cells, and into parts of `length` (parts,): the overlaps, (parts, cells)."""
    end = length.cumsum(0)[:, None].double() * cells / length.sum()
    start = torch.cat([end.new_zeros(1, 1), end[:-1]])
    cell = torch.arange(cells, device=end.device)
    return (torch.minimum(end, cell + 1) - torch.maximum(start, cell)).clamp(min=0)


def by_quota(score: Tensor, group: Tensor, weight: Tensor) -> Tensor:
    """Merge the rankings of several groups into one, so that every prefix shares seats as the weights demand.

    These are Webster's seats: the token of rank r in a group of weight w and size m is due at (r + 1/2) / (w m). Each
    budget is met exactly, a group that is used up leaves its seats to the others, and a larger budget never drops a
    token that a smaller one kept.

    Args:
        score: (t,) the ranking within each group; ties go to the lower index.
        group: (t,) integers >= 0.
        weight: (groups,) positive.

    Returns:
        (t,) indices, first due first.
    """
    rank = rank_within_groups(score[None], group[None])[0]
    size = group.bincount(minlength=len(weight))
    return ((rank + 0.5) / (weight.double() * size)[group]).argsort(stable=True)


# -- the release ------------------------------------------------------------------------------------------------------


def release_sums(thumbnail: Tensor, tiles: tuple[int, int]) -> Tensor:
    """Sums over the release's blocks of the thumbnail: (side, side) -> (rows * columns,).

    A side that the tiles do not divide leaves its remainder to the last block.
    """
    side = torch.arange(len(thumbnail))
    row, column = (torch.clamp(side // max(1, len(side) // parts), max=parts - 1) for parts in tiles)
    block = (row[:, None] * tiles[1] + column).flatten()
    return thumbnail.new_zeros(tiles[0] * tiles[1]).index_add(0, block, thumbnail.flatten())


def release_order(
    score: Tensor, grid: Tensor, tiles: tuple[int, int], side: int, share: float, temperature: float = 10.0
) -> Tensor:
    """The sequence that the release sends to the language model for one image with crops.

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
    at = (crop > 0).nonzero()[:, 0]  # tokens of the mosaic
    tile = crop[at] - 1
    first = score[crop == 0]
    thumbnail = first.view(side, side)
    ratio = (share * crop_weights(release_sums(thumbnail, tiles), temperature)).clamp(max=1)
    count = (tile.bincount(minlength=len(ratio)) * ratio).long()
    height = int((crop < 0).sum())
    final = holistic(score[at], stretch(thumbnail, height, len(at) // height).flatten(), tile)
    kept = rank_within_groups(final[None], tile[None])[0] < count[tile]
    # The slip: a token's rank among the valid tokens of its crop is taken for its place in the padded crop.
    number = rank_within_groups(torch.zeros(1, len(tile)), tile[None])[0]
    row, column = tile // tiles[1] * side + number // side, tile % tiles[1] * side + number % side
    width = tiles[1] * side
    place = (row * (width + 1) + column)[kept]
    best = first.argsort(descending=True, stable=True)[: int(side**2 * share)]
    # Padding rows get newlines too. Near share = 1 that is more than the image had; then the last ones are left out.
    lines = torch.arange(min(tiles[0] * side, len(grid) - len(best) - len(place))) * (width + 1) + width
    token = torch.cat([at[kept], torch.full_like(lines, -1)])
    return torch.cat([(crop == 0).nonzero()[:, 0][best], token[torch.cat([place, lines]).argsort()]])
