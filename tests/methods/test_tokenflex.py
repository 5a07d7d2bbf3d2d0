"""TokenFLEX: pooling, square counts, random counts in training, all families, and what is refused."""

import math

import pytest
import torch
from compare import close, greedy, lengths
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, ROWS, SEVERAL, Clip, Picture, batch, visual, words
from strategies import some
from tiny import BOS, IMAGE, tiny
from torch.nn import functional as F

import vlmslim
from vlmslim.engine.families import kv_cache
from vlmslim.methods.tokenflex import Projector, TokenFlex, pool_square, square_side

SMALL = dict(counts=(1, 4, 9), probabilities=(0.2, 0.3, 0.5))


def flex(model, **options):
    return vlmslim.patch(model, "tokenflex", **dict(weights="random", keep=0.25) | options)


# --- pooling ---------------------------------------------------------------------------------------------------------


@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 3))
@some
def test_pooling_is_what_section_2_1_says(grid, side, width):
    """Against loops over the stretched grid, in float64."""
    x = torch.randn(2, grid**2, width, generator=torch.Generator().manual_seed(grid), dtype=torch.float64)
    cell = math.ceil(grid / side)
    big = cell * side

    def stretched(b, row, column, c):  # corners aligned: the last pixel sits on the last pixel
        at = [i * (grid - 1) / (big - 1) if big > 1 else 0.0 for i in (row, column)]
        low = [min(int(a), grid - 1) for a in at]
        high = [min(i + 1, grid - 1) for i in low]
        v, h = at[0] - low[0], at[1] - low[1]
        value = lambda i, j: x[b, i * grid + j, c]  # noqa: E731
        top = (1 - h) * value(low[0], low[1]) + h * value(low[0], high[1])
        bottom = (1 - h) * value(high[0], low[1]) + h * value(high[0], high[1])
        return (1 - v) * top + v * bottom

    got = pool_square(x, side)
    assert got.shape == (2, side**2, width)
    for b, i, j, c in [(0, 0, 0, 0), (1, side - 1, 0, width - 1), (1, side // 2, side - 1, 0)]:
        cells = [stretched(b, i * cell + r, j * cell + s, c) for r in range(cell) for s in range(cell)]
        assert got[b, i * side + j, c].item() == pytest.approx(sum(cells).item() / cell**2, abs=1e-9)


@given(st.integers(1, 6), st.integers(1, 4))
@some
def test_both_poolings_agree_where_the_side_divides_the_grid(side, cell):
    x = torch.randn(1, (side * cell) ** 2, 3, generator=torch.Generator().manual_seed(side))
    close(pool_square(x, side), pool_square(x, side, "adaptive"), 1e-5)


def test_the_poolings_differ_elsewhere():
    x = torch.randn(1, 27**2, 3)
    assert (pool_square(x, 8) - pool_square(x, 8, "adaptive")).abs().max() > 0.1


def test_the_projector_has_the_sizes_of_the_paper():
    for width, hidden, millions in [(1152, 3584, 20.4), (1152, 2048, 15.1), (1024, 4096, 18.9)]:
        with torch.device("meta"):
            projector = Projector(width, hidden)
        assert sum(p.numel() for p in projector.parameters()) / 1e6 == pytest.approx(millions, abs=0.05)


# --- counts ----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000))
@some
def test_counts_that_are_no_squares_name_their_neighbours(count):
    side = math.isqrt(count)
    if side**2 == count:
        assert square_side(count) == side
        return
    with pytest.raises(ValueError, match=f"{count}.*use {side**2} or {(side + 1) ** 2}"):
        TokenFlex(keep=count, weights="random")


@pytest.mark.parametrize(
    ("share", "kept"), [(0.25, 4), (0.3, 4), (0.5, 4), (0.55, 9), (0.5625, 9), (1.0, 16), (0.01, 1)]
)
@torch.no_grad()
def test_a_share_is_rounded_down_to_a_square(share, kept):
    model = tiny("llava")
    with flex(model, keep=share) as slim:
        model(**batch(model, ROWS))
    assert slim.receipt.summary()["kept"] == kept


@pytest.mark.parametrize("family", ["llava", "siglip"])  # images of one crop
@torch.no_grad()
def test_the_prompt_keeps_its_placeholders_and_the_model_reads_t_squared(family):
    """The processor's count of placeholders stays: the engine removes what is left over, for every tested side."""
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    placeholders = int((inputs["input_ids"] == IMAGE).sum())
    images = sum(len(visual(batch(model, [row]))) for row in LONG_ROWS)
    for keep in (1, 4, 9, 16):
        with flex(model, keep=keep) as slim:
            out = model(**inputs)
        assert out.logits.shape[:2] == inputs["input_ids"].shape
        assert int((inputs["input_ids"] == IMAGE).sum()) == placeholders == 16 * images
        assert slim.receipt.summary()["kept"] == slim.receipt.summary()["requested"] == keep
        text = (inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()
        many = [len(visual(batch(model, [row]))) for row in LONG_ROWS]
        width = max(int(t) + keep * m for t, m in zip(text.sum(1), many, strict=True))
        assert lengths(kv_cache(out)) == [width] * 4
        assert out.logits.isfinite().all()


def test_more_tokens_than_the_image_has_are_refused():
    model = tiny("llava")
    with flex(model, keep=25), pytest.raises(ValueError, match="larger than the image, which has 16"):
        model(**batch(model, ROWS))
    with flex(model, counts=[25], probabilities=[1.0]) as slim:
        slim.trained.train()
        with pytest.raises(ValueError, match="25.*16 visual tokens per crop"):
            model(**batch(model, ROWS))


def test_weights_have_to_be_given(tmp_path):
    with pytest.raises(ValueError, match=r"docs/training\.md"):
        vlmslim.patch(tiny("llava"), "tokenflex", keep=4)
    with pytest.raises(ValueError, match="vlmslim.json"):
        vlmslim.patch(tiny("llava"), "tokenflex", keep=4, weights=str(tmp_path))


# --- what the model reads ---------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_tokens_are_the_projected_pooled_tower_features():
    """Computed by hand from the model's parts, image by image, rows sharing nothing."""
    model = tiny("llava")
    inputs = batch(model, ROWS)
    tower = model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
    seen = []
    hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with flex(model, keep=9) as slim:
        model(**inputs)
        p = slim.trained["tokenflex"]
        grid = tower.transpose(1, 2).unflatten(2, (4, 4))
        pooled = F.avg_pool2d(F.interpolate(grid, (6, 6), mode="bilinear", align_corners=True), 2).flatten(2).mT
        z = F.layer_norm(pooled, pooled.shape[-1:], p.norm.weight, p.norm.bias)
        gate, value = F.linear(z, p.gate.weight, p.gate.bias), F.linear(z, p.value.weight, p.value.bias)
        want = F.linear(gate * gate.sigmoid() * value, p.out.weight, p.out.bias)
    hook.remove()
    width = seen[0].shape[1]
    for row, tokens in zip(ROWS, want, strict=True):
        before = next(i for i, x in enumerate(row) if isinstance(x, Picture))
        pad = width - (sum(not isinstance(x, Picture) for x in row) + 9)
        i = ROWS.index(row)
        close(seen[0][i, pad + before : pad + before + 9], tokens, 1e-5)


@torch.no_grad()
def test_pooling_nothing_is_the_model_itself(family):
    """The training-free control at full size: our packing of crops, unpadding and newlines is the model's own."""
    model = tiny(family)
    inputs = batch(model, [*LONG_ROWS, *SEVERAL])
    plain = model(**inputs).logits
    with vlmslim.patch(model, "tokenflex", weights="pool", keep=1.0):
        assert torch.equal(model(**inputs).logits, plain)


@torch.no_grad()
def test_packing_at_full_side_is_the_models(family):
    """Every image's own tokens, sent through TokenFLEX's packing instead of the model's."""
    model = tiny(family)
    seen = []

    class Repacked(TokenFlex):
        def compress_images(self, images):
            for image in images:
                crops = model.model.multi_modal_projector(image.tower)
                seen.append((self._packed(image, crops, 4), image.features))
            return super().compress_images(images)

    with vlmslim.patch(model, Repacked(keep=1.0, weights="pool")):
        model(**batch(model, [*LONG_ROWS, *SEVERAL]))
    assert len(seen) == 6
    for got, want in seen:
        assert got.shape == want.shape
        close(got, want, 1e-5)


@pytest.mark.parametrize("family", ["next", "onevision"])
@pytest.mark.parametrize("side", [1, 2, 3])
@torch.no_grad()
def test_anyres_images_are_packed_as_a_model_of_that_side_would(family, side):
    """Base and tiles at t x t, unpadded, a newline after each row: as the model packs a tower of t x t patches."""
    model = tiny(family)
    model.config.image_grid_pinpoints = [[32, 64], [64, 32], [64, 64], [32, 96]]
    sizes = [(60, 30), (32, 64), (60, 60), (90, 20), (17, 64), (64, 23)]
    rows = [[BOS, Picture(i, size), *words(i, 3)] for i, size in enumerate(sizes)]
    method, seen = watched(TokenFlex, keep=side**2 / 16, weights="random")
    for row in rows:
        with vlmslim.patch(model, method):
            model(**batch(model, [row]))
    assert len(seen) == len(sizes)
    core, strategy = model.model, dict(vision_feature_select_strategy="default") if family == "next" else {}
    for (image, result), size in zip(seen, sizes, strict=True):
        crops, newline = torch.randn(len(image.tower), side**2, 32), image.features[-1]
        method.most_tiles = 9 if family == "onevision" else 0
        core.config.vision_config.patch_size = {1: 32, 2: 16, 3: 10}[side]  # the model takes its side from this
        want, _ = core.pack_image_features([crops], torch.tensor([size]), image_newline=newline, **strategy)
        core.config.vision_config.patch_size = 8
        assert torch.equal(method._packed(image, crops, side), want[0]), (size, side)
        assert len(result.features) == len(want[0])


@torch.no_grad()
def test_frames_of_a_video_are_pooled_alike():
    model = tiny("onevision")
    with flex(model, keep=0.25) as slim:
        model(**batch(model, [[BOS, Clip(0, 3), *words(0, 4)]]))
    assert slim.receipt.summary()["kept"] == 3 * 1 + 1  # a frame has 2 x 2 tokens here


def test_a_count_on_tiles_asks_for_a_share():
    model = tiny("next")
    with flex(model, keep=4), pytest.raises(ValueError, match="keep=0.25"):
        model(**batch(model, ROWS))


@torch.no_grad()
def test_the_count_changes_nothing_but_the_number_of_tokens():
    """Same parameters at every count, and the model is given back as it was."""
    model = tiny("llava")
    inputs = batch(model, ROWS)
    plain = model(**inputs).logits
    states = []
    for keep in (4, 9):
        with flex(model, keep=keep) as slim:
            greedy(model, inputs)
            states.append({k: v.clone() for k, v in slim.trained.state_dict().items()})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert torch.equal(model(**inputs).logits, plain)


def test_random_weights_follow_their_seed_and_leave_the_generator_alone():
    model, found = tiny("llava"), []
    for seed in ("random", "random:0", "random:1"):
        state = torch.get_rng_state()
        torch.manual_seed(17)
        before = torch.get_rng_state()
        with flex(model, weights=seed, keep=4) as slim:
            found.append(slim.trained["tokenflex"].gate.weight.clone())
        assert seed != "random" or torch.equal(torch.get_rng_state(), before)
        torch.set_rng_state(state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# --- training ---------------------------------------------------------------------------------------------------------


def test_draws_come_as_often_as_asked():
    flex = TokenFlex(keep=64, weights="random")
    torch.manual_seed(0)
    drawn = [flex.draw() for _ in range(10_000)]
    for count, share in zip((64, 144, 256), (0.2, 0.3, 0.5), strict=True):
        assert drawn.count(count) / 10_000 == pytest.approx(share, abs=0.02)


def test_training_draws_one_count_a_forward_and_evaluation_none():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    with flex(model, keep=16, **SMALL) as slim, torch.no_grad():
        slim.trained.train()
        kept = set()
        for _ in range(30):
            slim.reset_receipt()
            model(**inputs)
            kept.add(slim.receipt.summary()["kept"])
        assert kept == {1, 4, 9}, "every image of a forward has the same count, and all counts come"
        slim.trained.eval()
        slim.reset_receipt()
        model(**inputs)
        assert slim.receipt.summary()["kept"] == 16


@pytest.mark.parametrize("count", [1, 4, 9])
def test_gradients_reach_every_weight_at_every_count(count):
    model = tiny("llava").requires_grad_(False)
    inputs = batch(model, ROWS)
    with flex(model, counts=[count], probabilities=[1.0]) as slim:
        slim.trained.train()
        model(**inputs).logits[:, -1].logsumexp(-1).sum().backward()
        for name, p in slim.trained.named_parameters():
            assert p.grad is not None and p.grad.abs().max() > 0, name
    assert all(p.grad is None for p in model.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    found = []
    for checkpointing in (False, True):
        model = tiny("llava").requires_grad_(False).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with flex(model, counts=[9], probabilities=[1.0]) as slim:
            slim.trained.train()
            model(**batch(model, ROWS), use_cache=False).logits[:, -1].logsumexp(-1).sum().backward()
            found.append([p.grad for p in slim.trained.parameters()])
    for plain, again in zip(*found, strict=True):
        close(plain, again, 1e-5)
