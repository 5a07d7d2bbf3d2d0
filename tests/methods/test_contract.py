"""The contract of a method, over every method that has a name.

A method from elsewhere is examined by `pytest tests/methods/test_contract.py --method path/to/norm.py:Norm`.
"""

from dataclasses import fields

import numpy as np
import pytest
import torch
from checks import check_changes_nothing, check_count, kept_of
from clip_fixtures import Words
from compare import close, greedy
from contract import contract_methods
from doubles import options_of, registered
from prompts import LONG_ROWS, ROWS, SEVERAL, Picture, batch
from receipt_audit import audited
from snapshots import left_behind
from tiny import FAMILIES, tiny
from unpatched import keep_only, reference

import vlmslim

#: The families that built-in methods refuse. A method from elsewhere may refuse any: those tests are skipped.
REFUSED = {"atp": ("next", "onevision"), "recoverable": ("siglip", "onevision")}


def over(names: list[str]) -> pytest.MarkDecorator:
    """Run a test over these methods, each on every family that it does not refuse."""
    pairs = [(name, family) for name in names for family in FAMILIES if family not in REFUSED.get(name, ())]
    return pytest.mark.parametrize(("name", "family"), pairs)


@pytest.fixture
def make(request):
    """Makes a method by name, at a budget if it has one."""

    def made(name: str, keep: int | float = 5, **options):
        options |= {"weights": "random"} if "weights" in options_of(name) else {}
        if "tokenizer" in options_of(name):
            options |= dict(tokenizer=Words())
        if "clip" in options_of(name):  # the CLIP of the tiny LLaVA's tower
            options |= dict(clip=request.getfixturevalue("hf_folder"))
        if name == "recoverable":
            options |= dict(neighbours=(3, 3, 3))
        return registered(name, keep, **options) if "keep" in options_of(name) else vlmslim.method(name, **options)

    return made


@pytest.fixture
def subject(make):
    """Makes a tiny model and a method on which it can be patched."""

    def made(name: str, family: str, keep: int | float = 5, dtype: torch.dtype = torch.float32, **options):
        model, method = tiny(family, dtype=dtype), make(name, keep, **options)
        if family == "next" and "clip" in options_of(name):  # the fixture's CLIP is that of the tiny LLaVA's tower
            model.model.vision_tower.load_state_dict(tiny("llava", dtype=dtype).model.vision_tower.state_dict())
        if name not in vlmslim.method_names():
            try:
                vlmslim.patch(model, method).remove()
            except ValueError as error:
                pytest.skip(f"{name} refuses {family}: {error}")
        return model, method

    return made


@pytest.mark.parametrize("name", contract_methods())
def test_its_description_is_complete(name, make):
    """`str` of a method names every option: it is the method's row in a table."""
    method = make(name)
    options = {f.name: getattr(method, f.name) for f in fields(method) if f.init}
    assert all(f"{f.name}=" in str(method) for f in fields(method) if f.init and f.repr)
    assert type(method).__doc__.strip()
    assert method == vlmslim.method(name, **options)


@pytest.mark.parametrize("name", [name for name in contract_methods() if name in REFUSED])
def test_a_family_that_does_not_fit_is_refused(name, make):
    for family in REFUSED[name]:
        with pytest.raises(ValueError, match="another method|CLS"):
            vlmslim.patch(tiny(family), make(name))


@over(contract_methods())
@torch.no_grad()
def test_a_batch_is_its_rows(name, family, subject):
    (model, method), rows = subject(name, family), [*LONG_ROWS, SEVERAL[0]]
    with vlmslim.patch(model, method):
        _, logits = greedy(model, batch(model, rows))
        padded = model(**batch(model, rows, "right")).logits
        for i, row in enumerate(rows):
            single = batch(model, [row])
            close(greedy(model, single)[1][0], logits[i], 5e-4)
            if i == 1:
                length = single["input_ids"].shape[1]
                close(model(**single).logits[0], padded[i][:length], 5e-4)


