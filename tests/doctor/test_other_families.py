"""The doctor on families beyond LLaVA: honest methods pass, and faults of what only these families have are found."""

from functools import cache

import pytest
import torch
from doctor_methods import Late, Original, Plain
from hypothesis import given
from hypothesis import strategies as st
from zoo import renumbered
from zoo_checkpoints import PROCESSORS, checkpoint

import vlmslim
from vlmslim import doctor
from vlmslim.doctor.checks import CHECKS, Subject
from vlmslim.doctor.prompts import Prompts, why_no_video
from vlmslim.doctor.reference import close_gaps
from vlmslim.doctor.runs import UnpatchedRun
from vlmslim.engine.forward import Call
from vlmslim.engine.hooks import Hooks
from vlmslim.loading import load

IN_FULL = ("qwen3_vl", "gemma3")
VIDEO = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_next_video")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Return a function that loads the tiny checkpoint of a family and its processor."""
    folder = cache(lambda name: checkpoint(name, tmp_path_factory.mktemp(name)))
    return lambda name: load(folder(name), dtype="float32")


@pytest.mark.parametrize("name", [n if n in IN_FULL else pytest.param(n, marks=pytest.mark.slow) for n in PROCESSORS])
def test_honest_methods_pass(loaded, name):
    report = doctor.examine(*loaded(name), [[{"method": "pool", "keep": 0.25}], [Original(keep=0.5), Late()]])
    assert report.passed, str(report)
    skipped = {finding.check: finding.note for finding in report.findings if finding.status == "n/a"}
    assert all(len(why) > 20 for why in skipped.values())
    assert skipped.keys() - {"cache"} == ({"video"} - {"video" for n in VIDEO if n == name}) | (
        {"attention"} if name == "gemma3" else set()  # its masks have a number for each pair of tokens
    )


def nothing(*args, **kwargs):
    """Stands in for a step that is left out."""


#: family, what is replaced and by what, and a method under which the fault shows
FAULTS = {
    "gaps_stay_open": ("qwen2_5_vl", "vlmslim.engine.layout.closed_up", lambda p, *_: (p, p[0, :, :1] * 0), Plain()),
    "added_features_are_lost": ("qwen3_vl", Hooks, "_leave_layer", Plain()),
    "added_features_do_not_follow_merged_tokens": ("qwen3_vl", Call, "merge_added", "pool"),
    "pictures_see_what_is_before_them_alone": ("gemma3", "vlmslim.engine.hooks.blocks_of", nothing, Plain(keep=0.75)),
}


@pytest.mark.parametrize(
    "fault", [n if n != "gaps_stay_open" else pytest.param(n, marks=pytest.mark.slow) for n in FAULTS]
)
def test_the_reference_finds_faults(loaded, monkeypatch, fault):
    name, owner, what, method = FAULTS[fault]
    model, processor = loaded(name)
    unpatched = UnpatchedRun(model, Prompts(model, processor, why_no_video(model, processor) is None))
    if isinstance(owner, str):
        monkeypatch.setattr(owner, what)
    else:
        monkeypatch.setattr(owner, what, nothing)
    stage = {"method": method, "keep": 0.25} if isinstance(method, str) else method
    with vlmslim.patch(loaded(name)[0], [stage]) as slim:
        outcome = CHECKS["reference"](Subject(slim, unpatched))
    assert not outcome.passed and outcome.measured > 100 * outcome.tolerance


@given(st.data())
def test_gaps_close_as_they_do_by_hand(data):
    """Against plain loops over lists, for positions of one number and of three."""
    axes, length = data.draw(st.sampled_from([1, 3])), data.draw(st.integers(1, 12))
    bools = st.lists(st.booleans(), min_size=length, max_size=length)
    visual, keep = torch.tensor(data.draw(bools)), torch.tensor(data.draw(bools))
    keep |= ~visual
    steps = data.draw(
        st.lists(st.lists(st.integers(1, 3), min_size=length, max_size=length), min_size=axes, max_size=axes)
    )
    position = torch.tensor(steps).cumsum(1) if axes > 1 else torch.arange(length)[None]
    kept = keep.nonzero()[:, 0]
    closed, _ = close_gaps(position, keep, visual)
    want = renumbered(position[:, None] if axes > 1 else position, kept, visual)
    assert torch.equal(closed[:, kept], want[:, 0] if axes > 1 else want)
