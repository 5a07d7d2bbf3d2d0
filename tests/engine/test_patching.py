"""A patch leaves no trace: on the model after `remove`, on other models, on classes."""

import copy
from contextlib import ExitStack

import pytest
import torch
from compare import greedy, lengths
from doubles import Both, Stairs, Strided
from prompts import LONG_ROWS, ROWS, batch
from snapshots import changes, model_state
from tiny import tiny

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache


def test_an_error_inside_the_block_still_removes(family):
    model = tiny(family)
    inputs = batch(model, ROWS)
    model(**inputs)  # transformers installs its own output-capturing hooks at the first call, for good
    before = model_state(model)
    with pytest.raises(ZeroDivisionError), vlmslim.patch(model, Both()):
        model(**inputs)
        raise ZeroDivisionError
    assert changes(before, model_state(model)) == []


def test_a_forward_that_fails_leaves_the_patch_working_and_removable():
    class Grumpy(Strided):
        angry = False

        def chosen(self, n, prompt):
            if Grumpy.angry:
                raise ArithmeticError("no")
            return super().chosen(n, prompt)

    model = tiny("next")
    inputs = batch(model, ROWS)
    model(**inputs)
    before = model_state(model)
    slim = vlmslim.patch(model, Grumpy())
    want = greedy(model, inputs)[1]
    Grumpy.angry = True
    with pytest.raises(ArithmeticError):
        model(**inputs)
    with pytest.raises(ArithmeticError):
        greedy(model, inputs)
    Grumpy.angry = False
    assert torch.equal(greedy(model, inputs)[1], want)
    slim.remove()
    assert changes(before, model_state(model)) == []


def test_a_failing_setup_leaves_nothing_behind():
    class Broken(Strided):
        def setup(self, model):
            raise FileNotFoundError("weights.safetensors is missing")

    model = tiny("llava")
    before = model_state(model)
    with pytest.raises(FileNotFoundError):
        vlmslim.patch(model, Broken())
    assert changes(before, model_state(model)) == []


@torch.no_grad()
def test_two_patched_copies_and_an_unpatched_one_take_turns(family):
    models = [tiny(family) for _ in range(3)]
    inputs = batch(models[0], ROWS)
    methods = [Strided(), Stairs(), None]
    steps = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def decode(model):
        """A generator: prefill, then one token at a time by hand."""
        out = model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        yield out.logits
        for token in steps.T:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(input_ids=token[:, None], attention_mask=mask, **{KV_CACHE: kv_cache(out)})
            yield out.logits

    alone = []
    for model, method in zip(models, methods, strict=True):
        with ExitStack() as stack:
            if method:
                stack.enter_context(vlmslim.patch(model, method))
            alone.append(list(decode(model)))
    with vlmslim.patch(models[0], methods[0]), vlmslim.patch(models[1], methods[1]):
        together = list(zip(*[decode(model) for model in models], strict=True))
    for i, logits in enumerate(alone):
        for step, want in enumerate(logits):
            assert torch.equal(together[step][i], want)
    assert not torch.equal(alone[0][0], alone[2][0])
    assert not torch.equal(alone[1][0], alone[2][0])


@torch.no_grad()
def test_a_deepcopy_of_a_patched_model_lives_its_own_life(family):
    model = tiny(family)
    inputs = batch(model, ROWS)
    plain = model(**inputs).logits
    slim = vlmslim.patch(model, Both())
    want, want_logits = greedy(model, inputs)
    twin = copy.deepcopy(model)
    slim.reset_receipt()
    got, got_logits = greedy(twin, inputs)
    assert torch.equal(got_logits, want_logits)
    assert lengths(kv_cache(got)) == lengths(kv_cache(want))
    assert slim.receipt.summary()["images"] == 0, "the copy writes into the original's receipt"
    slim.remove()
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(greedy(twin, inputs)[1], want_logits), "removing the original's patch disturbed the copy"
    with torch.no_grad():  # the copy has its own weights
        twin.model.multi_modal_projector.linear_1.weight.zero_()
    assert torch.equal(model(**inputs).logits, plain)


def test_a_patch_draws_nothing_from_the_random_state():
    """As a method that builds a network would, before it loads the weights."""

    class Built(Strided):
        def setup(self, model):
            super().setup(model)
            torch.nn.Linear(4, 4)

    model = tiny("llava")
    torch.manual_seed(3)
    want = torch.rand(3)
    torch.manual_seed(3)
    with vlmslim.patch(model, Built()):
        assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("rule", [Strided(), Stairs(), Both()], ids=str)
@torch.no_grad()
def test_the_callers_tensors_are_not_edited(family, backend, rule):
    model = tiny(family, backend)
    inputs = batch(model, LONG_ROWS)
    copies = {key: value.clone() for key, value in inputs.items()}
    labels = inputs["input_ids"].clone()
    with vlmslim.patch(model, rule):
        model(**inputs, labels=labels)
        greedy(model, inputs)
    assert torch.equal(labels, copies["input_ids"])
    for key, value in copies.items():
        assert torch.equal(inputs[key], value), key
