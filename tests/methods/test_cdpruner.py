"""CDPruner against determinants, its relevance in models, and centring."""

import pytest
import torch
from checks import VIEWS, kept_of, views
from clip_fixtures import ASSISTANT, LINE, SYS, USER, Words
from compare import close
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import Picture, batch
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny
from transformers import CLIPModel

import vlmslim
from vlmslim.methods._clip import load_clip
from vlmslim.methods.cdpruner import CDPruner, conditional_diversity, scaled
from vlmslim.ops.centring import centred, standardised


def determinant(x, relevance, chosen: list[int]) -> float:
    kernel = [[float(relevance[i]) * cosine(x[i], x[j]) * float(relevance[j]) for j in chosen] for i in chosen]
    return float(torch.tensor(kernel, dtype=torch.float64).det())


@some
@given(seeds, st.integers(1, 9), st.data())
def test_every_pick_raises_the_determinant_most(seed, n, data):
    k = data.draw(st.integers(1, n))
    x, relevance = noise(seed, 2, n, 12), 0.2 + noise(seed + 1, 2, n).sigmoid()
    got = conditional_diversity(x, relevance, k).tolist()
    for i in range(2):
        for step, pick in enumerate(got[i]):
            before = got[i][:step]
            volume = {j: determinant(x[i], relevance[i], [*before, j]) for j in range(n) if j not in before}
            assert volume[pick] >= max(volume.values()) * (1 - 1e-4)


def test_copies_come_last_by_relevance():
    """The release picks them again and ends up with too few tokens."""
    x = noise(0, 1, 4, 8).repeat(1, 3, 1)
    relevance = torch.tensor([[0.5] * 4 + [0.6] * 4 + [0.4, 0.1, 0.3, 0.2]])
    order = conditional_diversity(x, relevance, 12)[0].tolist()
    assert sorted(order) == list(range(12)) and sorted(order[:4]) == [4, 5, 6, 7]
    assert order[4:] == [0, 1, 2, 3, 8, 10, 11, 9]


def test_exact_ties_go_to_the_lower_index():
    """Orthogonal axes with relevances in quarters."""
    x, relevance = torch.eye(8)[None], torch.tensor([[0.5, 1.0, 0.25, 1.0, 0.5, 0.25, 1.0, 0.5]])
    assert conditional_diversity(x, relevance, 8)[0].tolist() == [1, 3, 6, 0, 4, 7, 2, 5]
    x[0, 3] = 0  # a zero token spans nothing, and is not NaN
    assert conditional_diversity(x, relevance, 8)[0].tolist()[-1] == 3
    with pytest.raises(ValueError, match="NaN"):
        conditional_diversity(x * torch.nan, relevance, 8)


@some
@given(seeds, st.integers(2, 40))
def test_equally_relevant_tokens_tie(seed, n):
    """The norms of normalised tokens differ in their last bits, and these must not pick the first token."""
    assert int(conditional_diversity(noise(seed, 1, n, 24), torch.ones(1, n), 1)) == 0


def test_relevance_is_scaled_over_the_tokens_that_count():
    score, counts = torch.tensor([1.0, 3.0, 2.0, 99.0]), torch.tensor([True, True, True, False])
    torch.testing.assert_close(scaled(score, counts)[:3], torch.tensor([0, 1, 0.5]), atol=1e-5, rtol=0)
    assert scaled(score, counts)[0] > 0
    assert scaled(torch.full((3,), 7.0), torch.ones(3, dtype=torch.bool)).tolist() == [1, 1, 1]


PROMPTS = [
    [BOS, SYS, LINE, USER, 20, 21, ASSISTANT, 30, USER, Picture(0), LINE, 22, 23, ASSISTANT],
    [BOS, SYS, LINE, USER, Picture(1), 24, ASSISTANT],
]


def picked_by(score: torch.Tensor, image) -> list[int]:
    """The six tokens of an image that relevance by `score` (n,) picks, in order."""
    relevance = (score - score.min() + 1e-6) / (score.max() - score.min())
    return conditional_diversity(image.features[None], relevance[None].float(), 6)[0].sort().values.tolist()


@pytest.mark.parametrize("sign", ["auto", "plus"])
@torch.no_grad()
def test_relevance_in_the_space_of_clip(sign, hf_folder):
    """Minus the cosine of post-layernormed, projected patches and the user's words, by CLIP's own modules."""
    model, clip = tiny("llava"), CLIPModel.from_pretrained(hf_folder).eval()
    method, seen = watched(CDPruner, keep=6, clip=hf_folder, tokenizer=Words(), sign=sign)
    with vlmslim.patch(model, method):
        model(**batch(model, PROMPTS))
    for (image, result), words in zip(seen, ([22, 23], [24]), strict=True):
        features = clip.get_text_features(torch.tensor([[100, *words, 101]]))
        text = getattr(features, "pooler_output", features)[0]
        patches = clip.visual_projection(clip.vision_model.post_layernorm(image.tower[0]))
        score = torch.tensor([cosine(patch, text) for patch in patches]) * (1 if sign == "plus" else -1)
        assert result.index.tolist() == picked_by(score, image)


