"""HiPrune against plain loops, and its layers in models."""

import pytest
import torch
from checks import VIEWS, kept_of, views
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, batch
from strategies import noise, seeds, some
from tiny import tiny

import vlmslim
from vlmslim.compressor import ImageTokens
from vlmslim.methods.hiprune import HiPrune


def plain(middle: list[float], late: list[float], places: list[list[int]], k: int, alpha: float, rule: str) -> set[int]:
    """The same rule with sets; `places` are crop, row and column."""
    n, width = len(middle), max(column for _, _, column in places) + 1
    anchors = sorted(range(n), key=lambda i: (-middle[i], i))[: round(k * alpha / 5)]
    spread = list(anchors)
    near = set()
    for i in anchors:
        if rule == "grid":
            crop, row, column = places[i]
            around = [
                [crop, row + 1, column],
                [crop, row - 1, column],
                [crop, row, column + 1],
                [crop, row, column - 1],
            ]
            near |= {places.index(place) for place in around if place in places}
        else:
            index = [i - 1, i + 1, i - width, i + width]
            near |= {min(max(j, 0), n - 1) for j in index} if rule == "released" else {j for j in index if 0 <= j < n}
    spread += sorted(near - set(anchors), key=lambda i: (-middle[i], i))
    rest = sorted((i for i in range(n) if i not in spread), key=lambda i: (-late[i], i))
    return set((spread + rest)[:k])


@some
@given(
    seeds,
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    st.sampled_from(["grid", "paper", "released"]),
    st.data(),
)
def test_it_is_the_rule_with_sets(seed, rows, columns, alpha, rule, data):
    """Attention in quarters, so that many patches tie."""
    n = rows * columns
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    middle, late = (torch.randint(0, 5, (2, n), generator=generator) / 4 for _ in range(2))
    grid = torch.cartesian_prod(torch.tensor([3]), torch.arange(rows), torch.arange(columns)).expand(2, -1, -1)
    got = HiPrune(keep=k, alpha=alpha, neighbours=rule).search(k, (), middle, late, grid)
    for i in range(2):
        assert len(got[i]) == k
        want = plain(middle[i].tolist(), late[i].tolist(), grid[i].tolist(), k, alpha, rule)
        assert set(got[i].tolist()) == want


@some
@given(
    seeds,
    st.sets(st.integers(0, 5), min_size=1),
    st.sets(st.integers(0, 5), min_size=1),
    st.sampled_from(["grid", "paper"]),
    st.data(),
)
def test_neighbours_of_a_crop_that_was_cut_or_shrunk(seed, rows, columns, rule, data):
    """They stand next to each other among the tokens that are left."""
    k = data.draw(st.integers(1, len(rows) * len(columns)))
    grid = torch.tensor([[0, r, c] for r in sorted(rows) for c in sorted(columns)])
    heads = {i: (noise(seed, 1, 2, 36, 4), noise(seed + 1 - i, 1, 2, 36, 4)) for i in (0, -2)}
    x = noise(seed, len(grid), 4)
    image = ImageTokens(x, noise(seed, 1, 36, 4), x, (6, 6), make_grid=lambda: grid, recorded_heads=heads)
    method = HiPrune(keep=k, alpha=1.0, neighbours=rule)
    method.tower_layers, method.cls = (0, -2), 0
    (result,) = method.compress_images([image])
    maps = ((q @ key.transpose(2, 3) / 2).softmax(-1) for q, key in heads.values())
    received = [m.mean((0, 1, 2))[6 * grid[:, 1] + grid[:, 2]].tolist() for m in maps]
    places = [[0, r, c] for r in range(len(rows)) for c in range(len(columns))]
    assert set(result.index.tolist()) == plain(*received, places, k, 1.0, rule)


@torch.no_grad()
def test_the_layers_of_anchors_and_registers(family):
    """By the tower's own attention maps. The tower of 3 layers has its anchors in the first, or where one says."""
    model = tiny(family, "eager")
    for middle, index in ((0.375, 0), (3, 2)):
        options = dict(keep=21 if family in ("next", "onevision") else 6, alpha=1.0, newline="drop", middle=middle)
        _, _, ((image, result),), _ = kept_of(model, VIEWS, HiPrune, **options)
        maps = model.model.vision_tower(image.pixels, output_attentions=True).attentions
        for i, view in enumerate(views(image, result)):
            received = [maps[layer][i].mean((0, 1))[-16:][view.place].tolist() for layer in (index, -2)]
            assert plain(*received, image.grid[view.slots].tolist(), len(view.own), 1.0, "grid") == set(view.own)


@torch.no_grad()
def test_released_views_have_equal_budgets():
    model = tiny("next")
    method, seen = watched(HiPrune, keep=21, mode="released")
    with vlmslim.patch(model, method):
        model(**batch(model, LONG_ROWS))
    assert [len(result) for image, result in seen] == [21 // len(image.pixels) * len(image.pixels) for image, _ in seen]
    assert method.neighbours == "released" and HiPrune().neighbours == "grid"


def test_a_layer_that_the_tower_does_not_have():
    with pytest.raises(ValueError, match="has 3 layers"):
        vlmslim.patch(tiny("llava"), "hiprune", middle=9)
