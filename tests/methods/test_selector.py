"""Options that all selectors share: `rectify` and `centre`, over every method that has them."""

import statistics

import pytest
import torch
from checks import check_a_batch_is_its_rows, check_changes_nothing, kept_of
from clip_fixtures import Words
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, Picture, batch, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny

import vlmslim
from vlmslim.compressor import ImageTokens, ScoreAndKeep
from vlmslim.methods.divprune import DivPrune, farthest_points
from vlmslim.registry import method_class, method_names, options_of

ROW = [BOS, Picture(1, (60, 60)), *words(0, 4)]
SELECTORS = [name for name in method_names() if "rectify" in options_of(name)]
MERGING = ("visionzip", "vscan")


def options(name: str) -> dict:
    known = options_of(name)
    more = {"relevance": "none"} if "relevance" in known else {}
    return more | ({"tokenizer": Words()} if "tokenizer" in known else {})


def plain_merge(x: list, kept: list[int], free: list[int], anchors: int) -> dict[int, list[float]]:
    """Anchors among the free tokens, as the release chooses them; the mean of each group, by the median place."""
    like = {i: {j: cosine(x[i], x[j]) for j in free} for i in free}
    total = {i: sum(like[i].values()) for i in free}
    score = {}
    for i in free:
        below = [like[i][j] for j in free if total[j] < total[i] - 1e-9]
        score[i] = total[i] * (1 - max(below, default=0))
    chosen = sorted(free, key=lambda i: (-score[i], i))[:anchors]
    groups = {i: [i] for i in chosen}
    for i in free:
        if i not in chosen:
            groups[max(chosen, key=lambda j: like[i][j])].append(i)
    means = {}
    for members in groups.values():
        mean = [sum(column) / len(members) for column in zip(*(x[i] for i in members), strict=True)]
        means[statistics.median_low(members)] = mean
    return means | {i: x[i] for i in kept}


