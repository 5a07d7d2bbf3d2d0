"""Methods between layers, by hand: coming attention, keys, closed gaps, new states."""

from dataclasses import dataclass

import pytest
import torch
from by_hand import ByHand, by_hand
from compare import close, greedy, lengths
from doubles import BothClosed, BothOriginal, First, Halve, Rule, Stairs, name_of
from prompts import LONG_ROWS, ROWS, SEVERAL, Picture, batch, words
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim.compressor import Compressor, Retained
from vlmslim.engine.families import KV_CACHE, kv_cache


@dataclass
class HalveClosed(Halve):
    layer_positions = "renumbered"


@dataclass
class StairsClosed(Stairs):
    layer_positions = "renumbered"


@dataclass
class BothOriginalClosed(BothOriginal):
    layer_positions = "renumbered"


CLOSED = [HalveClosed(), StairsClosed(), BothClosed(), BothOriginalClosed()]


# --- closed gaps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", CLOSED, ids=name_of)
def test_gaps_closed_between_layers(family, rule):
    """A batch decodes as each row by hand, whose later layers count positions anew."""
    model, rows = tiny(family), [*LONG_ROWS[:3], *SEVERAL]
    inputs = batch(model, rows)
    with vlmslim.patch(model, rule) as slim:
        out, logits = greedy(model, inputs)
    assert "renumbered" in slim.receipt.positions
    for i, (row, answer) in enumerate(
        zip(rows, out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
    ):
        close(logits[i], by_hand(family, row, rule, answer).logits()[-len(answer) - 1 : -1])


@torch.no_grad()
def test_closed_and_open_gaps_differ():
    closed, opened = (by_hand("llava", ROWS[0], rule).logits() for rule in (StairsClosed(), Stairs()))
    assert (closed - opened).abs().max() > 0.05


@torch.no_grad()
def test_the_cache_knows_the_positions_of_each_layer():
    """After the patch is gone: rows are picked, and another method takes an image in the next turn."""
    model, rule, answer = tiny("llava"), HalveClosed(), words(7, 3)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, rule):
        cache = kv_cache(model(**inputs))
    cache.batch_select_indices(torch.tensor([1]))
    mask, row = inputs["attention_mask"][1:], ROWS[1]
    later = [*answer, Picture(5), *words(8, 4)]
    sent = batch(model, [later])
    mask = torch.cat([mask, torch.ones_like(sent["input_ids"])], 1)
    with vlmslim.patch(model, First()):
        got = model(sent["input_ids"], pixel_values=sent["pixel_values"], attention_mask=mask, **{KV_CACHE: cache})
    hand = ByHand("llava", [*row, *later])
    hand.drop([torch.arange(16), torch.arange(5)], closed=True)
    for layer in range(DEPTH):
        if layer == 2:
            hand.drop([rule.left(2, 16, 0), torch.arange(5)], closed=True)
        hand.run(layer)
    close(got.logits[0, -4:], hand.logits()[-4:])


def test_unknown_layer_positions_are_refused():
    @dataclass
    class Elsewhere(Halve):
        layer_positions = "somewhere"

    with pytest.raises(ValueError, match="layer_positions='somewhere': use 'renumbered' or 'original'"):
        vlmslim.patch(tiny("llava"), Elsewhere())


# --- what is shown ----------------------------------------------------------------------------------------------------


class Early(Rule):
    """Asked before every layer, it drops every second token before layer 1 alone."""

    layers = (1, 2, 3)

    def left(self, layer, n, text):
        return torch.arange(0, n, 2) if layer == 1 else torch.arange(n)


def looking(positions: str = "original") -> Rule:
    """The same, and notes in `seen` what a method is shown before each layer."""

    class Look(Early):
        layer_positions, seen = positions, {}

        def retain(self, tokens):
            rows = torch.stack([tokens.last, tokens.last - 3], 1)
            self.seen[tokens.layer] = tokens.coming_attention(rows), tokens.keys, tokens.origin, tokens.mask, rows
            return super().retain(tokens)

    return Look()


