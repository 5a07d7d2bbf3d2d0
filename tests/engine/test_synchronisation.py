"""The host waits for nothing between the vision tower and the end of a prefill, except where a method says why.

Under PyTorch's fake tensors a model on "cuda" runs where there is no GPU: tensors have a shape and a device, and no
values. Mixing devices raises, and so does every look at a value.
"""

from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import zoo
from clip_fixtures import Words
from contract import contract_methods
from doubles import Both, Halve, Strided, StridedOriginal
from prompts import ROWS, SEVERAL, Picture, batch, packed, words
from tiny import BOS, tiny
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from transformers.initialization import no_init_weights
from watch import Watch

import vlmslim
from vlmslim.compressor import ImageTokens
from vlmslim.engine.layout import Layout
from vlmslim.engine.locate import read_prompt
from vlmslim.registry import method_class, options_of, parse_method

MERGING = ("visionzip", "vscan")  # have nothing to rectify
SELECTORS = [x for x in contract_methods("rectify") if x not in MERGING and not method_class(x).reads_back]
LOOKS = (DataDependentOutputException, DynamicOutputShapeException)


class Pending:
    """An event of a device that never gets there."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        raise AssertionError("the host waited for the device")


@pytest.fixture
def device(monkeypatch):
    """A device without values. The host may read what it has itself: numbers, tensors of its own, and the prompt."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # unpatched models look at their placeholders there
    stream = SimpleNamespace(record_event=lambda *_: Pending())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.cuda, "Event", lambda **_: None)
    monkeypatch.setattr("vlmslim.engine.later.Later.settle", lambda self: None)  # values never arrive

    def at_home(function):
        def called(self, *args, **kwargs):
            if isinstance(self, FakeTensor):
                return function(self, *args, **kwargs)
            with unset_fake_temporarily():
                return function(self, *args, **kwargs)

        return called

    for name in ("tolist", "numpy", "item"):
        monkeypatch.setattr(torch.Tensor, name, at_home(getattr(torch.Tensor, name)))
    monkeypatch.setattr(torch, "from_numpy", at_home(torch.from_numpy))
    grid = cached_property(at_home(ImageTokens.grid_on_host.func))
    grid.__set_name__(ImageTokens, "grid_on_host")
    monkeypatch.setattr(ImageTokens, "grid_on_host", grid)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


def on_device(family: str, rows: list, monkeypatch, make=batch) -> tuple:
    """A tiny model without values, and the inputs of a prompt, of which the host knows ids, mask and sizes."""
    with unset_fake_temporarily():
        real = zoo.build(family) if family in zoo.ZOO else tiny(family)
        inputs = zoo.batch(family, real, zoo.ROWS) if family in zoo.ZOO else make(real, rows)
        known = read_prompt(real.model, inputs, ["image"])
        lists = {name: x.tolist() for name, x in inputs.items() if name in ("image_sizes", "batch_num_images")}
        lists |= {name: x for name, x in inputs.items() if not isinstance(x, torch.Tensor)}
    monkeypatch.setattr("vlmslim.engine.hooks.read_prompt", lambda *_: known)
    with torch.device("cuda"), no_init_weights():
        model = type(real)(real.config).eval().requires_grad_(False)
    shapes = {name: (x.shape, x.dtype) for name, x in inputs.items() if name not in lists}
    return model, {n: torch.empty(s, dtype=d, device="cuda") for n, (s, d) in shapes.items()} | lists


@pytest.mark.parametrize("family", ["llava", "next"])
@pytest.mark.parametrize("name", contract_methods(without=("weights", "clip")))
@torch.no_grad()
def test_a_method_waits_for_the_device_only_if_it_says_so(name, family, device, monkeypatch):
    """A method that says why it reads back does; one that says nothing does not, nor does the engine for it."""
    options = {"keep": 5} if "keep" in options_of(name) else {}
    options |= {"tokenizer": Words()} if "tokenizer" in options_of(name) else {}
    model, inputs = on_device(family, [*ROWS, SEVERAL[0]], monkeypatch)
    with vlmslim.patch(model, name, **options) as slim:
        reasons = [stage.method.reads_back for stage in slim.stages if stage.method.reads_back]
        try:
            logits = model(**inputs).logits
        except (*LOOKS, RuntimeError) as error:
            assert isinstance(error, LOOKS) or "tensor subclasses" in str(error), error
            assert reasons, f"{name} looks at values of the device, and its `reads_back` does not say why"
            return
    assert logits.device.type == "cuda" and logits.shape[:2] == inputs["input_ids"].shape
    assert not reasons, f"{name} says {reasons}, but looks at no value"


@pytest.mark.parametrize("family", ["llava", "next"])
@pytest.mark.parametrize(
    "spec",
    [f"{x}:keep=5:rectify=True" for x in SELECTORS]
    + [
        "divprune:keep=5:centre=True",
        "schedule:by=random",
        "tokencorr:keep=5:sampling=multinomial",
        "tokenflex:keep=0.25:weights=pool",
    ],
)
@torch.no_grad()
def test_an_option_does_not_make_a_method_wait(spec, family, device, monkeypatch):
    model, inputs = on_device(family, [*ROWS, SEVERAL[0]], monkeypatch)
    options = parse_method(spec)
    known = options_of(options["method"])
    options |= {"tokenizer": Words()} if "tokenizer" in known else {}
    options |= {"relevance": "none"} if "relevance" in known else {}
    options |= {"tau": None} if "tau" in known else {}  # the threshold of a later stage, which does wait
    with vlmslim.patch(model, [options]) as slim:
        assert model(**inputs).logits.shape[:2] == inputs["input_ids"].shape
        assert not any(stage.method.reads_back for stage in slim.stages)


