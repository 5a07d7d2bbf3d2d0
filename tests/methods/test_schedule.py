"""The control `schedule`: exact counts at each layer, FastV at one layer, the same random tokens in any batch."""

import pytest
import torch
from checks import check_a_batch_is_its_rows
from doubles import PairMean
from prompts import LONG_ROWS, SEVERAL, batch
from tiny import tiny

import vlmslim
from vlmslim.methods.schedule import Schedule

BY = ("attention", "random")


@pytest.mark.parametrize("by", BY)
@torch.no_grad()
def test_counts_are_exact_at_each_layer(by):
    model = tiny("llava")
    with vlmslim.patch(model, "schedule", layer=[1, 3], counts=[9, 0.25], by=by) as slim:
        model(**batch(model, SEVERAL))
    summary = slim.receipt.summary()
    assert summary["visual_tokens_per_layer"] == [24, 13.5, 13.5, 6]
    assert summary["requested"] == 4
    assert Schedule((1, 3), (9, 0.25)).visual_tokens(16, 4) == [16, 9, 9, 4]


@torch.no_grad()
def test_one_layer_by_attention_is_fastv(family):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, "fastv", keep=5, layer=2):
        want = model(**inputs).logits
    with vlmslim.patch(model, "schedule", layer=[2], counts=[5]):
        assert torch.equal(model(**inputs).logits, want)


@pytest.mark.parametrize("by", BY)
def test_a_batch_is_its_rows(by):
    check_a_batch_is_its_rows(tiny("llava"), LONG_ROWS, Schedule(layer=[1, 2], counts=[9, 4], by=by))


@torch.no_grad()
def test_the_seed_decides_and_later_tokens_are_among_the_earlier():
    model = tiny("llava")
    inputs, seen = batch(model, SEVERAL), {}

    class Spy(Schedule):
        def retain(self, tokens):
            keep = super().retain(tokens)
            kept = keep & (tokens.image > 0)
            seen[self.seed, tokens.layer] = set(tokens.origin[kept].tolist())
            return keep

    for seed in (0, 1):
        with vlmslim.patch(model, Spy((1, 2), (8, 4), "random", seed)):
            model(**inputs)
        assert seen[seed, 2] < seen[seed, 1]
    assert seen[0, 1] != seen[1, 1]


def test_layers_must_ascend():
    with pytest.raises(ValueError, match="ascend"):
        vlmslim.patch(tiny("llava"), "schedule", layer=[0.25, 0.3], counts=[4, 2])


@torch.no_grad()
def test_made_tokens_are_drawn_too():
    """Of tokens that a method made without saying their slots, other ones stay for another seed."""
    model, kept = tiny("llava"), set()

    class Spy(Schedule):
        def retain(self, tokens):
            keep = super().retain(tokens)
            kept.add(tuple(tokens.origin[keep & (tokens.image > 0)].tolist()))
            return keep

    for seed in range(4):
        with vlmslim.patch(model, [PairMean(), Spy((2,), (2,), "random", seed)]) as slim:
            model(**batch(model, SEVERAL))
        assert slim.receipt.last.visual[-1] == [4, 2]
    assert len(kept) > 1
