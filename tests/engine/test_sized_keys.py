"""Merged tokens that count in attention for all their tokens, against layers run by hand."""

from dataclasses import dataclass

import pytest
import torch
from by_hand import ByHand
from compare import close, greedy
from doubles import Halve, pair_mean
from prompts import LONG_ROWS, ROWS, SEVERAL, Picture, batch, words
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim.compressor import Compressed, Compressor
from vlmslim.engine.families import KV_CACHE, kv_cache


@dataclass
class Pairs(Compressor):
    """The mean of each pair of neighbours, at the place of the first; a token without a neighbour stays."""

    positions: str = "original"

    def compress(self, image) -> Compressed:
        n, means = len(image.features), pair_mean(image.features)
        index = torch.arange(0, n, 2)
        size = torch.full((len(means),), 2.0)
        size[-1] = 2 - n % 2
        return Compressed(means, index, size=size)


def by_hand(family: str, row: list, positions: str, answer: list[int] = (), halve: bool = False) -> ByHand:
    hand = ByHand(family, row, answer)
    for place in hand.images:
        hand.x[place[::2]] = pair_mean(hand.x[place])
        hand.size[place[: len(place) // 2 * 2 : 2]] = 2
    hand.drop([torch.arange(0, len(place), 2) for place in hand.images], positions == "renumbered")
    for layer in range(DEPTH):
        if halve and layer == 2:
            hand.drop([torch.arange(0, len(place), 2) for place in hand.images], closed=False)
        hand.run(layer)
    return hand


@pytest.mark.parametrize("halve", [False, True], ids=["whole", "halved"])
@pytest.mark.parametrize("positions", ["original", "renumbered"])
@torch.no_grad()
def test_a_merged_key_counts_for_its_tokens(family, backend, positions, halve):
    model, rows = tiny(family, backend), [*LONG_ROWS[:3], SEVERAL[0]]
    inputs, stages = batch(model, rows), [Pairs(positions), *[Halve()][:halve]]
    with vlmslim.patch(model, stages):
        out, logits = greedy(model, inputs)
        again = greedy(model, inputs, use_cache=False)[1]
    if not halve:  # else the last token of a longer prompt decides
        close(logits, again)
    for i, (row, answer) in enumerate(
        zip(rows, out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
    ):
        hand = by_hand(family, row, positions, answer, halve)
        close(logits[i], hand.logits()[-len(answer) - 1 : -1])


@torch.no_grad()
def test_sizes_are_seen():
    sized = by_hand("llava", ROWS[0], "original")
    plain = ByHand("llava", ROWS[0])
    for place in plain.images:
        plain.x[place[::2]] = pair_mean(plain.x[place])
    plain.drop([torch.arange(0, 16, 2)], closed=False)
    for layer in range(DEPTH):
        plain.run(layer)
    assert (sized.logits() - plain.logits()).abs().max() > 0.05


@torch.no_grad()
def test_the_attention_that_a_method_reads_counts_them():
    seen = {}

    class Look(Compressor):
        layers = (2,)

        def retain(self, tokens):
            last = tokens.last[:, None]
            seen[1], seen[2] = tokens.attention(last)[0, :, 0], tokens.coming_attention(last)[0, :, 0]
            return tokens.mask

    model = tiny("llava")
    with vlmslim.patch(model, [Pairs(), Look()]):
        model(**batch(model, [ROWS[0]]))
    hand = by_hand("llava", ROWS[0], "original")
    for layer in (1, 2):
        close(seen[layer], hand.maps[layer][:, -1], 1e-4)


@torch.no_grad()
def test_the_cache_knows_the_sizes():
    """Rows are picked, the cache is cropped, and the patch is gone."""
    model, answer = tiny("llava"), words(7, 4)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, Pairs()):
        cache = kv_cache(model(**inputs))
    cache.batch_select_indices(torch.tensor([1]))
    mask = torch.cat([inputs["attention_mask"][1:], torch.ones(1, 4, dtype=torch.long)], 1)
    model(torch.tensor([[5, 6]]), attention_mask=mask[:, :-2], **{KV_CACHE: cache})
    cache.crop(-2)
    got = model(torch.tensor([answer]), attention_mask=mask, **{KV_CACHE: cache}).logits[0]
    close(got, by_hand("llava", ROWS[1], "original", answer).logits()[-4:])


def test_rectified_selections_count_their_means(family):
    """`rectify` of a selector, through the doctor's own computation."""
    from vlmslim.doctor.reference import noted

    model = tiny(family)
    method = vlmslim.method("divprune", keep=6, rectify=True, positions="original")
    with vlmslim.patch(model, method) as slim, noted(slim) as notes, torch.no_grad():
        model(**batch(model, [[BOS, Picture(1, (60, 60)), *words(0, 4)]]))
    (sent,) = notes.sent
    assert len(sent.size) == 6 and sent.size.min() == 1 and sent.size.sum() > 6


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda x: Compressed(x[:4], size=torch.ones(4)), "say which slots they take"),
        (lambda x: Compressed(x[:4], torch.arange(4), size=torch.ones(3)), "for sizes: give one number"),
    ],
)
def test_sizes_without_slots_are_refused(result, message):
    class Wrong(Compressor):
        def compress(self, image):
            return result(image.features)

    model = tiny("llava")
    with vlmslim.patch(model, Wrong()), pytest.raises(ValueError, match=message):
        model(**batch(model, ROWS))


def test_back_ends_without_biases_are_refused(monkeypatch):
    model = tiny("llava")
    with vlmslim.patch(model, Pairs()) as slim:
        monkeypatch.setattr(model.model.language_model.config, "_attn_implementation", "flash_attention_2")
        with pytest.raises(ValueError, match="takes no sizes of keys"):
            model(**batch(model, [ROWS[0]]))
        with pytest.raises(ValueError, match="embeddings cannot carry"):
            slim.compress(**batch(model, [ROWS[0]]))