def embedded(model, rows) -> dict:
    """Inputs with embeddings in place of ids."""
    inputs = batch(model, rows)
    return inputs | {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids"))}


@pytest.mark.parametrize("make", [packed, embedded])
@torch.no_grad()
def test_packed_rows_and_embeddings_wait_for_nothing(make, device, monkeypatch):
    model, inputs = on_device("llava", [*ROWS, SEVERAL[0]], monkeypatch, make)
    with vlmslim.patch(model, [{"method": "divprune", "keep": 3}, {"method": "fastv", "keep": 2, "layer": 1}]) as slim:
        assert model(**inputs).logits.device.type == "cuda"
        assert slim.receipt.last.visual[-1] == [2, 2, 4]


def test_gaps_in_several_numbers_close_without_waiting(device):
    image = torch.empty(2, 9, dtype=torch.long, device="cuda")
    layout = Layout(image > 0, image.expand(3, 2, 9), image, image, image, [9, 8])
    assert layout.select(image > 1, renumber=True, counts=[7, 6]).layout.position.shape == (3, 2, 7)


@pytest.mark.parametrize(
    "family, spec",
    [
        ("llava", "tokencorr:beta=0.1"),
        ("llava", "dart:keep=5:mode=released"),
        ("llava", "sparsevlm:version='1.0':layer=[1, 2]"),
        ("next", "globalcom2:mode=released"),
    ],
)
@torch.no_grad()
def test_an_option_may_make_a_method_wait(family, spec, device, monkeypatch):
    model, inputs = on_device(family, [*ROWS, SEVERAL[0]], monkeypatch)
    with vlmslim.patch(model, [parse_method(spec)]) as slim:
        assert slim.stages[0].method.reads_back
        with pytest.raises((*LOOKS, RuntimeError)):
            model(**inputs)


@pytest.mark.parametrize(
    "family", ["siglip", "onevision", *sorted({*zoo.ZOO} - {"gemma3"})]
)  # Gemma's prompt says more
@torch.no_grad()
def test_the_engine_waits_no_more_often_than_the_family_does_unpatched(family, device, monkeypatch):
    model, inputs = on_device(family, ROWS, monkeypatch)
    try:
        model(**inputs)
    except Exception as error:  # a read-back raises errors of many kinds; it is the model's own, and not ours to test
        pytest.skip(f"{family} itself looks at values: {error}")
    with vlmslim.patch(model, [{"method": "divprune", "keep": 3}, {"method": "fastv", "keep": 2, "layer": 1}]) as slim:
        assert model(**inputs).logits.device.type == "cuda"
        assert slim.receipt.last.visual[0] == [3, 3] and slim.receipt.last.visual[-1] == [2, 2]


@pytest.mark.parametrize("name", contract_methods(without=("weights", "clip")))
def test_the_page_lists_what_waits(name):
    page = (Path(__file__).parents[2] / "docs" / "efficiency.md").read_text()
    page = page.split("## Waiting for the device")[1].split("\n## ")[0]
    method = vlmslim.method(name, **({"keep": 4} if "keep" in options_of(name) else {}))
    reasons = [stage.reads_back for stage in method.stages() if stage.reads_back]
    assert (f"| `{name}` | " in page) == bool(reasons)
    assert all(f"| `{name}` | {reason} |" in page for reason in reasons[:1])


@pytest.mark.parametrize("family", ["llava", "next"])
@pytest.mark.parametrize("rule", [Strided(), StridedOriginal()], ids=str)
@torch.no_grad()
def test_a_conversation_goes_on_without_waiting(rule, family, device, monkeypatch):
    """Prefill, cache and a step of decoding, with both kinds of positions."""
    model, inputs = on_device(family, ROWS, monkeypatch)
    with vlmslim.patch(model, rule):
        out = model(**inputs, use_cache=True)
        mask = torch.ones(len(ROWS), inputs["input_ids"].shape[1] + 1, dtype=torch.long, device="cuda")
        cache = {name: value for name, value in out.items() if name in ("past_key_values", "cache")}
        assert model(input_ids=mask[:, :1], attention_mask=mask, **cache).logits.shape[:2] == (len(ROWS), 1)


PROMPTS = {
    "one image": [[BOS, Picture(0), *words(0, 5)]],
    "several images": [[BOS, Picture(i), *words(i, 3), Picture(9 + i), *words(9, 2)] for i in range(3)],
}


@pytest.mark.parametrize("name", ["random", "uniform", "pool", "fastv", "divprune"])
@torch.no_grad()
def test_a_method_waits_no_more_often_for_more_tokens(name):
    counts = []
    for keep in (3, 12):
        model = tiny("llava")
        inputs = batch(model, ROWS)
        with vlmslim.patch(model, name, keep=keep), Watch() as watch:
            model(**inputs)
        counts.append(watch.syncs())
    assert counts[0] == counts[1]


@pytest.mark.parametrize("rule", [Strided(), Halve(), Both()], ids=str)
@pytest.mark.parametrize("prompts", PROMPTS)
@torch.no_grad()
def test_the_prompt_is_read_before_the_tower_starts(rule, prompts, monkeypatch):
    model, order = tiny("llava"), []
    from vlmslim.engine import hooks

    read = hooks.read_prompt
    monkeypatch.setattr(hooks, "read_prompt", lambda *given: order.append("prompt") or read(*given))
    model.model.vision_tower.register_forward_pre_hook(lambda *_: order.append("tower"))
    with vlmslim.patch(model, rule):
        model(**batch(model, PROMPTS[prompts]))
    assert order == ["prompt", "tower"]
