"""Budgets of each image's own: more tokens to images whose features have a larger effective rank."""

import math

import numpy as np
import pytest
import torch
from doubles import watched
from prompts import Clip, Picture, batch, words
from strategies import noise
from tiny import BOS, tiny

import vlmslim
from vlmslim.cost.parts import count_flops
from vlmslim.methods.divprune import DivPrune
from vlmslim.ops.effective_rank import adapted, effective_rank, solve_average

ROWS = [
    [BOS, Picture(0, (60, 30)), *words(0, 5)],
    [BOS, *words(1, 4), Picture(1, (32, 64)), *words(2, 3), Picture(2, (64, 64)), *words(5, 2)],
]
METHODS = {"random": {}, "uniform": {}, "pool": {}, "divprune": {}, "downsample": {}, "mmr": {}, "globalcom2": {}}


def rank(x: torch.Tensor) -> float:
    """The exponential of the entropy of the singular values of (n, d), without their mean."""
    value = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), compute_uv=False)
    part = value / max(value.sum(), 1e-300)
    return math.exp(-sum(p * math.log(p) for p in part if p > 1e-12))


@pytest.mark.parametrize("shape", [(9, 30), (30, 9), (1, 4)])
def test_effective_rank(shape):
    x = 3 + noise(0, 2, *shape)
    assert effective_rank(x).tolist() == pytest.approx([rank(own) for own in x], rel=1e-4)


def test_budgets_grow_with_the_rank_between_half_and_twice():
    assert [adapted(8, 16, rank, 90) for rank in (10.0, 90.0, 101.25, 200.0)] == [4, 8, 9, 16]
    assert adapted(8, 12, 900.0, 90) == 12 and adapted(1, 16, 1.0, 90) == 1


@pytest.mark.parametrize("seed", range(4))
def test_the_average_is_solved_so_that_the_budgets_keep_their_sum(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(100, 400, 60).tolist()
    budgets, ranks = [n // 4 for n in sizes], rng.uniform(3, 80, 60).tolist()
    average = solve_average(budgets, sizes, ranks)
    kept = [adapted(k, n, r, average) for k, n, r in zip(budgets, sizes, ranks, strict=True)]
    assert abs(sum(kept) - sum(budgets)) <= len(sizes) / 10


@torch.no_grad()
@pytest.mark.parametrize("family", ["llava", "next"])
def test_every_image_is_compressed_as_by_its_own_count(family):
    """In a batch as one by one, and by every method before the language model."""
    model = tiny(family)
    method, seen = watched(DivPrune, keep={"auto": 0.4, "average": 6.0})
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, method) as slim:
        model(**inputs)
    images = [image for image, _ in seen]
    counts = [len(result) for _, result in seen]
    wanted = []
    for image in images:
        crop = image.grid[:, 0]
        mean = np.mean([rank(image.features[crop == i]) for i in range(int(crop.max()) + 1)])
        n = len(image.features)
        wanted.append(min(max(round(round(0.4 * n) * mean / 6.0), round(0.4 * n) // 2), n, 2 * round(0.4 * n)))
    assert counts == wanted and len(set(counts)) > 1
    assert slim.receipt.summary()["requested"] is None
    assert slim.receipt.summary()["kept_range"] == [min(counts), max(counts)]
    first = batch(model, ROWS[:1], padding="none")
    with vlmslim.patch(model, "divprune", keep={"auto": 0.4, "average": 6.0}):
        assert count_flops(model, first)["method"] > 0  # it is asked as any other method
    for name, options in METHODS.items():
        with vlmslim.patch(model, name, keep={"auto": 0.4, "average": 6.0}, **options):
            own = model(**first).logits
        with vlmslim.patch(model, name, keep=counts[0], **options):
            assert torch.equal(own, model(**first).logits), name


@torch.no_grad()
def test_a_video_has_one_budget():
    model = tiny("onevision")
    with vlmslim.patch(model, "divprune", keep={"auto": 0.25, "average": 8.0}) as slim:
        model(**batch(model, [[BOS, Clip(0, 3), *words(0, 4)]]))
    ((seen,),) = slim.receipt.last.images
    assert seen.tokens // 8 <= seen.kept <= seen.tokens // 2


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("fastv", {"layer": 1}, "fastv: keep=.* gives each image its own budget .* between decoder layers"),
        ("tokenflex", {}, "keep=.*: give"),
        ("divprune", {"keep": {"auto": 8}}, "does not say the effective rank of an average image: .*auto=8"),
        ("divprune", {"keep": {"auto": 8, "average": 0}}, "is a positive number"),
        ("divprune", {"keep": {"auto": 1.5, "average": 9.0}}, "a share lies in"),
        ("divprune", {"keep": {"mean": 8}}, "give each image its own budget by keep="),
        ("divprune", {"keep": {}}, "give each image its own budget by keep="),
    ],
)
def test_what_cannot_have_budgets_of_its_own_says_so(method, options, message):
    with pytest.raises(ValueError, match=message):
        vlmslim.patch(tiny("llava"), method, **{"keep": {"auto": 8, "average": 9.0}} | options)
