"""TokenCorr: every core function against plain loops in float64, and the method on whole models."""

import pytest
import torch
from checks import check_a_batch_is_its_rows, check_changes_nothing, kept_of
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, SEVERAL, Picture, batch, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny
from unpatched import keep_only, reference

import vlmslim
from vlmslim.methods import tokencorr as core
from vlmslim.methods.tokencorr import TokenCorr, View

# --- the functions, by plain loops ------------------------------------------------------------------------------------


def view_of(seed: int, m: int, beta: float = 0.2, first: int = 0) -> View:
    """A view whose patches come in a few repeated kinds."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randn(3, 6, generator=generator)
    keys = kinds[torch.randint(0, 3, (m,), generator=generator)] + 0.7 * torch.randn(m, 6, generator=generator)
    low, deep = torch.randn(2, m, generator=generator).mul(2).softmax(-1)
    return View(torch.arange(first, first + m), keys, core.repetition(keys, int(beta * m)), low, deep, low, 1.5)


@some
@given(seeds, st.integers(1, 16), st.floats(0, 0.9), st.floats(-0.9, 0.95))
def test_redundancy(seed, m, beta, alpha):
    view = view_of(seed, m, beta)
    for i in range(m):
        count = sum(cosine(view.keys[i], view.keys[j]) > alpha for j in range(m) if j != i)
        assert (float(view.repeat[i]) > alpha) == (count > beta * m)


def test_gumbel_draws_from_the_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    u = torch.rand(20000, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first = torch.stack([core.gumbel(p, row).argmax() for row in u[:4000]])
    close(first.bincount(minlength=4) / 4000, p, 0.03)


@some
@given(seeds, st.integers(2, 16), st.sampled_from(["knn", "assign"]), st.integers(1, 5))
def test_absorption(seed, m, merge, neighbours):
    view, x = view_of(seed, m), noise(seed + 1, m, 3)
    keep = noise(seed + 2, m) > 0
    keep[0], keep[1] = True, False
    kept, dropped = ([i for i in range(m) if bool(keep[i]) == side] for side in (True, False))
    sim = {(i, j): cosine(view.keys[i], view.keys[j]) for i in kept for j in dropped}
    if merge == "knn":
        taken = {i: sorted(dropped, key=lambda j: (-sim[i, j], j))[:neighbours] for i in kept}
    else:
        taken = {i: [] for i in kept}
        for j in dropped:
            taken[max(kept, key=lambda i: (sim[i, j], -i))].append(j)
    w, xs = view.low.double(), x.double()
    want = [(w[i] * xs[i] + sum(w[j] * xs[j] for j in taken[i])) / (w[i] + sum(w[j] for j in taken[i])) for i in kept]
    got = core.absorb(x, view.keys, view.low, keep, merge, neighbours)[keep]
    close(got.double(), torch.stack(want), 1e-4)


@some
@given(seeds, st.integers(1, 14), st.integers(1, 3), st.floats(-0.5, 1))
def test_order_of_novelty_agrees_with_alpha(seed, m, count, alpha):
    """Tokens that come in up to some alpha are those that this alpha keeps."""
    views = [view_of(seed + i, m, first=i * m) for i in range(count)]
    order = core.by_novelty(views).tolist()
    assert sorted(order) == list(range(count * m))
    want = set()
    for i, view in enumerate(views):
        samples = int((view.repeat <= alpha).sum())  # without the guard that a view samples one
        ranked = sorted(range(m), key=lambda j: (-float(view.low[j]), j))
        chosen = set(ranked[:samples]) | set(view.outlier.nonzero()[:, 0].tolist())
        want |= {i * m + j for j in chosen}
        if samples:
            assert set(view.keep(alpha).nonzero()[:, 0].tolist()) == chosen
    assert set(order[: len(want)]) == want


@some
@given(seeds, st.integers(2, 14))
def test_density_grows_with_alpha_and_ignores_scale(seed, m):
    view = view_of(seed, m)
    counts = [view.samples(a / 10) for a in range(-10, 11)]
    assert counts == sorted(counts)
    close(core.repetition(view.keys * 7, int(0.2 * m)), view.repeat, 1e-5)
    shuffle = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    close(core.repetition(view.keys[shuffle], int(0.2 * m)), view.repeat[shuffle], 1e-5)


def test_blank_and_dense_crops():
    n = 100
    low = torch.full((n,), 1 / n)
    blank = torch.ones(n, 8) + 1e-3 * noise(0, n, 8)
    dense = torch.eye(n)
    for keys, want in ((blank, 1), (dense, n)):
        view = View(torch.arange(n), keys, core.repetition(keys, 5), low, low, low, 1.5)
        assert view.samples(0.8) == int(view.keep(0.8).sum()) == want


@some
@given(seeds, st.integers(1, 40), st.floats(0, 3))
def test_beyond_quartiles(seed, m, factor):
    x = noise(seed, m).exp()

    def quartile(p: float) -> float:
        values, at = sorted(x.double().tolist()), p * (m - 1)
        below = int(at)
        return values[below] + (at - below) * (values[min(below + 1, m - 1)] - values[below])

    limit = quartile(0.75) + factor * (quartile(0.75) - quartile(0.25))
    got = core.beyond_quartiles(x, factor).tolist()
    assert all(flag == (v > limit) for flag, v in zip(got, x.double().tolist(), strict=True) if abs(v - limit) > 1e-9)
    assert not core.beyond_quartiles(torch.full((m,), 0.1), factor).any()


# --- on whole models --------------------------------------------------------------------------------------------------

ROWS = [*LONG_ROWS, *SEVERAL]


@torch.no_grad()
@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.2}, {"keep": 7}, {"keep": 7, "positions": "renumbered"}, {"alpha": 0.2, "newline": "all"}],
    ids=str,
)
def test_without_merging_equals_the_model_fed_what_is_kept(family, options):
    model = tiny(family)
    for row in (ROWS[0], SEVERAL[0]):
        inputs, logits, found, receipt = kept_of(model, row, TokenCorr, merge="none", beta=0.1, **options)
        assert receipt["requested"] == options.get("keep")
        assert receipt["kept"] < receipt["visual_tokens"]
        kept = keep_only(inputs, [c.index for _, c in found])
        close(logits, reference(model, inputs, kept, positions=options.get("positions", "original")).full_logits())


@torch.no_grad()
@pytest.mark.parametrize("merge", ["knn", "assign"])
def test_merging_happens_before_the_projector(family, merge):
    """Feed an unpatched model the projections of the towers' merged features, at the kept tokens' places."""
    model = tiny(family)
    options = dict(alpha=0.2, beta=0.1, merge=merge, neighbours=3)
    inputs, logits, found, _ = kept_of(model, ROWS[0], TokenCorr, **options)
    ((image, got),) = found
    method = TokenCorr(**options)
    method.setup(model)
    kept = torch.zeros(len(image.features), dtype=torch.bool)
    kept[got.index] = True
    want = image.features.clone()
    for view in method.views(image):
        keep = kept[view.slots]
        x = torch.stack([image.tower[c, r * 4 + col] for c, r, col in image.grid[view.slots].tolist()])
        if not keep.all():
            y = core.absorb(x, view.keys, view.low, keep, merge, 3)[keep]
            want[view.slots[keep]] = model.model.multi_modal_projector(y)
    close(got.features, want[kept])
    if family == "next":  # the thumbnail stays as it is, and so do newlines
        alone = image.grid[:, 0] <= 0
        assert kept[:16].all()
        assert torch.equal(got.features[alone[kept]], image.features[alone & kept])
    assert not torch.equal(got.features, image.features[kept])
    short = reference(model, inputs, keep_only(inputs, [got.index]), positions="original")
    embeds = short.embeds.clone()
    start = int((inputs["input_ids"][0] == 99).nonzero()[0])
    embeds[0, start : start + len(got.index)] = got.features
    close(
        logits,
        reference(model, inputs, keep_only(inputs, [got.index]), positions="original", embeds=embeds).full_logits(),
    )


def test_an_alpha_that_nothing_exceeds_keeps_everything(family):
    model = tiny(family)
    check_changes_nothing(model, batch(model, ROWS), TokenCorr(alpha=1.0))


@pytest.mark.parametrize("options", [{"alpha": 0.3}, {"alpha": 0.3, "sampling": "multinomial"}], ids=str)
def test_a_batch_is_its_rows(family, options):
    check_a_batch_is_its_rows(tiny(family), LONG_ROWS, TokenCorr(**options))


@torch.no_grad()
def test_the_draw_repeats_with_its_seed(family):
    model = tiny(family)
    row = [BOS, Picture(0), *words(0, 3)]
    draws = []
    for seed in (0, 0, 1):
        *_, found, _ = kept_of(model, row, TokenCorr, keep=6, sampling="multinomial", seed=seed)
        draws.append(found[0][1].index.tolist())
    assert draws[0] == draws[1] != draws[2]


@torch.no_grad()
def test_padding_takes_no_part():
    """Each crop's patches are those that survive unpadding, and their keys are the tower's at their true places."""
    model = tiny("next")
    _, _, ((image, _),), _ = kept_of(model, [BOS, Picture(0, (64, 23)), 5], TokenCorr, alpha=0.3)
    method = TokenCorr(alpha=0.3)
    method.setup(model)
    _, k = image.qk(method.low_layer)
    views = method.views(image)
    assert sum(len(v.slots) for v in views) == int((image.grid[:, 0] > 0).sum()) < 16 * (len(image.tower) - 1)
    for view in views:
        for i, (crop, row, column) in enumerate(image.grid[view.slots].tolist()):
            close(view.keys[i], k[crop, :, 1 + row * 4 + column].flatten())


def test_gradients_pass_to_the_features():
    model = tiny("llava")
    with vlmslim.patch(model, "tokencorr", keep=5):
        model(**batch(model, [[BOS, Picture(0), 5, 6]])).logits.sum().backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_what_cannot_be_is_refused():
    for options in (
        {"keep": 0},
        {"alpha": 1.5},
        {"beta": 1.0},
        {"sampling": "random"},
        {"merge": "prumerge"},
        {"thumbnail": "drop"},
        {"neighbours": 0},
        {"iqr": -1},
        {"low": 1.5},
    ):
        with pytest.raises(ValueError):
            vlmslim.method("tokencorr", **options)
    with pytest.raises(ValueError, match="no layer"):
        vlmslim.patch(tiny("next"), "tokencorr", low=7)
    model = tiny("next")
    with vlmslim.patch(model, "tokencorr", keep=10, thumbnail="keep"), pytest.raises(ValueError, match="'compress'"):
        model(**batch(model, ROWS))


def test_layers_follow_the_towers_depth():
    for family, deep in (("llava", -2), ("siglip", -1), ("next", -2), ("onevision", -1)):
        method = TokenCorr()
        method.setup(tiny(family))
        assert (method.low_layer, method.deep_layer) == (0, deep)
        assert set(method.tower_layers) == {0, deep}
    assert round(0.08 * 24) == round(0.08 * 26) == 2
