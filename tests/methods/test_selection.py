"""Common parts of selecting methods: values at tokens, budgets of views, newlines, the releases' padded views."""

from dataclasses import dataclass

import pytest
import torch
from doubles import watched
from prompts import LONG_ROWS, Clip, Picture, batch, words
from tiny import BOS, tiny

import vlmslim
from vlmslim.methods._selection import Selection, interleave, with_padding


@dataclass
class Early(Selection):
    """The first tokens of every pool."""

    keep: int = 5
    pool: str = "view"
    newline: str = "rows"
    mode: str = "corrected"

    def search(self, k, pools, *read):
        return torch.arange(k).expand(len(pools), -1)


def seen_by(model, row, **options) -> tuple:
    method, seen = watched(Early, **options)
    with torch.no_grad(), vlmslim.patch(model, method):
        model(**batch(model, [row]))
    return seen[0]


def test_values_of_patches_arrive_at_their_tokens(family):
    """Every patch says where it is, and every token reads its own place."""
    model = tiny(family)
    image, _ = seen_by(model, LONG_ROWS[0])
    views = len(image.pixels)
    place = torch.cartesian_prod(torch.arange(views), torch.arange(4), torch.arange(4)).view(views, 16, 3).float()
    read = image.at_tokens(place)
    patches = image.grid[:, 0] >= 0
    assert torch.equal(read[patches], image.grid[patches].float())
    assert (read[~patches] == 0).all()
    assert torch.equal(image.at_tokens(place[..., 1]), read[:, 1])
    if family == "llava":
        assert torch.equal(image.tower_tokens, image.tower[0])


def test_values_of_frames_are_pooled_as_the_model_pools_them():
    model = tiny("onevision")
    method, seen = watched(Early)
    with torch.no_grad(), vlmslim.patch(model, method):
        model(**batch(model, [[BOS, Clip(0, 3), *words(0, 4)]]))
        video = seen[0][0]
        pooled = model.model.apply_pooling(video.tower)
    assert video.video and len(video.features) == 13
    torch.testing.assert_close(video.tower_tokens[:-1].view(3, 4, -1), pooled)
    assert (video.tower_tokens[-1] == 0).all()


@pytest.mark.parametrize("keep", [1, 4, 5, 17, 30])
def test_views_share_a_budget_by_their_sizes(keep):
    image, result = seen_by(tiny("next"), [BOS, Picture(1, (60, 60)), *words(0, 4)], keep=keep, newline="drop")
    crop = image.grid[:, 0]
    assert len(result) == keep and (crop[result.index] >= 0).all()
    for view in range(5):
        size, kept = int((crop == view).sum()), int((crop[result.index] == view).sum())
        assert abs(kept - keep * size / int((crop >= 0).sum())) < 1
        assert result.index[crop[result.index] == view].tolist() == (crop == view).nonzero()[:kept, 0].tolist()


def test_newlines_count_within_the_budget():
    image, result = seen_by(tiny("next"), [BOS, Picture(1, (60, 60)), *words(0, 4)], keep=30, newline="rows")
    crop = image.grid[:, 0]
    assert len(result) == 30
    kept = result.index[crop[result.index] < 0].tolist()
    assert kept and all(any(n - 9 < i < n for i in result.index.tolist()) for n in kept)


def test_a_released_view_has_its_padding():
    model = tiny("next")
    image, result = seen_by(model, [BOS, Picture(1, (60, 30)), *words(0, 4)], keep=13, mode="released")
    rows, columns = image.tiles
    padded = with_padding(image)
    assert len(padded.features) == 16 * (1 + rows * columns)
    assert (padded.grid >= 0).all()
    assert padded.grid[:16, 0].tolist() == [0] * 16
    y = (padded.grid[16:, 0] - 1) // columns * 4 + padded.grid[16:, 1]
    x = (padded.grid[16:, 0] - 1) % columns * 4 + padded.grid[16:, 2]
    assert (y * columns * 4 + x).tolist() == list(range(16 * rows * columns))
    with torch.no_grad():
        want = model.model.multi_modal_projector(image.tower)
    torch.testing.assert_close(padded.features[5], want[0, 5])
    each = 13 // (1 + rows * columns)
    assert len(result) == each * (1 + rows * columns)
    torch.testing.assert_close(result.features[:each], want[0, :each])


def test_rankings_take_turns():
    merged = interleave([torch.tensor([5, 6, 7, 8]), torch.tensor([1, 2])])
    assert merged.tolist() == [5, 1, 6, 7, 2, 8]
    assert interleave([torch.tensor([3, 1])]).tolist() == [3, 1]
