"""MMTok against plain loops, and the words that reach it in models."""

import math

import pytest
import torch
from clip_fixtures import ASSISTANT, LINE, SYS, USER, Words
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import Picture, batch
from strategies import cosine, noise, seeds, some
from tiny import BOS, tiny
from vector_checks.mmtok import padded

import vlmslim
from vlmslim.methods.mmtok import MMTok, cover, keywords
from vlmslim.ops.greedy import cosines
from vlmslim.ops.padding import in_padding


def plain(tower: list, features: list, words: list, k: int, tv: float, vv: float, alpha: float) -> list[int]:
    """The same rule with lists."""

    def softmax(row: list[float]) -> list[float]:
        raised = [math.exp(value - max(row)) for value in row]
        return [value / sum(raised) for value in raised]

    rows = [[p / len(words) for p in softmax([cosine(word, x) / tv for x in features])] for word in words]
    rows += [[alpha * p / len(tower) for p in softmax([cosine(y, x) / vv for x in tower])] for y in tower]
    chosen: list[int] = []
    while len(chosen) < k:
        gain = {
            j: sum(max(0.0, row[j] - max((row[i] for i in chosen), default=0.0)) for row in rows)
            for j in range(len(tower))
            if j not in chosen
        }
        best = max(gain.values())
        chosen.append(min(j for j in gain if gain[j] >= best - 1e-7))
    return chosen


@some
@given(seeds, st.integers(1, 14), st.integers(0, 4), st.sampled_from([0.0, 0.5, 2.0]), st.data())
def test_it_is_the_greedy_rule(seed, n, m, alpha, data):
    k = data.draw(st.integers(1, n))
    tower, features, words = noise(seed, 2, n, 5), noise(seed + 1, 2, n, 6), noise(seed + 2, 2, m, 6)
    to_words = torch.stack([cosines(x, w) for x, w in zip(features, words, strict=True)])
    got = cover(tower, to_words, k, 0.2, 0.3, alpha).tolist()
    for i in range(2):
        assert len(set(got[i])) == k
        want = plain(tower[i].tolist(), features[i].tolist(), words[i].tolist(), k, 0.2, 0.3, alpha)
        if alpha or m > 1:  # a single softmax leaves nothing to gain beyond rounding
            assert got[i][: min(k, 5)] == want[: min(k, 5)]


def test_copies_tie_to_the_lower_index_and_zeros_are_no_nan():
    x = noise(0, 1, 6, 5).repeat(1, 2, 1)
    x[0, 11] = 0
    order = cover(x, cosines(x[0], noise(1, 3, 5))[None], 12)[0].tolist()
    assert sorted(order) == list(range(12))
    assert set(order[:5]) <= set(range(6)) | {11}


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("What is the colour of the dog's collar?", "colour of dog s collar"),
        ("Is it a cat?\nAnswer the question using a single word or phrase.", "cat"),
        ("Who are they, and why?", "Who are they, and why?"),
        ("<image> <image>\nTwo birds", "Two birds"),
        ("<image>\n<image>\nTwo birds", "image Two birds"),
        ("", ""),
    ],
)
def test_words(text, want):
    assert keywords(text) == want


def test_other_sentences_are_left_out_on_request():
    assert keywords("Red birds. Be brief.", ["Be brief."]) == "Red birds"
    assert MMTok(left_out=["Be brief."]).left_out == ["Be brief."]


@torch.no_grad()
def test_the_words_are_those_of_the_users_last_turn():
    """Every prompt of a batch has its own; without words, tokens are covered alone."""
    model = tiny("llava")
    rows = [
        [BOS, SYS, LINE, USER, 20, 21, ASSISTANT, 30, USER, Picture(0), LINE, 22, 23, ASSISTANT],
        [BOS, SYS, LINE, USER, Picture(1), 24, ASSISTANT],
        [BOS, SYS, LINE, USER, Picture(2), ASSISTANT],
    ]
    method, seen = watched(MMTok, keep=5, tokenizer=Words(), word_temperature=0.1)
    with vlmslim.patch(model, method):
        model(**batch(model, rows))
        table = model.get_input_embeddings().weight
        for (image, result), ids in zip(seen, ([22, 23], [24], []), strict=True):
            given = image.tower[0].tolist(), image.features.tolist(), table[ids].tolist()
            assert result.index.tolist() == sorted(plain(*given, 5, 0.1, 0.2, 0.5))


@torch.no_grad()
def test_a_prompt_of_embeddings_has_no_words():
    model = tiny("llava")
    inputs = batch(model, [[BOS, USER, Picture(0), 22, ASSISTANT]])
    method, seen = watched(MMTok, keep=5, tokenizer=Words())
    with vlmslim.patch(model, method):
        embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
        model(**inputs, inputs_embeds=embeds)
    image, result = seen[0]
    assert result.index.tolist() == sorted(plain(image.tower[0].tolist(), [], [], 5, 0.1, 0.2, 0.5))


@torch.no_grad()
def test_padding_is_picked_last():
    """The upper and lower quarter of the picture have the mean colour, except for a line that is blurred."""
    model = tiny("llava")
    inputs = batch(model, [[BOS, USER, Picture(0), 22, ASSISTANT]])
    quarter = inputs["pixel_values"].shape[-1] // 4
    inputs["pixel_values"][:, :, : quarter - 1] = inputs["pixel_values"][:, :, -quarter:] = 0
    inputs["pixel_values"][:, :, quarter - 1] *= 0.1
    for padding_last in (True, False):
        method, seen = watched(MMTok, keep=10, tokenizer=Words(), padding_last=padding_last)
        with vlmslim.patch(model, method):
            model(**inputs)
        index = seen[0][1].index.tolist()
        assert len(set(index)) == 10 and (set(range(4, 12)) <= set(index)) == padding_last


@pytest.mark.parametrize("size", [(640, 428), (500, 376), (336, 200), (640, 481), (334, 500), (500, 499), (90, 90)])
def test_padding_is_what_the_release_computes_from_the_size_of_the_picture(size):
    picture = round(min(size) * 336 / max(size))
    before, after = (336 - picture) // 2 // 14, (336 - picture + 1) // 2 // 14
    want = torch.tensor([place < before or place >= 24 - after for place in range(24)])
    got = in_padding(padded(*size), 24).view(24, 24)
    assert torch.equal(got, want[:, None].expand(24, 24) if size[0] >= size[1] else want.expand(24, 24))


def test_padding_on_one_side_leaves_the_other_side_alone():
    pixels = padded(90, 90)
    pixels[:, :, -60:] = 0
    assert in_padding(pixels, 24).view(24, 24).all(1).nonzero().tolist() == [[22], [23]]


def test_a_model_that_does_not_tell_its_tokenizer():
    with pytest.raises(ValueError, match="give tokenizer="):
        vlmslim.patch(tiny("llava"), "mmtok")