@pytest.mark.parametrize("family", ["llava", "next"])
@pytest.mark.parametrize("name", [name for name in SELECTORS if name not in MERGING])
@torch.no_grad()
def test_half_is_selected_and_half_is_merged(name, family):
    """The method sends what it selects of half the budget as it is; every other patch is in the mean of some anchor."""
    model, k = tiny(family), 9
    shared = options(name) | {"positions": "original"}
    cls = type(vlmslim.method(name, keep=k, **shared).stages()[0])
    shared = {key: value for key, value in shared.items() if key in options_of(cls)}
    _, _, ((image, half),), _ = kept_of(model, ROW, cls, keep=k // 2, **shared)
    _, _, ((_, result),), receipt = kept_of(model, ROW, cls, keep=k, rectify=True, **shared)
    assert len(result) == k == receipt["kept"] and (result.index.diff() > 0).all()
    kept, patch = half.index.tolist(), (image.grid[:, 0] >= 0).tolist()
    free = [i for i in range(len(image.features)) if patch[i] and i not in kept]
    want = plain_merge(image.features.double().tolist(), kept, free, k - len(kept))
    assert result.index.tolist() == sorted(want)
    close(result.features, torch.tensor([want[i] for i in sorted(want)], dtype=torch.float32), 1e-4)


@torch.no_grad()
def test_a_budget_beyond_the_patches_takes_newlines():
    model = tiny("next")
    n = len(kept_of(model, ROW, method_class("divprune"), keep=1.0)[2][0][0].features)
    _, _, ((image, result),), _ = kept_of(
        model, ROW, DivPrune, keep=n - 1, rectify=True, positions="original", newline="drop"
    )
    assert len(result) == n - 1
    close(result.features, image.features[result.index], 1e-5)


class Norm(ScoreAndKeep):
    def score(self, image: ImageTokens) -> torch.Tensor:
        return image.features.norm(dim=-1)


def test_methods_of_others_have_it_too(family):
    method = Norm(keep=6, rectify=True, positions="original")
    check_a_batch_is_its_rows(tiny(family), LONG_ROWS, method)
    with torch.no_grad():
        check_changes_nothing(
            tiny(family), batch(tiny(family), LONG_ROWS), Norm(keep=1.0, rectify=True, positions="original")
        )


@torch.no_grad()
def test_budgets_of_each_images_own_stay():
    """Half of what an image's own budget says is selected."""
    given, counts = dict(keep={"auto": 6, "average": 8.0}, positions="original"), []
    model = tiny("next")
    for rectify in (True, False):
        with vlmslim.patch(model, DivPrune(**given, rectify=rectify)) as slim:
            model(**batch(model, LONG_ROWS))
        counts.append([image.kept for row in slim.receipt.last.images for image in row])
    assert counts[0] == counts[1] != [6] * len(counts[0])


# --- centring ---------------------------------------------------------------------------------------------------------


def plain_farthest(x: list, k: int) -> list[int]:
    """Max-min on what is left without the mean, weighted by distinctiveness of what was there with it."""
    n = len(x)
    mean = [sum(column) / n for column in zip(*x, strict=True)]
    moved = [[a - b for a, b in zip(row, mean, strict=True)] for row in x]
    far = [[1 - cosine(a, b) for b in moved] for a in moved]
    unlike = [-sum(cosine(x[i], x[j]) for j in range(n) if j != i) / (n - 1) for i in range(n)]
    weight = [(u - min(unlike)) / (max(unlike) - min(unlike) + 1e-6) for u in unlike]
    chosen = [max(range(n), key=lambda i: min(far[i][j] for j in range(n) if j != i))]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        chosen.append(max(left, key=lambda i: weight[i] * min(far[i][j] for j in chosen)))
    return chosen


@some
@given(seeds, st.integers(3, 14), st.data())
def test_divprune_with_centring(seed, n, data):
    k = data.draw(st.integers(1, n))
    x = noise(seed, 2, n, 5) + 2
    method = DivPrune(keep=k, centre=True)
    got = method.search(k, (), x)
    for i in range(2):
        assert got[i].tolist() == plain_farthest(x[i].double().tolist(), k)
    assert torch.equal(DivPrune(keep=k).search(k, (), x), farthest_points(x, k))


@pytest.mark.parametrize("name", ["scope", "mmr", "tops", "vispruner", "agilepruner", "holov", "mmtok"])
def test_a_common_offset_changes_nothing(name):
    """Cosines of centred tokens do not see what all tokens have in common; raw ones do."""
    given = options(name) | {"holov": {"within": "holistic"}, "agilepruner": {"threshold": 0.8}}.get(name, {})
    x = noise(0, 2, 40, 6)
    padding = torch.zeros(2, 40, dtype=torch.bool)
    others = [noise(2, 2, 40, 3), padding] if name == "mmtok" else [noise(1, 2, 40).exp()]
    offset = 3 * noise(3, 6)
    found = {}
    for centre in (True, False):
        method = vlmslim.method(name, keep=9, centre=centre, **given).stages()[0]
        found[centre] = [method.search(9, (), y, *others).tolist() for y in (x, x + offset)]
    assert found[True][0] == found[True][1]
    assert found[False][0] != found[False][1]
    assert found[True][0] != found[False][0]


# --- refused by name, and seen ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("fastv", dict(keep=4, centre=True), "unknown option of fastv 'centre'"),
        ("pool", dict(keep=4, rectify=True), "unknown option of pool 'rectify'"),
        ("random", dict(keep=4, centre=True), "unknown option of random 'centre'"),
        ("hiprune", dict(centre=True), "HiPrune ranks by no plain cosine"),
        ("prunesid", dict(centre=True), "PruneSID ranks by no plain cosine"),
        ("visionzip", dict(rectify=True, positions="original"), "VisionZip merges what it drops itself"),
        ("vscan", dict(rectify=True, positions="original"), "merges what it drops itself"),
        ("scope", dict(rectify=True, positions="renumbered"), "use positions='original' with it"),
        ("scope", dict(centre=True, mode="released"), "use mode='corrected' with centre"),
        ("holov", dict(centre=True), "use within='holistic'"),
        ("divprune", dict(centre=1), "centre=1: give"),
    ],
)
def test_what_does_not_go_together(name, given, message):
    with pytest.raises(ValueError, match=message):
        vlmslim.method(name, **given)


def test_they_are_seen():
    method = vlmslim.method("divprune", keep=9, centre=True, rectify=True, positions="original")
    assert "centre=True" in str(method) and "rectify=True" in str(method)
    assert str(method).startswith("DivPrune(keep=9, positions='original'")
    spec = {"method": "divprune", "keep": 9, "centre": True}
    assert vlmslim.registry.label(spec) == "divprune-9-centre=True"
    with vlmslim.patch(tiny("llava"), [spec]) as slim:
        assert "centre=True" in slim.receipt.method


def test_positions_stay_by_default_unless_a_release_moves_tokens():
    """One rule for all: a method that says otherwise by default is not compared fairly on a board."""
    for name in method_names():
        options = options_of(name)
        if "positions" in options and name != "blind":  # of which no token is left
            assert options["positions"] == "auto", name
            own = {} if "keep" not in options else {"keep": 0.25}
            assert vlmslim.method(name, **own).stages()[0].positions == "original", name
    for name, released in (("scope", {"mode": "released"}), ("divprune", {"order": "selection"})):
        assert vlmslim.method(name, keep=0.25, **released).positions == "renumbered"
        with pytest.raises(ValueError, match="moves tokens away from their places; use positions='renumbered'"):
            vlmslim.method(name, keep=0.25, positions="original", **released)
