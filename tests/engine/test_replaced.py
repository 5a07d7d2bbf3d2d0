"""Parts of a model that are replaced before or during a patch: the engine uses them, and puts back the old ones."""

from copy import deepcopy

import pytest
import torch
from compare import close
from prompts import ROWS, Picture, batch
from tiny import BOS, tiny
from torch import nn

import vlmslim


class Wrapper(nn.Module):
    """Holds a copy of a module beside the original and uses the copy, as adapters do."""

    def __init__(self, inner):
        super().__init__()
        self.original, self.active = inner, deepcopy(inner)
        with torch.no_grad():
            for p in self.active.parameters():
                p.mul_(1.5).add_(0.1)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.original, name)

    def forward(self, *args, **kwargs):
        return self.active(*args, **kwargs)


@pytest.mark.parametrize("method", ["divprune", "aim", "tokencorr", "tokenflex", "visionzip"])
@torch.no_grad()
def test_a_projector_may_be_replaced_while_the_patch_is_on(method):
    options = {"keep": 4} | ({"weights": "pool"} if method == "tokenflex" else {})
    first, last = tiny("llava"), tiny("llava")
    vlmslim.patch(first, method, **options)
    before = first(**batch(tiny("llava"), ROWS)).logits
    first.model.multi_modal_projector = Wrapper(first.model.multi_modal_projector)
    last.model.multi_modal_projector = Wrapper(last.model.multi_modal_projector)
    vlmslim.patch(last, method, **options)
    got, want = (model(**batch(tiny("llava"), ROWS)).logits for model in (first, last))
    close(got, want)
    assert (got - before).abs().max() > 0.1


def cached(encode, store):
    """A function that encodes once and keeps the output."""

    def own(pixel_values, **more):
        if "it" not in store:
            store["it"] = encode(pixel_values, **more)
        return store["it"]

    return own


def counted(encode, store):
    """A function that notes how often it is called."""

    def own(pixel_values, **more):
        store["calls"] = store.get("calls", 0) + 1
        return encode(pixel_values, **more)

    return own


def one_by_one(encode, store):
    """A function that encodes one picture at a time."""

    def own(pixel_values, **more):
        parts = [encode(pixel_values[i : i + 1], **more) for i in range(len(pixel_values))]
        parts[0].pooler_output = [part.pooler_output[0] for part in parts]
        return parts[0]

    return own


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", [cached, counted, one_by_one])
@pytest.mark.parametrize("method", ["none", "divprune", "aim"])
@torch.no_grad()
def test_a_function_of_the_users_is_called_and_put_back(method, kind, when):
    options, model, store = {} if method == "none" else {"keep": 5}, tiny("llava"), {}
    core, inputs = model.model, batch(model, ROWS)
    with vlmslim.patch(tiny("llava"), method, **options) as slim:
        want = slim.model(**inputs).logits
    if when == "after":
        slim = vlmslim.patch(model, method, **options)
    core.get_image_features = own = kind(core.get_image_features, store)
    if when == "before":
        model(**inputs)
        slim = vlmslim.patch(model, method, **options)
    for _ in range(2):
        close(model(**inputs).logits, want)
    assert slim.receipt.images == 4
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    slim.remove()
    assert vars(core)["get_image_features"] is own
    close(model(**inputs).logits, tiny("llava")(**inputs).logits)
    if kind is counted:
        assert store["calls"] == 4 + (when == "before")


@torch.no_grad()
def test_features_that_the_model_does_not_make_are_refused_except_under_none():
    model, inputs = tiny("llava"), batch(tiny("llava"), ROWS)
    other = model.model.get_image_features(torch.randn_like(inputs["pixel_values"]))
    model.model.get_image_features = lambda pixel_values, **more: other
    want = model(**inputs).logits
    with vlmslim.patch(model, "none"):
        assert torch.equal(model(**inputs).logits, want)
    with vlmslim.patch(model, "aim", keep=5), pytest.raises(ValueError, match="get_image_features was replaced"):
        model(**inputs)


@torch.no_grad()
def test_a_language_model_that_was_replaced_says_so():
    model = tiny("llava")
    with vlmslim.patch(model, "divprune", keep=5):
        model.model.language_model = deepcopy(tiny("llava").model.language_model)
        with pytest.raises(RuntimeError, match="language model .* was replaced after the patch"):
            model(**batch(tiny("llava"), [[BOS, Picture(0), 5]]))


def test_a_save_function_of_the_users_is_put_back():
    model = tiny("llava")
    own = model.save_pretrained = lambda *args, **kwargs: "mine"
    with vlmslim.patch(model, "none"), pytest.warns(UserWarning, match="without its patch"):
        assert model.save_pretrained("x") == "mine"
    assert model.save_pretrained is own


class Bytes(nn.Linear):
    """A quantised layer: its weights are bytes, and it takes fp32 only."""

    def __init__(self, inner):
        super().__init__(inner.in_features, inner.out_features, device="meta")
        self.exact = [inner.weight, inner.bias]
        self.weight = nn.Parameter(torch.zeros(7, dtype=torch.uint8), requires_grad=False)
        self.bias = None

    def forward(self, x):
        assert x.dtype == torch.float32, f"features were cast to {x.dtype}"
        return nn.functional.linear(x, *self.exact)


@pytest.mark.parametrize("method", ["divprune", "aim", "tokencorr", "tokenflex", "visionzip"])
@torch.no_grad()
def test_a_quantised_projector_is_given_what_the_model_gives_it(method):
    options = {"keep": 4} | ({"weights": "pool"} if method == "tokenflex" else {})
    model = tiny("llava")
    with vlmslim.patch(model, method, **options):
        want = model(**batch(model, ROWS)).logits
    projector = model.model.multi_modal_projector
    projector.linear_1, projector.linear_2 = Bytes(projector.linear_1), Bytes(projector.linear_2)
    with vlmslim.patch(model, method, **options):
        close(model(**batch(model, ROWS)).logits, want)
