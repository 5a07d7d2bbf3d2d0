"""FastV against the attention maps of an eager model."""

import pytest
import torch
from compare import close, lengths
from prompts import ROWS, Picture, batch, visual, words
from tiny import BOS, DEPTH, IMAGE, tiny
from unpatched import reference

import vlmslim
from vlmslim.engine.families import kv_cache


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.no_grad()
def test_it_keeps_what_the_last_token_attends_to(family, layer, seed):
    """Ranked by hand from an eager model's attention map, in float64; dropped by hiding keys."""
    eager, model = tiny(family, "eager"), tiny(family)
    first, second = Picture(seed, (60, 30)), Picture(7 + seed, (32, 64))
    row = [BOS, *words(seed, 2), first, *words(9 + seed, 3), second, *words(5, 4)]
    keep = 3 + seed
    inputs = batch(model, [row])
    maps = eager(**inputs, output_attentions=True).attentions
    score = maps[layer - 1][0, :, -1].double().mean(0)
    gone = torch.zeros(len(score), dtype=torch.bool)
    for place in visual(inputs):
        ranked = sorted(place.tolist(), key=lambda i: -float(score[i]))
        assert float(score[ranked[keep - 1]] - score[ranked[keep]]) > 1e-6, "a draw: choose another seed"
        gone[ranked[keep:]] = True
    want = reference(eager, inputs, drops={layer: gone}).full_logits()
    for chosen in (model, eager):
        with vlmslim.patch(chosen, "fastv", keep=keep, layer=layer):
            close(chosen(**inputs).logits[0], want)


@torch.no_grad()
def test_shares_of_the_depth():
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    text = int((inputs["input_ids"] != IMAGE).sum())
    for layer, at in ((0.05, 1), (0.25, 1), (0.5, 2), (0.75, 3), (7 / 8, 3), (0.99, 3), (1, 1), (3, 3)):
        with vlmslim.patch(model, "fastv", keep=4, layer=layer):
            found = lengths(kv_cache(model(**inputs)))
        assert found == [text + (16 if i < at else 4) for i in range(DEPTH)]