@over(contract_methods())
@torch.no_grad()
def test_it_is_deterministic_and_leaves_the_random_state(name, family, subject):
    (model, method), found = subject(name, family), []
    inputs = batch(model, LONG_ROWS)
    for seed in (1, 2):
        with vlmslim.patch(model, method):
            torch.manual_seed(seed)
            np.random.seed(seed)
            state = torch.get_rng_state()
            found.append(model(**inputs).logits)
            assert torch.equal(torch.get_rng_state(), state), "drew from the global generator"
    assert torch.equal(found[0], found[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@over(contract_methods())
@torch.no_grad()
def test_half_precision_runs(name, family, dtype, subject):
    model, method = subject(name, family, dtype=dtype)
    with vlmslim.patch(model, method):
        logits = greedy(model, batch(model, LONG_ROWS))[1]
    assert torch.isfinite(logits[:, :, 2:90]).all()


@pytest.mark.parametrize("name", contract_methods("keep", without=("weights",)))
def test_gradients_pass_the_tokens_that_it_sends(name, subject):
    model, method = subject(name, "llava")
    inputs = batch(model.train(), LONG_ROWS)
    with vlmslim.patch(model, method):
        model(**inputs, use_cache=False).logits.sum().backward()
    grad = model.model.multi_modal_projector.linear_1.weight.grad
    assert torch.isfinite(grad).all() and grad.any()


@pytest.mark.parametrize("keep", [1, 5, 0.4])
@over(contract_methods("keep", without=("weights",)))
@torch.no_grad()
def test_the_budget_is_met(name, family, keep, subject):
    """Before the language model, or at its end if the method drops tokens between layers alone."""
    model, method = subject(name, family, keep)
    for row in (*ROWS, LONG_ROWS[3], *SEVERAL):
        with vlmslim.patch(model, method) as slim:
            model(**batch(model, [row]))
        receipt, images = slim.receipt.summary(), sum(isinstance(x, Picture) for x in row)
        before = receipt["kept"] < receipt["visual_tokens"]
        kept = receipt["kept"] if before else receipt["visual_tokens_per_layer"][-1] / images
        assert kept == pytest.approx(receipt["requested"])
        if images == 1:
            want = keep if isinstance(keep, int) else max(1, round(keep * receipt["visual_tokens"]))
            assert receipt["requested"] == want


@over(contract_methods("keep"))
def test_keeping_everything_changes_nothing(name, family, subject):
    model, method = subject(name, family, 1.0)
    with torch.no_grad():
        check_changes_nothing(model, batch(model, LONG_ROWS), method)


@pytest.mark.parametrize("positions", ["renumbered", "original"])
@over(contract_methods("keep", "positions", without=("clip", "weights")))
@torch.no_grad()
def test_selected_tokens_enter_at_their_places(name, family, positions, subject):
    """The logits are those of an unpatched model that is fed the kept tokens by hand. Merged tokens are left out."""
    model, method = subject(name, family, positions=positions)
    first = method.stages()[0]
    options = {f.name: getattr(first, f.name) for f in fields(first) if f.init}
    for row in (ROWS[1], SEVERAL[0]):
        inputs, logits, seen, _ = kept_of(model, row, type(first), **options)
        assert all((result.index.diff() > 0).all() for _, result in seen), "not in reading order"
        if all(result.features is None for _, result in seen):
            kept = keep_only(inputs, [result.index for _, result in seen])
            close(logits, reference(model, inputs, kept, positions=positions).full_logits())


@over(contract_methods())
def test_nothing_is_left_of_its_patch(name, family, subject):
    """On the model, on another model, in the process, in the method's class; also if the method keeps everything."""
    for keep in (5, 1.0):
        assert left_behind(*subject(name, family, keep)) == []


@over(contract_methods())
def test_every_entry_of_its_receipt_is_true(name, family, subject):
    assert audited(*subject(name, family)) == []


#: Options under which a method keeps another count than `requested`, or divides it otherwise.
COUNTED = [
    ("bipartite_merge", {"newline": "extra"}),
    ("tokenflex", {"keep": 0.3}),
    ("visionzip", {"mode": "released"}),
    ("prunesid", {"mode": "released"}),
    ("holov", {"mode": "released"}),
    ("scope", {"mode": "released"}),
]


@over(contract_methods())
def test_servers_know_the_count_beforehand(name, family, subject):
    model, method = subject(name, family, *([0.3] if name == "tokenflex" else []))
    if method.stages()[0].acts_before_llm:
        check_count(model, method, batch(model, [*LONG_ROWS, *SEVERAL]))


@pytest.mark.parametrize(("name", "options"), COUNTED)
@pytest.mark.parametrize("family", ["llava", "next"])
def test_servers_know_the_count_beforehand_whatever_the_options(name, options, family, subject):
    model, method = subject(name, family, **options)
    check_count(model, method, batch(model, [*LONG_ROWS, *SEVERAL]))
