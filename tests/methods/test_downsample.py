"""The picture shrunk to as many tokens: against the tower itself."""

import pytest
import torch
from checks import kept_of
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import Clip, Picture, batch, words
from strategies import some
from tiny import BOS, tiny
from torch.nn import functional as F

import vlmslim
from vlmslim.methods.downsample import DownSample, shape_of
from vlmslim.ops.budgets import share_out
from vlmslim.patching import shared_encoding


@some
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_grids_hold_the_budget_and_stay_within(rows, columns, data):
    k = data.draw(st.integers(1, rows * columns))
    height, width = shape_of(k, rows, columns)
    assert height <= rows and width <= columns
    assert (height - 1) * width < k <= height * width
    if rows == columns and int(k**0.5) ** 2 == k:
        assert height == width


@pytest.mark.parametrize("family", ["llava", "siglip"])
@torch.no_grad()
def test_a_square_budget_is_the_whole_picture_at_a_smaller_size(family):
    model = tiny(family)
    row = [BOS, Picture(1), *words(0, 4)]
    _, _, ((image, result),), _ = kept_of(model, row, DownSample, keep=9)
    small = F.interpolate(image.pixels, (24, 24), mode="bicubic", antialias=True)
    config = model.config
    output = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
    features = output.hidden_states[config.vision_feature_layer]
    features = features[:, 1:] if config.vision_feature_select_strategy == "default" else features
    close(result.features, model.model.multi_modal_projector(features)[0])


@torch.no_grad()
def test_crops_are_shrunk_without_their_padding():
    model = tiny("next")
    _, _, ((image, result),), _ = kept_of(model, [BOS, Picture(1, (64, 40)), *words(0, 4)], DownSample, keep=17)
    assert len(result) == 17 and result.index is None
    crop = image.grid[:, 0]
    places = image.grid[crop == 1]
    rows, columns = (int(places[:, axis].max() - places[:, axis].min()) + 1 for axis in (1, 2))
    assert columns < 4, "this tile has padding at its sides"
    share = share_out(17, crop[crop >= 0].bincount().tolist())
    left = int(places[:, 2].min())
    height, width = shape_of(share[1], rows, columns)
    part = image.pixels[1:2, :, :, left * 8 : (left + columns) * 8]
    small = F.interpolate(part, (8 * height, 8 * width), mode="bicubic", antialias=True)
    output = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
    want = model.model.multi_modal_projector(output.hidden_states[-2][:, 1:])[0]
    got = result.features[share[0] : share[0] + share[1]]
    close(got, want[torch.arange(share[1]) * len(want) // share[1]])


@torch.no_grad()
def test_frames_and_newlines():
    model = tiny("onevision")
    for keep in (5, 12, 13):
        _, _, ((image, result),), _ = kept_of(model, [BOS, Clip(0, 3), *words(0, 4)], DownSample, keep=keep)
        assert len(result) == keep
    assert len(image.features) == 13


@pytest.mark.parametrize(
    "rows", [[[BOS, Picture(1), *words(0, 4)]], [[BOS, Picture(1)], [BOS, Picture(2), Picture(3)]]]
)
@torch.no_grad()
def test_the_tower_encodes_the_small_picture_alone(rows):
    """The model encodes as ever if nothing shrinks, and for patches that share an encoding."""
    model = tiny("llava")
    inputs, sizes = batch(model, rows), []
    crops = len(inputs["pixel_values"])
    layer = model.model.vision_tower.encoder.layers[0]
    hook = layer.mlp.register_forward_hook(lambda module, args, out: sizes.append(tuple(out.shape[:2])))
    own = model(**inputs).logits
    assert sizes == [(crops, 17)]
    for keep, want in ((4, [(1, 1), *[(1, 5)] * crops]), (16, [(1, 1), (crops, 17)])):
        sizes.clear()
        with vlmslim.patch(model, "downsample", keep=keep) as slim:
            assert torch.equal(model(**inputs).logits, own) == (keep == 16)
        assert sizes == want
    sizes.clear()
    slim = vlmslim.patch(model, "downsample", keep=4)
    slim.remove()
    shared = shared_encoding([slim])
    for _ in range(2):
        with slim.attach(shared):
            model(**inputs)
    hook.remove()
    assert sizes == [(crops, 17), *[(1, 5)] * crops, *[(1, 5)] * crops]


@torch.no_grad()
def test_features_of_the_patched_model_are_those_of_the_small_picture():
    """Whoever asks the patched model for features gets, at every place, the token that covers it."""
    model = tiny("next")
    inputs = batch(model, [[BOS, Picture(1, (64, 40)), *words(0, 4)]])
    pixels = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    own = model.model.get_image_features(**pixels).pooler_output[0]
    with vlmslim.patch(model, "downsample", keep=17):
        (features,) = model.model.get_image_features(**pixels).pooler_output
    _, _, ((image, result),), _ = kept_of(model, [BOS, Picture(1, (64, 40)), *words(0, 4)], DownSample, keep=17)
    into, newline = result.into(), image.grid[:, 0] < 0
    assert torch.equal(features[into >= 0], result.features[into[into >= 0]])
    assert torch.equal(features[newline], own[newline]) and not features[(into < 0) & ~newline].any()
