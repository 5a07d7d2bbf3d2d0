"""Bad use is a clear error that says what to do, and leaves the model as it was."""

from dataclasses import dataclass

import pytest
import torch
from compare import greedy
from doubles import Both, First, Halve, PairMean, Rule, Strided
from prompts import ROWS, Picture, batch, words
from snapshots import changes, model_state
from tiny import BOS, tiny
from transformers import LlamaConfig, LlamaForCausalLM

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache


@dataclass
class WantsCls(First):
    needs_cls = True


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("divprun", "divprune"), ("fast_v", "fastv"), ("Uniform", "uniform"), ("rnadom", "random"), ("pol", "pool")],
)
def test_an_unknown_method_names_the_nearest(given, nearest):
    with pytest.raises(ValueError, match=f"(?s)unknown method '{given}'.*{nearest}"):
        vlmslim.method(given)
    with pytest.raises(ValueError, match=f"(?s){given}.*{nearest}"):
        vlmslim.patch(tiny("llava"), given, keep=4)


def test_an_unknown_method_lists_the_known_ones():
    with pytest.raises(ValueError) as error:
        vlmslim.method("zzz")
    assert all(name in str(error.value) for name in vlmslim.method_names())
    assert "Did you mean" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("divprune", dict(kep=4), "keep"),
        ("divprune", dict(keep=4, ordr="raster"), "order"),
        ("fastv", dict(keep=4, layr=2), "layer"),
        ("random", dict(keep=4, sed=1), "seed"),
        ("none", dict(keep=4), "keep"),
        ("uniform", dict(keep_ratio=0.5), "keep"),
        ("random", dict(), "keep"),
    ],
)
def test_unknown_and_missing_options(name, options, says):
    with pytest.raises(ValueError, match=says):
        vlmslim.method(name, **options)


@pytest.mark.parametrize("keep", [0, -1, -0.5, 0.0, 1.5, 64.0, True, False, "64", None, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["random", "uniform", "pool", "fastv", "divprune"])
def test_a_budget_that_means_nothing(name, keep):
    with pytest.raises(ValueError, match="keep"):
        vlmslim.method(name, keep=keep)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("divprune", dict(keep=4, order="score")),
        ("divprune", dict(keep=4, newline="keep")),
        ("divprune", dict(keep=4, positions="absolute")),
        ("uniform", dict(keep=4, positions="absolute")),
        ("fastv", dict(keep=4, layer=0)),
        ("fastv", dict(keep=4, layer=-1)),
        ("fastv", dict(keep=4, layer=4)),
        ("fastv", dict(keep=4, layer=99)),
        ("fastv", dict(keep=4, layer=1.5)),
        ("fastv", dict(keep=4, layer="2")),
    ],
    ids=str,
)
def test_options_out_of_range(name, options):
    """Refused when the method is made, or at the latest when it meets the model (4 decoder layers)."""
    model = tiny("llava")
    before = model_state(model)
    option = next(key for key in options if key != "keep")
    with pytest.raises(ValueError, match=f"{option}|{options[option]}"):
        vlmslim.patch(model, name, **options)
    assert changes(before, model_state(model)) == []


def test_an_unsupported_model_names_the_supported_ones():
    config = LlamaConfig(vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    for model in (LlamaForCausalLM(config), torch.nn.Linear(2, 2), tiny("llava").model):
        with pytest.raises(TypeError) as error:
            vlmslim.patch(model, "divprune", keep=4)
        for name in ("Llava", "LlavaNext", "LlavaOnevision"):
            assert f"{name}ForConditionalGeneration" in str(error.value)
        assert type(model).__name__ in str(error.value)


def test_already_patched():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, "divprune", keep=4):
        logits = greedy(model, inputs)[1]
        with pytest.raises(RuntimeError, match=r"(?i)already.*DivPrune.*remove"):
            vlmslim.patch(model, "uniform", keep=4)
        assert torch.equal(greedy(model, inputs)[1], logits), "the refused patch disturbed the first"
    vlmslim.patch(model, "uniform", keep=4).remove()


