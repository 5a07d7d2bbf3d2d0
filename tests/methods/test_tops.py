"""TOPS against plain loops, its raters and layers in models."""

import pytest
import torch
from checks import VIEWS, cls_attention, kept_of
from compare import close
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, SEVERAL, Clip, Picture, batch, visual, words
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny
from unpatched import keep_only, reference

import vlmslim
from vlmslim.methods.tops import TOPS, TOPSEntrance, TOPSLayers, preserve, text_relevance


def plain(x: list, relevance: list[float], k: int, alpha: float, coverage: float, normalise: str) -> list[int]:
    """The same rule token by token."""
    n = len(x)
    like = [[cosine(a, b) for b in x] for a in x]
    chosen = [min(range(n), key=lambda i: (-relevance[i], i))]
    while len(chosen) < k:
        left = [i for i in range(n) if i not in chosen]
        near = {j: max(like[j][c] for c in chosen) for j in left}
        terms = [
            (1.0, {i: relevance[i] for i in left}),
            (alpha, {i: 1 - near[i] for i in left}),
            (coverage, {i: sum(max(0.0, like[i][j] - near[j]) for j in left) for i in left}),
        ]
        score = dict.fromkeys(left, 0.0)
        for place, (weight, term) in enumerate(terms):
            values, low = list(term.values()), 0.0
            unit = sum(values) / len(values)
            if normalise == "fixed" and place == 0:
                unit = sum(relevance) / n
            if normalise == "minmax":
                low, unit = min(values), max(values) - min(values)
            for i in left:
                score[i] += weight * (term[i] - low) / unit if unit > 1e-9 else 0
        best = max(score.values())
        chosen.append(min(i for i in left if score[i] >= best - 1e-6))
    return chosen


@some
@given(
    seeds,
    st.integers(1, 12),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([0.0, 1.0]),
    st.sampled_from(["mean", "fixed", "minmax"]),
    st.data(),
)
def test_it_is_the_greedy_rule(seed, n, alpha, coverage, normalise, data):
    k = data.draw(st.integers(1, n))
    x, relevance = noise(seed, 2, n, 5), noise(seed + 1, 2, n).exp()
    got = preserve(x, relevance, k, alpha, coverage, normalise).tolist()
    for i in range(2):
        assert got[i] == plain(x[i].tolist(), relevance[i].tolist(), k, alpha, coverage, normalise)


def test_ties_and_copies():
    """Orthogonal axes, twice each, equally relevant: first every axis, then the copies, each in order."""
    x, relevance = torch.eye(4).repeat(2, 1)[None], torch.ones(1, 8)
    assert preserve(x, relevance, 8)[0].tolist() == list(range(8))
    top = noise(0, 1, 9).exp()
    assert torch.equal(preserve(noise(1, 1, 9, 4), top, 9, 0.0, 0.0), top.argsort(descending=True))
    assert torch.equal(preserve(4 * noise(1, 1, 9, 4), 8 * top, 9), preserve(noise(1, 1, 9, 4), top, 9))


def test_raters_are_the_text_that_looks():
    paid = torch.tensor([[0.5, 0.2], [0.0, 0.1], [0.1, 0.5]])
    torch.testing.assert_close(text_relevance(paid), torch.tensor([0.3, 0.35]))
    torch.testing.assert_close(text_relevance(paid, "all"), torch.tensor([0.2, 0.8 / 3]))
    torch.testing.assert_close(text_relevance(paid, "last"), torch.tensor([0.1, 0.5]))
    for count in range(1, 40):  # equal text rates, though the mean of its attention may be rounded above it
        close(text_relevance(paid[:1].repeat(count, 1)), paid[0])


@torch.no_grad()
def test_the_entrance_pools_the_whole_image():
    model = tiny("next", "eager")
    _, _, ((image, result),), _ = kept_of(model, VIEWS, TOPSEntrance, keep=21, newline="drop")
    slots = (image.grid[:, 0] >= 0).nonzero()[:, 0]
    crop, line, column = image.grid[slots].unbind(1)
    relevance = cls_attention(model, image)[crop, line * 4 + column]
    want = slots[plain(image.features[slots].tolist(), relevance.tolist(), 21, 0.5, 0.5, "mean")]
    assert result.index.tolist() == want.sort().values.tolist()


@torch.no_grad()
def test_the_entrance_searches_each_frame_of_a_video_by_itself():
    model = tiny("onevision")
    _, _, ((image, result),), _ = kept_of(model, [BOS, Clip(0, 3), 5, 6], TOPSEntrance, keep=7, newline="drop")
    want = []
    for frame, k in enumerate((3, 2, 2)):
        slots = (image.grid[:, 0] == frame).nonzero()[:, 0]
        picks = plain(image.features[slots].tolist(), image.score[slots].tolist(), k, 0.5, 0.5, "mean")
        want += slots[picks].sort().values.tolist()
    assert result.index.tolist() == want


@pytest.mark.parametrize("read", ["previous", "coming"])
@pytest.mark.parametrize("row", [LONG_ROWS[0], SEVERAL[0], [BOS, *words(1, 4), Picture(1)]], ids=["one", "two", "last"])
@torch.no_grad()
def test_a_layer_keeps_what_the_text_after_each_image_asks_for(row, read):
    """By attention of an unpatched eager model; an image at the end is rated by the last token."""
    model = tiny("llava", "eager")
    inputs = batch(model, [row])
    out = model(**inputs, output_attentions=True, output_hidden_states=True)
    attention, hidden = out.attentions[1 + (read == "coming")][0].mean(0), out.hidden_states[2][0]
    ids, places = inputs["input_ids"][0], visual(inputs)
    everywhere = torch.cat(places)
    kept = []
    for place in places:
        after = [i for i in range(int(place[-1]) + 1, len(ids)) if i not in everywhere.tolist()] or [len(ids) - 1]
        paid = attention[after][:, place]
        mass = paid.sum(1)
        relevance = paid[mass >= mass.mean()].mean(0)
        chosen = plain(hidden[place].tolist(), relevance.tolist(), 8, 0.5, 0.5, "mean")
        kept.append(torch.tensor(sorted(chosen)))
    gone = torch.ones(len(ids), dtype=torch.bool)
    gone[keep_only(inputs, kept)] = False
    want = reference(model, inputs, drops={2: gone}).full_logits()
    with vlmslim.patch(model, TOPSLayers(layer=(2,), parts=(0.5,), attention=read)):
        got = model(**inputs).logits[0]
    torch.testing.assert_close(got, want, rtol=2e-4, atol=2e-4)


@torch.no_grad()
def test_the_steps_are_half_and_an_eighth():
    model = tiny("llava")
    with vlmslim.patch(model, "tops", keep=16) as slim:
        model(**batch(model, LONG_ROWS))
    receipt = slim.receipt.summary()
    assert [round(n * len(LONG_ROWS) / 3) for n in receipt["visual_tokens_per_layer"]] == [16, 8, 8, 2]
    method = TOPS(keep=16)
    assert [type(stage).__name__ for stage in method.stages()] == ["TOPSEntrance", "TOPSLayers"]
    assert method.stages()[1].visual_tokens(16, 32) == [16] * 12 + [8] * 12 + [2] * 8
    assert TOPS(layer_positions="renumbered").stages()[1].layer_positions == "renumbered"
    assert len(TOPS(keep=1.0).stages()) == len(TOPS(keep=5, layer=(), parts=()).stages()) == 1


def test_layers_that_do_not_ascend():
    with pytest.raises(ValueError, match="do not ascend"):
        vlmslim.patch(tiny("llava"), "tops", layer=(0.5, 0.6))
