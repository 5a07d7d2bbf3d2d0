"""Soft masks: a rule that hides what it would drop, in training, sees what inference sees."""

from dataclasses import replace

import pytest
import torch
from compare import close
from doubles import Blind, Halve, Stairs
from prompts import LONG_ROWS, ROWS, SEVERAL, batch
from tiny import tiny

import vlmslim
from vlmslim.ops.attention import weighted_logits


def test_weights_count_in_the_softmax():
    logits, weight = torch.randn(2, 3, 2, 5), torch.rand(2, 5)
    weight[0, 1] = 0
    weight.requires_grad_()
    rows = torch.tensor([[3, 4], [1, 2]])
    got = weighted_logits(logits, weight, rows).softmax(-1)
    for b in range(2):
        for q in range(2):
            w = weight[b].detach().clone()
            w[rows[b, q]] = 1
            mass = logits[b, :, q].exp() * w
            close(got[b, :, q], mass / mass.sum(-1, keepdim=True), 1e-6)
    got[0, 0, 0, 1].backward()  # what a hidden key would do if it were seen
    assert weight.grad[0, 1] > 0.01


def hiding(rule):
    """The same rule, in training: it hides what it would drop."""

    class Hiding(type(rule)):
        def soft_retain(self, tokens):
            if tokens.weight is not None:
                alive = tokens.weight > 0.5
                tokens = replace(tokens, image=tokens.image * alive, mask=tokens.mask & alive)
            return self.retain(tokens).float()

    return Hiding()


@pytest.mark.parametrize("rule", [Halve(), Stairs(), Blind()], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_weights_of_zero_and_one_are_removal(family, backend, padding, rule):
    model = tiny(family, backend)
    for rows in (LONG_ROWS, SEVERAL if family != "onevision" else SEVERAL[:1]):
        inputs = batch(model, rows, padding)
        with vlmslim.patch(model, rule):
            want = model(**inputs, use_cache=False).logits
        with vlmslim.patch(model, hiding(rule)):
            got = model(**inputs, use_cache=False).logits
        text = (inputs["input_ids"] < 98) & (inputs["attention_mask"] > 0)
        close(got[text], want[text])


@torch.no_grad()
def test_what_soft_masks_cannot_do_is_refused():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, hiding(Halve())), pytest.raises(ValueError, match="use_cache=False"):
        model(**inputs)

    class Elsewhere(Halve):
        def soft_retain(self, tokens):
            model.model.language_model.config._attn_implementation = "flash_attention_2"
            return self.retain(tokens).float()

    with vlmslim.patch(model, Elsewhere()), pytest.raises(ValueError, match="set_attn_implementation"):
        model(**inputs, use_cache=False)