@pytest.mark.parametrize("name", ["random", "uniform", "pool", "fastv", "divprune"])
@torch.no_grad()
def test_a_budget_larger_than_the_image(name):
    model = tiny("llava")
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, name, keep=17):
        with pytest.raises(ValueError, match=r"keep=17.*16"):
            model(**inputs)
        with pytest.raises(ValueError, match=r"keep=17.*16"):
            greedy(model, inputs)
    with vlmslim.patch(model, name, keep=16):
        model(**inputs)


@pytest.mark.parametrize("method", ["random", "uniform", "pool", "fastv", "divprune", Both(), PairMean()], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_features_that_are_not_numbers(method, value):
    """The second of three images is broken; the message says which."""
    model = tiny("llava")
    rows = [[BOS, Picture(i), *words(i, 3)] for i in range(3)]
    inputs = batch(model, rows)
    inputs["pixel_values"][1, :, :8, :8] = value
    options = {"keep": 4} if isinstance(method, str) else {}
    with vlmslim.patch(model, method, **options):
        with pytest.raises(ValueError, match=r"(?i)image 1\b.*finite|finite.*image 1\b|NaN.*image 1\b|image 1\b.*NaN"):
            model(**inputs)
        with pytest.raises(ValueError, match="image 1"):
            greedy(model, inputs)


@torch.no_grad()
def test_a_method_that_needs_cls_refuses_a_tower_without():
    for family in ("siglip", "onevision"):
        model = tiny(family)
        before = model_state(model)
        with pytest.raises(ValueError, match=r"CLS"):
            vlmslim.patch(model, WantsCls())
        assert changes(before, model_state(model)) == []
    for family in ("llava", "next"):
        model = tiny(family)
        with vlmslim.patch(model, WantsCls()):
            model(**batch(model, ROWS))


def test_stages_that_do_not_go_together():
    model = tiny("llava")
    before = model_state(model)
    for stages in ([Strided(), First()], [Halve(), Halve()], [], [{"keep": 4}], [3], 3, None):
        with pytest.raises((ValueError, TypeError)):
            vlmslim.patch(model, stages)
        assert changes(before, model_state(model)) == []
    with pytest.raises(ValueError, match="keep"):
        vlmslim.patch(model, Strided(), keep=4)


@dataclass
class Nowhere(Rule):
    tower_layers = (7,)

    def chosen(self, n, prompt):
        return torch.arange(n)


def test_a_tower_layer_that_is_not_there():
    with pytest.raises(ValueError, match="7"):
        vlmslim.patch(tiny("llava"), Nowhere())


@torch.no_grad()
def test_a_tower_layer_that_was_not_asked_for():
    class Hasty(First):
        def compress(self, image):
            image.qk(0)
            return super().compress(image)

    model = tiny("llava")
    with vlmslim.patch(model, Hasty()), pytest.raises(RuntimeError, match="tower_layers"):
        model(**batch(model, ROWS))


@torch.no_grad()
def test_a_mask_that_does_not_cover_the_conversation():
    """Whoever builds masks from the cache's length forgets the dropped tokens: that is said, not attended."""
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    with vlmslim.patch(model, Strided()):
        cache = kv_cache(model(**inputs))
        short = torch.ones(1, cache.layers[0].keys.shape[-2] + 1, dtype=torch.long)
        with pytest.raises(ValueError, match="(?i)mask"):
            model(torch.tensor([[5]]), attention_mask=short, **{KV_CACHE: cache})


def test_removing_twice_is_harmless():
    model = tiny("llava")
    slim = vlmslim.patch(model, Strided())
    slim.remove()
    other = vlmslim.patch(model, Halve())
    slim.remove()
    with pytest.raises(RuntimeError):
        vlmslim.patch(model, Strided())
    other.remove()
