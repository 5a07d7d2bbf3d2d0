"""PyramidDrop against layers run by hand, whose own attention maps rank the tokens."""

import pytest
import torch
from by_hand import ByHand
from checks import check_a_batch_is_its_rows
from compare import close, greedy
from prompts import LONG_ROWS, SEVERAL, Picture, batch, words
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim.methods.pyramiddrop import PyramidDrop

STEPS = dict(layer=(1, 2, 3), ratio=0.5)


def pyramid(family: str, row: list, counts, closed: bool, only_first: bool = False) -> ByHand:
    """Before each layer rank by the map that the layer would make of what is there: the layer runs twice."""
    hand, entered = ByHand(family, row), None
    entered = [len(place) for place in hand.images]
    for layer in range(DEPTH):
        if layer:
            before = hand.x
            hand.run(layer)
            hand.x, paid = before, hand.maps.pop()[:, -1].double().mean(0)
            stay = []
            for i, place in enumerate(hand.images):
                score = paid[torch.isin(hand.origin, place)].tolist()
                k = len(place) if only_first and i else counts(entered[i])[layer - 1]
                best = sorted(range(len(place)), key=lambda j: -score[j])[:k]
                stay.append(torch.tensor(sorted(best), dtype=torch.long))
            hand.drop(stay, closed)
        hand.run(layer)
    return hand


@pytest.mark.parametrize("positions", ["renumbered", "original"])
@pytest.mark.parametrize("mode", ["corrected", "released"])
@torch.no_grad()
def test_it_is_the_pyramid(family, mode, positions):
    for row in (LONG_ROWS[0], SEVERAL[0]):
        model = tiny(family)
        with vlmslim.patch(model, PyramidDrop(**STEPS, mode=mode, layer_positions=positions)) as slim:
            got = model(**batch(model, [row])).logits[0]
        least = int(mode == "corrected")
        hand = pyramid(
            family,
            row,
            lambda n, least=least: [max(least, n // 2 ** (j + 1)) for j in range(3)],
            positions == "renumbered",
            mode == "released",
        )
        close(got[-3:], hand.logits()[-3:])
        assert slim.receipt.last.visual[3] == [sum(map(len, hand.images))]


def test_counts_of_a_pyramid():
    assert PyramidDrop().counts(576) == [288, 144, 72]
    assert PyramidDrop(ratio=0.6).counts(48) == [28, 17, 10]
    assert PyramidDrop(keep=0.125).counts(576) == PyramidDrop(keep=72).counts(576) == [288, 144, 72]
    assert PyramidDrop(ratio=(0.29, 0.2, 0.1)).counts(100) == [28, 20, 10]
    assert PyramidDrop(keep=1.0).counts(17) == [17, 17, 17]
    assert PyramidDrop(ratio=0.1).counts(5) == [1, 1, 1]
    assert PyramidDrop(ratio=0.1, mode="released").counts(5) == [0, 0, 0]
    assert PyramidDrop().visual_tokens(576, 32) == [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8


@torch.no_grad()
def test_ties_go_to_the_lower_index():
    """Keys of zero make all attention of a layer equal."""
    model = tiny("llava")
    model.model.language_model.layers[1].self_attn.k_proj.weight.zero_()
    inputs = batch(model, [[BOS, Picture(0), *words(0, 4)]])
    kept = []

    class Noted(PyramidDrop):
        def retain(self, tokens):
            keep = super().retain(tokens)
            kept.append(tokens.slot[keep & (tokens.image > 0)].tolist())
            return keep

    with vlmslim.patch(model, Noted(keep=4, layer=(1,))):
        model(**inputs)
    assert kept == [[0, 1, 2, 3]]


def test_a_batch_is_its_rows(family):
    check_a_batch_is_its_rows(tiny(family), LONG_ROWS, PyramidDrop(**STEPS))


@torch.no_grad()
def test_cached_is_uncached():
    """An answer that is decoded token by token has the logits of one forward with the kept tokens of the prompt."""
    model, row = tiny("llava"), LONG_ROWS[1]
    inputs = batch(model, [row])
    with vlmslim.patch(model, PyramidDrop(**STEPS)):
        out, logits = greedy(model, inputs)
    answer = out.sequences[0, inputs["input_ids"].shape[1] :]
    hand = pyramid("llava", row, lambda n: [n // 2, n // 4, n // 8], closed=True)
    kept, again = hand.images, ByHand("llava", row, answer.tolist())
    stays = []
    for layer, n in ((1, 8), (2, 4), (3, 2)):
        partial = pyramid("llava", row, lambda n, last=layer: [n // 2 ** min(j, last) for j in (1, 2, 3)], closed=True)
        stays.append((layer, n, partial.images))
    for layer in range(DEPTH):
        for at, n, images in stays:
            if at == layer:
                assert len(images[0]) == n
                again.drop([torch.isin(again.images[0], images[0]).nonzero()[:, 0]], closed=True)
        again.run(layer)
    assert torch.equal(again.images[0], kept[0])
    close(logits[0], again.logits()[-len(answer) - 1 : -1])


def test_layers_that_do_not_ascend():
    with pytest.raises(ValueError, match="do not ascend"):
        vlmslim.patch(tiny("llava"), "pyramiddrop", layer=(0.5, 0.6))