@torch.no_grad()
def test_relevance_by_the_language_models_words():
    model = tiny("siglip")
    method, seen = watched(CDPruner, keep=6, tokenizer=Words())
    with vlmslim.patch(model, method):
        model(**batch(model, PROMPTS))
    table = model.get_input_embeddings().weight
    for (image, result), words in zip(seen, ([22, 23], [24]), strict=True):
        score = torch.tensor([cosine(x, table[words].mean(0)) for x in image.features])
        assert result.index.tolist() == picked_by(score, image)


@torch.no_grad()
def test_no_relevance_needs_no_text():
    model = tiny("llava")
    inputs = batch(model, PROMPTS)
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    method, seen = watched(CDPruner, keep=6, relevance="none")
    with vlmslim.patch(model, method):
        model(**inputs, inputs_embeds=embeds)
    for image, result in seen:
        want = conditional_diversity(image.features[None], torch.ones(1, 16), 6)[0]
        assert result.index.tolist() == want.sort().values.tolist()
    with vlmslim.patch(model, "cdpruner", relevance="llm", tokenizer=Words()), pytest.raises(ValueError, match="none"):
        model(**inputs, inputs_embeds=embeds)


@torch.no_grad()
def test_without_a_question_all_tokens_are_equally_relevant(hf_folder):
    model = tiny("llava")
    for options in ({"clip": hf_folder}, {"relevance": "llm"}):
        method, seen = watched(CDPruner, keep=6, tokenizer=Words(), **options)
        with vlmslim.patch(model, method):
            model(**batch(model, [[BOS, SYS, LINE, USER, Picture(0), ASSISTANT]]))
        want = conditional_diversity(seen[0][0].features[None], torch.ones(1, 16), 6)[0]
        assert seen[0][1].index.tolist() == want.sort().values.tolist()


@torch.no_grad()
def test_a_long_text_is_read_in_segments(hf_folder):
    """Each with a start and an end; released, cut without them, so that the first says nothing."""
    clip, model = load_clip(hf_folder), CLIPModel.from_pretrained(hf_folder).eval()
    words = [f"w{6 + i % 20}" for i in range(40)]
    parts = [words[:18], words[18:36], words[36:]]  # 20 places, two of them for start and end
    want = torch.stack([clip.embed(" ".join(part)) for part in parts])
    close(clip.embed_segments(" ".join(words)), want)
    close(clip.embed_segments("w7 w8"), clip.embed("w7 w8")[None])
    released = clip.embed_segments(" ".join(words), released=True)
    assert len(released) == 3
    other = clip.embed_segments(" ".join(["w9"] * 40), released=True)
    close(released[0], other[0])
    ids = torch.tensor([[100, *(int(word[1:]) for word in words), 101]])[:, 40:]
    close(released[2], model.text_projection(model.text_model(ids).last_hidden_state)[0, -1])


@pytest.mark.parametrize("pool", ["view", "image"])
@torch.no_grad()
def test_views_are_searched_by_themselves_or_together(pool):
    options = dict(keep=21, newline="drop", relevance="none", pool=pool)
    _, _, ((image, result),), _ = kept_of(tiny("next"), VIEWS, CDPruner, **options)
    patches = (image.grid[:, 0] >= 0).nonzero()[:, 0]
    pools = [view.slots for view in views(image, result)] if pool == "view" else [patches]
    for slots in pools:
        own = torch.isin(slots, result.index).nonzero()[:, 0]
        want = conditional_diversity(image.features[slots][None], torch.ones(1, len(slots)), len(own))
        assert torch.equal(want[0].sort().values, own)


def test_centring_is_a_mean_and_a_weight():
    x = 3 + noise(0, 2, 9, 5)
    x[1, 4] = 0  # it resembles no token, itself included
    moved, weight = centred(x)
    close(moved, x - x.mean(1, keepdim=True))
    for i in range(2):
        like = [sum(cosine(x[i, a], x[i, b]) for b in range(9) if b != a) / 8 for a in range(9)]
        assert weight[i].argsort().tolist() == sorted(range(9), key=lambda a: -like[a])
        close(weight[i], (max(like) - torch.tensor(like)) / (max(like) - min(like)), 1e-4)
        assert weight[i].min() == 0 and weight[i].max() > 0.99
    assert standardised(x)[1].sub(0.5).abs().max() < 0.5
    a, b = (
        CDPruner(keep=4, relevance="none", centre=flag).search(4, (), x, torch.ones(2, 9)) for flag in (0 > 1, True)
    )
    assert not torch.equal(a, b)


def test_theta_sharpens_relevance():
    x, relevance = noise(0, 1, 40, 12), noise(1, 1, 40).sigmoid()
    sharp = CDPruner(keep=8, relevance="none", theta=0.95).search(8, (), x, relevance)
    weight = (9.5 * (relevance - relevance.max())).exp()
    assert torch.equal(sharp, conditional_diversity(x, weight, 8))
    assert relevance[0, sharp[0]].mean() > relevance[0, conditional_diversity(x, relevance, 8)[0]].mean()
    flat = CDPruner(keep=8, relevance="none", theta=0.0).search(8, (), x, relevance)
    assert torch.equal(flat, conditional_diversity(x, torch.ones(1, 40), 8))


def test_a_tower_without_cls_has_no_clip():
    with pytest.raises(ValueError, match="relevance='llm'"):
        vlmslim.patch(tiny("siglip"), "cdpruner", relevance="clip")
