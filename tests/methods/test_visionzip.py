"""VisionZip against plain loops, and its two modes in models."""

import pytest
import torch
from checks import VIEWS, cls_attention, kept_of, views
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import Picture, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny

import vlmslim
from vlmslim.engine.families import encoder_layers
from vlmslim.methods.visionzip import VisionZip, merged, zipped


def plain(x, keys, attention: list[float], k: int, merged: int, how: str) -> tuple[list, list[int], list[int]]:
    """Vectors of dominant and contextual tokens, and the patches they stand at."""
    order = sorted(range(len(x)), key=lambda i: (-attention[i], i))
    dominant, left = sorted(order[: k - merged]), sorted(order[k - merged :])
    step = max(1, len(left) // merged) if merged else 1
    targets = left[::step][:merged]
    members: dict[int, list] = {t: [] for t in targets}
    for i in left:
        if targets and i not in targets:
            best = max(targets, key=lambda t: (cosine(keys[i], keys[t]), -t))
            members[best].append(x[i])
    made = []
    for t in targets:
        if how == "mean":
            made.append(torch.stack([x[t], *members[t]]).mean(0))
        else:
            made.append(x[t] + torch.stack(members[t]).mean(0) if members[t] else x[t])
    return [*x[dominant], *made], dominant, targets


@some
@given(seeds, st.integers(1, 24), st.booleans(), st.data())
def test_it_is_the_rule_patch_by_patch(seed, n, released, data):
    """Signed unit keys and attention in quarters: comparisons are exact, and many tie."""
    k = data.draw(st.integers(1, n))
    count = data.draw(st.integers(0, k))
    generator = torch.Generator().manual_seed(seed)
    keys = torch.eye(4)[torch.randint(4, (n,), generator=generator)]
    keys = keys * (torch.randint(2, (n, 1), generator=generator) * 2 - 1)
    x, attention = noise(seed, n, 3), torch.randint(1, 5, (n,), generator=generator) / 4
    view = zipped(keys, attention, k, count)
    want, dominant, targets = plain(x, keys, attention.tolist(), k, count, "sum" if released else "mean")
    assert (view.dominant.tolist(), view.targets.tolist()) == (dominant, targets)
    torch.testing.assert_close(merged(x, [view], released)[[*dominant, *targets]], torch.stack(want))


@torch.no_grad()
def test_corrected_tokens_stand_at_their_places():
    """Each view by itself, merged before the projector, in reading order, with as many tokens as asked for."""
    model = tiny("next", "eager")
    _, _, ((image, result),), _ = kept_of(model, VIEWS, VisionZip, keep=25, contextual=0.4)
    attention, tower = cls_attention(model, image), model.model.vision_tower
    layer, states = encoder_layers(model.model)[-2], tower(image.pixels, output_hidden_states=True).hidden_states
    keys = layer.self_attn.k_proj(layer.layer_norm1(states[-3]))[:, 1:].unflatten(-1, (2, -1)).mean(2)
    assert len(result) == 25 and (result.index.diff() > 0).all() and (image.grid[result.index, 0] >= 0).all()
    for i, view in enumerate(views(image, result)):
        inside, place, slots, k = torch.isin(result.index, view.slots), view.place, view.slots, len(view.own)
        given = image.tower[i][place], keys[i][place], attention[i][place].tolist()
        made, dominant, targets = plain(*given, k, round(0.4 * k), "mean")
        order = sorted(range(k), key=lambda j: [*dominant, *targets][j])
        assert result.index[inside].tolist() == slots[sorted([*dominant, *targets])].tolist()
        close(result.features[inside], model.model.multi_modal_projector(torch.stack(made)[order]), 1e-4)


@pytest.mark.parametrize("centre", [False, True])
@torch.no_grad()
def test_each_token_is_the_mean_of_those_that_went_into_it(centre):
    model, row = tiny("siglip"), [BOS, Picture(2, (60, 44)), *words(1, 4)]
    _, _, ((image, result),), _ = kept_of(model, row, VisionZip, keep=12, centre=centre)
    means = [image.tower_tokens[result.into() == i].mean(0) for i in range(12)]
    close(result.features, model.model.multi_modal_projector(torch.stack(means)), 1e-4)


@torch.no_grad()
def test_released_sends_cls_first():
    model = tiny("llava", "eager")
    row = [BOS, Picture(1), *words(0, 4)]
    _, _, ((image, result),), _ = kept_of(model, row, VisionZip, keep=7, contextual=2 / 7, mode="released")
    maps = model.model.vision_tower(image.pixels, output_attentions=True, output_hidden_states=True)
    state, attention = maps.hidden_states[-2][0], maps.attentions[-2][0, :, 0, 1:].mean(0)
    dominant = attention.topk(4).indices.sort().values
    want = model.model.multi_modal_projector(torch.cat([state[:1], state[1:][dominant]])[None])[0]
    close(result.features[:5], want, 1e-4)
    assert len(result) == 7


@torch.no_grad()
def test_released_views_have_equal_budgets():
    model = tiny("next")
    _, _, ((image, result),), _ = kept_of(model, VIEWS, VisionZip, keep=28, mode="released")
    assert len(image.pixels) == 5 and len(result) == 25


def test_what_cannot_be_released():
    with pytest.raises(ValueError, match="sends the CLS token"):
        vlmslim.patch(tiny("siglip"), "visionzip", mode="released")