@pytest.mark.parametrize("positions", ["original", "renumbered"])
@torch.no_grad()
def test_attention_of_the_coming_layer_and_keys_of_the_last(family, backend, positions):
    model, rows = tiny(family, backend), [*LONG_ROWS[:2], SEVERAL[0]]
    inputs, rule = batch(model, rows), looking(positions)
    with vlmslim.patch(model, rule):
        cache = kv_cache(model(**inputs))
    for i, row in enumerate(rows):
        hand = by_hand(family, row, rule)
        start = int(inputs["attention_mask"][i].argmax())
        for layer in (2, 3):
            paid, keys, origin, mask, asked = rule.seen[layer]
            place = torch.searchsorted(hand.origin, origin[i] - start)
            for q in range(2):
                close(paid[i, :, q][:, mask[i]], hand.maps[layer][:, place[asked[i, q]], place[mask[i]]], 1e-4)
            assert torch.equal(keys[i], cache.layers[layer - 1].keys[i])
    cached = {layer: seen[:2] for layer, seen in rule.seen.items()}
    with vlmslim.patch(model, rule):
        model(**inputs, use_cache=False)
    for layer, (paid, keys) in cached.items():
        assert torch.equal(rule.seen[layer][0], paid)
        close(rule.seen[layer][1], keys, 1e-5)


@torch.no_grad()
def test_coming_attention_after_a_cached_text():
    """Text in the KV cache takes its share of the attention that the layer is about to pay."""
    model, row, rule = tiny("llava"), [BOS, *words(1, 6), Picture(2), *words(3, 5)], looking()
    inputs = batch(model, [row])
    whole = inputs["input_ids"].shape[1]
    with vlmslim.patch(model, rule):
        model(**inputs)
        want = rule.seen[3][0]
        held = kv_cache(model(inputs["input_ids"][:, :4], attention_mask=inputs["attention_mask"][:, :4]))
        rest = inputs | {"input_ids": inputs["input_ids"][:, 4:], KV_CACHE: held}
        model(**rest)
    assert want.shape[-1] == rule.seen[3][0].shape[-1] + 4 == whole - 8
    close(rule.seen[3][0], want[..., 4:], 1e-5)


# --- new states -------------------------------------------------------------------------------------------------------


@dataclass
class MeanOfPairs(Compressor):
    """Before layer 2, the mean of each pair of neighbours takes the place of the second; text is to change in vain.

    It looks at the attention to come, so the layer must not take the keys of the states before.
    """

    layers = (2,)
    layer_positions = "renumbered"

    def retain(self, tokens):
        keep, hidden = tokens.mask.clone(), tokens.hidden * 2
        tokens.coming_attention(tokens.last[:, None])
        for row in range(len(keep)):
            for number in range(1, int(tokens.image[row].max()) + 1):
                place = (tokens.image[row] == number).nonzero()[:, 0]
                pairs = place[: len(place) // 2 * 2].view(-1, 2)
                keep[row, pairs[:, 0]] = False
                hidden[row, place] = tokens.hidden[row, place]
                hidden[row, pairs[:, 1]] = tokens.hidden[row, pairs].mean(1)
        return Retained(keep, hidden)


def test_tokens_made_between_layers_are_tokens_like_any_other(family):
    model, rows = tiny(family), [*LONG_ROWS[:2], SEVERAL[0]]
    inputs = batch(model, rows)
    with vlmslim.patch(model, MeanOfPairs()) as slim:
        out, logits = greedy(model, inputs)
    held, counts = lengths(kv_cache(out)), []
    for i, (row, answer) in enumerate(
        zip(rows, out.sequences[:, inputs["input_ids"].shape[1] :].tolist(), strict=True)
    ):
        with torch.no_grad():
            hand = ByHand(family, row, answer)
            for layer in range(DEPTH):
                if layer == 2:
                    counts.append(sum(len(x) - len(x) // 2 for x in hand.images))
                    for place in hand.images:
                        pairs = place[: len(place) // 2 * 2].view(-1, 2)
                        hand.x[pairs[:, 1]] = hand.x[pairs].mean(1)
                    odd = [
                        torch.cat([torch.arange(1, len(x), 2), torch.arange(len(x) // 2 * 2, len(x))])
                        for x in hand.images
                    ]
                    hand.drop(odd, closed=True)
                hand.run(layer)
            close(logits[i], hand.logits()[-len(answer) - 1 : -1])
    assert slim.receipt.last.visual[2] == slim.receipt.last.visual[3] == counts
    assert held[0] == held[1] > held[2] == held[3]


@pytest.mark.parametrize(
    ("hidden", "says"),
    [(lambda x: x[..., :3], "for states: give a tensor like"), (lambda x: None, "returned None for states")],
)
def test_states_of_another_shape_are_refused(hidden, says):
    class Wrong(Halve):
        def retain(self, tokens):
            return Retained(super().retain(tokens), hidden(tokens.hidden))

    model = tiny("llava")
    with vlmslim.patch(model, Wrong()), pytest.raises(ValueError, match=says):
        model(**batch(model, ROWS))
