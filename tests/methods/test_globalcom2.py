"""GlobalCom²: every core function against plain loops in float64, and the method on whole models."""

import math

import numpy as np
import pytest
import torch
from checks import check_a_batch_is_its_rows, check_changes_nothing, kept_of
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, SEVERAL, Picture, batch, words
from strategies import mosaic, noise, seeds, shapes, some
from tiny import BOS, tiny
from unpatched import keep_only, reference
from vector_checks.globalcom2 import token_grid

import vlmslim
from vlmslim.methods import globalcom2 as core
from vlmslim.methods.globalcom2 import GlobalCom2

# --- the functions, by plain loops ------------------------------------------------------------------------------------


@some
@given(seeds, st.integers(1, 12))
def test_unlikeness(seed, n):
    x = noise(seed, n, 4)
    group = torch.randint(-1, 3, (n,), generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        mates = [x[j].double() for j in range(n) if group[j] == group[i]]
        mean = sum(mates) / len(mates)
        want = -(x[i].double() @ mean) / (x[i].double().norm() * mean.norm())
        close(core.unlikeness(x, group, views=3)[i].double(), want, 1e-4)


@some
@given(seeds, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
def test_stretch(seed, side, height, width):
    b = noise(seed, side, side).double()
    got = core.stretch(b, height, width)
    for y in range(height):
        for x in range(width):
            v = max((y + 0.5) * side / height - 0.5, 0)
            u = max((x + 0.5) * side / width - 0.5, 0)
            r, c = int(v), int(u)
            r2, c2, v, u = min(r + 1, side - 1), min(c + 1, side - 1), v - r, u - c
            upper, lower = b[r, c] * (1 - u) + b[r, c2] * u, b[r2, c] * (1 - u) + b[r2, c2] * u
            close(got[y, x], upper * (1 - v) + lower * v, 1e-9)


@some
@given(shapes())
def test_sums_over_what_a_crop_covers(shape):
    """By painting the mosaic over the thumbnail, very finely."""
    side, tiles, top, left, seed = shape
    b = noise(seed, side, side).double()
    grid = mosaic(side, tiles, top, left)
    tile = grid[grid[:, 0] > 0][:, 0] - 1
    height, width = tiles[0] * side - 2 * top, tiles[1] * side - 2 * left
    got = core.covered_sums(b, tile.numpy(), tiles)
    # cells of the thumbnail and tokens of the mosaic both consist of whole tiny squares of this grid
    values = [[] for _ in range(tiles[0] * tiles[1])]
    for y in range(height * side):
        for x in range(width * side):
            values[int(tile[y // side * width + x // side])].append(float(b[y // height, x // width]))
    for j, cells in enumerate(values):
        want = sum(cells) / len(cells) * side**2 / len(values) if cells else -math.inf
        assert float(got[j]) == pytest.approx(want, rel=1e-9, abs=1e-9)
    if not top and not left and side % tiles[0] == 0 == side % tiles[1]:
        close(got, core.release_sums(b, tiles), 1e-9)


@some
@given(seeds, st.integers(1, 4), st.integers(1, 30))
def test_quota_gives_websters_seats(seed, groups, n):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, groups, (n,), generator=generator)
    score = torch.randint(0, 5, (n,), generator=generator).double()  # with ties
    weight = torch.rand(groups, generator=generator).double() + 0.5
    left = [sorted((i for i in range(n) if group[i] == g), key=lambda i: (-score[i], i)) for g in range(groups)]
    sizes, taken, want = [len(x) for x in left], [0] * groups, []
    for _ in range(n):
        due = [
            ((taken[g] + 0.5) / (float(weight[g]) * sizes[g]), left[g][taken[g]], g)
            for g in range(groups)
            if taken[g] < sizes[g]
        ]
        _, i, g = min(due)
        want.append(i)
        taken[g] += 1
    assert core.merge_rankings_by_quota(score, group, weight).tolist() == want


def release_by_loops(b, crops, side, tiles, valid, share):
    """One image as the release treats it, transcribed from its description: lists of (crop, row, column)."""
    rows, columns = tiles
    flat = [float(x) for x in b.flatten()]
    thumb = sorted(range(side * side), key=lambda i: (-flat[i], i))[: int(side * side * share)]
    sums = [0.0] * (rows * columns)
    for r in range(side):
        for c in range(side):
            y, x = min(r // max(1, side // rows), rows - 1), min(c // max(1, side // columns), columns - 1)
            sums[y * columns + x] += float(b[r, c])
    raised = [math.exp((s - max(sums)) / 10) for s in sums]
    sigma = [x / (sum(raised) + 1e-8) for x in raised]
    top, bottom, left, right = valid
    big = core.stretch(b, bottom - top, right - left)
    canvas = [[None] * (columns * side) for _ in range(rows * side)]
    for j in range(rows * columns):
        y0, x0 = j // columns * side, j % columns * side
        cells = [(r, c) for r in range(side) for c in range(side) if top <= y0 + r < bottom and left <= x0 + c < right]
        own = [float(crops[j][r, c]) for r, c in cells]
        over = [float(big[y0 + r - top, x0 + c - left]) for r, c in cells]
        norms = [max(math.sqrt(sum(v * v for v in values)), 1e-12) for values in (own, over)]
        total = [a / norms[0] + o / norms[1] for a, o in zip(own, over, strict=True)]
        ratio = min(1, share * (1 + sigma[j] - sum(sigma) / len(sigma)))
        for i in sorted(range(len(cells)), key=lambda i: (-total[i], i))[: int(len(cells) * ratio)]:
            canvas[y0 + i // side][x0 + i % side] = (j + 1, *cells[i])
    out = [(0, i // side, i % side) for i in thumb]
    for line in canvas:
        out += [token for token in line if token] + [(-1, -1, -1)]
    return out


@some
@given(shapes(), st.sampled_from([0.1, 0.3, 0.5, 0.8]))
def test_the_release(shape, share):
    side, tiles, top, left, seed = shape
    views = noise(seed, 1 + tiles[0] * tiles[1], side, side).double() * 3
    grid = mosaic(side, tiles, top, left)
    valid = (top, tiles[0] * side - top, left, tiles[1] * side - left)
    want = release_by_loops(views[0], views[1:], side, tiles, valid, share)
    crop, row, column = grid.clamp(min=0).unbind(1)
    order = core.release_order(views[crop, row, column], grid, tiles, side, share)
    got = torch.where((order < 0)[:, None], -1, grid[order])
    want = torch.tensor(want)
    if len(want) <= len(grid):
        assert got.tolist() == want.tolist()
    else:
        assert len(got) == len(grid)


# --- trap 10: true positions on an unpadded mosaic --------------------------------------------------------------------


def planted(side, tiles, top, left, where, monkeypatch, **options):
    """Return the kept tokens of an image whose scores are high at `where` alone: (component, row, column)."""
    grid = mosaic(side, tiles, top, left)
    image = vlmslim.ImageTokens(
        features=torch.arange(len(grid) * 1.0)[:, None],
        tower=torch.zeros(1 + tiles[0] * tiles[1], side**2, 1),
        pixels=torch.zeros(1, 3, 2, 2),
        tiles=tiles,
        make_grid=lambda: grid,
    )
    score = noise(0, len(grid)) * 1e-3
    at = [image.mosaic.tolist().index(list(x)) for x in where]
    score[at] = 5.0
    monkeypatch.setattr(GlobalCom2, "own_scores", lambda self, image: score)
    return image, at, GlobalCom2(**options).compress(image)


@pytest.mark.parametrize("top, left", [(0, 0), (2, 0), (0, 2)], ids=["square", "wide", "tall"])
def test_planted_patches_keep_their_places(top, left, monkeypatch):
    side, tiles = 6, (2, 2)
    where = [(1, top, left), (1, 5, 6), (1, 8, 3), (1, 11 - top, 11 - left), (1, 6, 5)]
    image, at, found = planted(side, tiles, top, left, where, monkeypatch, keep=30)
    assert set(at) <= set(found.index.tolist())
    assert len(found.index) == 30
    assert (found.index.diff() > 0).all()
    assert found.vectors(image)[:, 0].tolist() == found.index.tolist()
    # a newline ends each row that kept a token, and no other
    grid, kept = image.mosaic, set(found.index.tolist())
    newlines = (grid[:, 0] < 0).nonzero()[:, 0].tolist()
    for line, newline in enumerate(newlines):
        tokens = ((grid[:, 0] == 1) & (grid[:, 1] == line + top)).nonzero()[:, 0].tolist()
        assert (newline in kept) == bool(kept & set(tokens))


def test_the_release_misplaces_them_on_padded_images(monkeypatch):
    where = [(1, 0, 2), (1, 0, 9), (1, 7, 3)]
    orders = {}
    for mode in ("corrected", "released"):
        image, _, found = planted(6, (2, 2), 0, 2, where, monkeypatch, keep=0.3, mode=mode)
        orders[mode] = found.vectors(image)[:, 0].tolist()
    assert orders["corrected"] == sorted(orders["corrected"])
    assert orders["released"] != sorted(orders["released"])


def test_crop_budgets_follow_the_thumbnail(monkeypatch):
    side, tiles = 6, (2, 2)
    where = [(0, r, c) for r in range(3) for c in range(3, 6)]  # the upper right quarter of the thumbnail
    image, _, found = planted(side, tiles, 0, 0, where, monkeypatch, keep=60, newline="drop", temperature=1.0)
    counts = image.grid[found.index, 0].bincount(minlength=5)
    assert counts[2] > max(counts[j] for j in (1, 3, 4))
    assert counts.sum() == 60


# --- on whole models --------------------------------------------------------------------------------------------------

ROWS = [*LONG_ROWS, *SEVERAL]


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"positions": "renumbered"}, {"score": "distance"}, {"newline": "drop"}], ids=str
)
def test_equals_the_model_fed_what_is_kept(family, options):
    for row in (ROWS[0], SEVERAL[0]):
        model = tiny(family)
        inputs, logits, found, receipt = kept_of(model, row, GlobalCom2, keep=7, **options)
        assert [len(x.index) for _, x in found] == [7] * len(found)
        assert receipt["kept"] == receipt["requested"] == 7
        kept = keep_only(inputs, [x.index for _, x in found])
        close(logits, reference(model, inputs, kept, positions=options.get("positions", "original")).full_logits())


def test_the_release_keeps_the_contract(backend):
    model = tiny("next", backend)
    check_changes_nothing(model, batch(model, ROWS), GlobalCom2(keep=1.0, mode="released"))
    check_a_batch_is_its_rows(model, LONG_ROWS, GlobalCom2(keep=0.3, mode="released"))


@torch.no_grad()
def test_the_release_on_a_model():
    """The features that a LLaVA-NeXT model is fed: scores by hand from the tower's own hidden states."""
    model = tiny("next")
    for size in ((60, 30), (64, 64), (32, 64), (64, 23)):
        row = [BOS, Picture(1, size), *words(0, 4)]
        _, _, ((image, found),), receipt = kept_of(model, row, GlobalCom2, keep=0.5, mode="released")
        tower = getattr(model.model.vision_tower, "vision_model", model.model.vision_tower)
        hidden = model.model.vision_tower(image.pixels, output_hidden_states=True).hidden_states[-2]
        layer = tower.encoder.layers[-1]
        y = layer.layer_norm1(hidden)
        q, k = layer.self_attn.q_proj(y[:, :1]), layer.self_attn.k_proj(y[:, 1:])
        scores = ((k * q).sum(-1) / (2 * 8**0.5)).double().view(-1, 4, 4)
        grid = image.grid
        boxes = image.mosaic[grid[:, 0] > 0]
        valid = (int(boxes[:, 1].min()), int(boxes[:, 1].max()) + 1, int(boxes[:, 2].min()), int(boxes[:, 2].max()) + 1)
        want = release_by_loops(scores[0], scores[1:], 4, image.tiles, valid, 0.5)
        place = {tuple(x): i for i, x in enumerate(grid.tolist())}
        close(found.features, image.features[[place[x] for x in want]])
        assert receipt["kept"] == len(want)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="score='distance'"):
        vlmslim.patch(tiny("siglip"), "globalcom2", score="logit")
    for family in ("llava", "siglip", "onevision"):
        with pytest.raises(ValueError, match="mode='corrected'"):
            vlmslim.patch(tiny(family), "globalcom2", mode="released")
    for options in (
        {"keep": 0},
        {"mode": "paper"},
        {"score": "attention"},
        {"newline": "pool"},
        {"temperature": 0},
        {"mode": "released", "positions": "original"},
    ):
        with pytest.raises(ValueError):
            vlmslim.method("globalcom2", **options)


def test_a_tower_without_cls_is_scored_by_distance():
    method = GlobalCom2()
    method.setup(tiny("siglip"))
    assert method.score == "distance" and method.tower_layers == ()
    method = GlobalCom2()
    method.setup(tiny("next"))
    assert method.score == "logit" and method.tower_layers == (-1,)


def test_the_grid_of_the_vectors_is_the_models(monkeypatch):
    """The files' rectangles, laid out as tokens, agree with our own padded mosaics."""
    boxes = np.array([[1, 6, 0, 6], [1, 6, 0, 6], [0, 5, 0, 6], [0, 5, 0, 6]])
    arrays = dict(side=np.array(6), grid_wh=np.array([2, 2]), valid_bbox=boxes)
    assert torch.equal(token_grid(arrays), mosaic(6, (2, 2), 1, 0))
