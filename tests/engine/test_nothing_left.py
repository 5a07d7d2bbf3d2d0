"""A patch leaves nothing behind: on its model, on other models, in the process, and in the classes of its method.

Over every registered method this is a part of the contract, in tests/methods/test_contract.py.
"""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from compare import greedy
from doubles import Both, First, Halve, Stairs, Strided
from prompts import ROWS, batch
from snapshots import changes, left_behind, model_state, process_state
from tiny import tiny
from transformers.cache_utils import DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import vlmslim

RULES = [Both(), Stairs(), [Strided(), Halve()], vlmslim.method("none")]


@pytest.mark.parametrize("method", RULES, ids=str)
def test_nothing_is_left_of_a_patch(family, backend, method):
    model = tiny(family, backend)
    assert left_behind(model, method) == []
    with vlmslim.patch(model, method):  # and the model can be patched again
        greedy(model, batch(model, ROWS))


# --- planted faults ---------------------------------------------------------------------------------------------------


def a_class_is_patched(monkeypatch, model):
    """Trap 13: a method of the class is replaced, for every model in the process."""
    cls = type(model.model.multi_modal_projector)
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda module, x: 1.01 * forward(module, x))


def a_library_function_is_replaced(monkeypatch, model):
    sdpa = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: sdpa(*a, **k))


def a_hook_stays(monkeypatch, model):
    model.lm_head.register_forward_hook(lambda *_: None)


def weights_are_changed(monkeypatch, model):
    model.lm_head.weight.data.mul_(1.01)


def the_back_end_is_switched(monkeypatch, model):
    model.set_attn_implementation("eager")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (a_class_is_patched, ["LlavaMultiModalProjector.forward, while patched", "the other model's answers"]),
        (a_library_function_is_replaced, ["functional.scaled_dot_product_attention, while patched"]),
        (a_hook_stays, ["lm_head._forward_hooks"]),
        (weights_are_changed, ["bits of lm_head.weight", "the model's answers"]),
        (the_back_end_is_switched, ["attention implementation"]),
    ],
)
def test_what_a_method_does_to_its_model_is_seen(monkeypatch, fault, says):
    class Faulty(First):
        def setup(self, model):
            fault(monkeypatch, model)

    found = left_behind(tiny("llava"), Faulty())
    assert all(any(text in name for name in found) for text in says), found


@dataclass
class OnceForAll(First):
    """The choice for the first image is that for every later one of its size."""

    choices: ClassVar = {}

    def chosen(self, n, prompt):
        return self.choices.setdefault(n, super().chosen(n, prompt))


def test_a_class_that_remembers_a_prompt_is_seen():
    assert any("OnceForAll.choices" in name for name in left_behind(tiny("llava"), OnceForAll()))


def class_attribute(monkeypatch, model):
    monkeypatch.setattr(type(model), "_supports_sdpa", False)


def cache_update(monkeypatch, model):
    update = DynamicLayer.update
    monkeypatch.setattr(DynamicLayer, "update", lambda *a, **k: update(*a, **k))


def tensor_method(monkeypatch, model):
    softmax = torch.Tensor.softmax
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *a, **k: softmax(*a, **k), raising=False)


def registry(monkeypatch, model):
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", lambda *a, **k: sdpa(*a, **k))


def backward_hook(monkeypatch, model):
    monkeypatch.setitem(torch.nn.modules.module._global_backward_hooks, 99999, print)


def default_dtype(monkeypatch, model):
    torch.set_default_dtype(torch.float64)


def grad_mode(monkeypatch, model):
    torch.set_grad_enabled(False)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (class_attribute, "_supports_sdpa"),
        (cache_update, "DynamicLayer.update"),
        (tensor_method, "Tensor.softmax"),
        (registry, "ALL_ATTENTION_FUNCTIONS['sdpa']"),
        (backward_hook, "_global_backward_hooks"),
        (default_dtype, "default dtype"),
        (grad_mode, "grad mode"),
    ],
)
def test_what_a_snapshot_of_the_process_sees(monkeypatch, change, says):
    model = tiny("llava")
    before = process_state(model)
    assert changes(before, process_state(model)) == []
    try:
        change(monkeypatch, model)
        assert any(says in name for name in changes(before, process_state(model)))
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_grad_enabled(True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.model.language_model.layers[1].register_forward_hook(print), "layers.1._forward_hooks"),
        (lambda m: setattr(m.model, "extra", 1), "model.extra"),
        (lambda m: m.lm_head.weight.data.mul_(2), "bits of lm_head.weight"),  # in secret
        (lambda m: m.lm_head.weight.data[5, :1].nextafter_(torch.tensor(9.0)), "bits of lm_head.weight"),
        (lambda m: m.lm_head.weight.data.copy_(m.lm_head.weight.data.flip(0)), "bits of lm_head.weight"),
        (lambda m: m.model.language_model.rotary_emb.original_inv_freq.data.fill_(0), "original_inv_freq"),
        (lambda m: m.lm_head.weight.requires_grad_(False), "requires_grad of lm_head.weight"),
        (lambda m: m.lm_head.weight.register_hook(print), "_backward_hooks of lm_head.weight"),
        (lambda m: setattr(m.config.vision_config, "_attn_implementation", "eager"), "attention of model.vision_tower"),
        (lambda m: m.lm_head.weight.detach().mul_(1), "values of lm_head.weight"),
        (lambda m: setattr(m.model.vision_tower, "forward", print), "vision_tower.forward"),
        (lambda m: setattr(m.config.text_config, "hidden_act", "gelu"), "config"),
        (lambda m: setattr(m.generation_config, "top_k", 3), "generation config"),
    ],
)
def test_what_a_snapshot_of_a_model_sees(change, says):
    model = tiny("llava")
    before = model_state(model)
    assert changes(before, model_state(model)) == []
    change(model)
    assert any(says in name for name in changes(before, model_state(model)))
