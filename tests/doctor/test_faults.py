"""Planted faults of methods: each is found by the check that is there for it.

The faults are those of released tools, by their number in docs/traps.md where they have one.
"""

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from doctor_methods import Late, Plain
from lmms_fixtures import FAMILIES

from vlmslim import Compressor, doctor
from vlmslim.compressor import Compressed, resolve_keep
from vlmslim.doctor.checks import CHECKS
from vlmslim.registry import label

# --- faults of methods ------------------------------------------------------------------------------------------------


FAULTS = {}  # by name: the faulty method, the checks that must fail, those that may fail too, and what the first says


def fails(*checks: str, may: tuple[str, ...] = (), says: str = "", after: Compressor | None = None):
    """Note which checks the decorated method fails; `after` is a stage before it."""

    def note(cls):
        FAULTS[cls.__name__] = cls() if after is None else [after, cls()], checks, may, says
        return cls

    return note


@pytest.fixture(scope="module")
def report(load):
    """One examination of all of them, which cannot harm one another."""
    return doctor.examine(*load(), [method for method, *_ in FAULTS.values()])


@fails("keep-all", says="logits differ by")
class Rescaled(Plain):
    """It goes on working where there is nothing to do."""

    def compress(self, image):
        kept = super().compress(image)
        return replace(kept, features=kept.vectors(image) * (1 + 1e-5))


@fails("keep-all")
class RescaledByNumber(Plain):
    """The same, if it is asked for everything by number."""

    def compress(self, image):
        kept = super().compress(image)
        return replace(kept, features=1.5 * kept.vectors(image)) if isinstance(self.keep, int) else kept


@fails("budget", says="kept of 4 asked for")
class Twice(Plain):
    """Trap 17: half-precision selection picked tokens twice, 44 distinct ones of 58."""

    def index(self, n):
        index = super().index(n)
        return index if len(index) == n else (index // 8 * 8).unique()


@fails("budget", says="copies of others")
class Copies(Plain):
    """The same, and all of them are sent."""

    def compress(self, image):
        index = self.index(len(image.features))
        return Compressed(image.features[index // 8 * 8 if self.keep < 1 else index])


@fails("budget", says="asked for")
class Unfair(Late):
    """All of a prompt's budget goes to its first image."""

    def retain(self, tokens):
        total = torch.tensor([[sum(resolve_keep(self.keep, n) for n in row)] for row in tokens.entered])
        return (tokens.image > 0) & ((tokens.image > 0).cumsum(1) <= total)


@fails("budget", says="4 kept of 2 asked for", after=Plain(keep=0.5))
class Lax(Late):
    """A later stage keeps more than it was asked to."""

    def retain(self, tokens):
        return tokens.top(self.score(tokens), min(2 * self.keep, 1.0))


@fails("budget", says="stage 2 (idle, before layer 2) acted on 0 of 3 prompts", after=Plain(keep=0.5))
class Idle(Late):
    """Trap 15: a stage does nothing, and no check notices."""

    def retain(self, tokens):
        return tokens.mask


@fails("batch")
class Neighbours(Plain):
    """Trap 6: the ranking of the first image is applied to all of the batch."""

    def compress_images(self, images):
        first = images[0].features.norm(dim=-1).argsort(descending=True)
        return [image.pick(first[: resolve_keep(self.keep, len(image.features))].sort().values) for image in images]


@fails("batch", "budget", may=tuple(CHECKS), says="NotImplementedError: batch size 1 only")
class Single(Plain):
    """Trap 6: a batch is refused. It is a finding, not a crash of the doctor."""

    def compress_images(self, images):
        if len(images) > 2:
            raise NotImplementedError("batch size 1 only")
        return super().compress_images(images)


@fails("batch", may=("keep-all",))
@dataclass
class Mixed(Plain):
    """The first image that it ever saw is added to all."""

    first: list = field(default_factory=list, repr=False)

    def compress(self, image):
        self.first.append(image.features.clone())
        return Compressed((image.features + 0.1 * self.first[0].mean(0))[self.index(len(image.features))])


@fails("batch", "padding")
class Absolute(Late):
    """Trap 5: places count from the start of the row, padding included."""

    def score(self, tokens):
        return torch.rand(4096, generator=torch.Generator().manual_seed(0))[tokens.origin]


@fails("memory", says="MiB of")
class Greedy(Plain):
    """Trap 22: what a selection needs is more than what it saves."""

    def compress(self, image):
        torch.ones(4096, 4096).sum()
        return super().compress(image)


@fails("attention", may=("memory",), says="made (1, ")
class Mapped(Late):
    """Traps 2 and 22: every row of the attention is computed to look at one."""

    def score(self, tokens):
        rows = torch.arange(tokens.mask.shape[1]).expand_as(tokens.mask)
        return super().score(tokens) + 0 * tokens.attention(rows)[:, 0, -1]


@fails("repeat", may=("batch", "padding", "cache", "answer"))
class Unseeded(Plain):
    """Trap 16: random numbers without a seed."""

    def index(self, n):
        return torch.randperm(n)[: resolve_keep(self.keep, n)].sort().values


@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_method_fails(report, name):
    method, checks, may, says = FAULTS[name]
    found = {finding.check: finding.note for finding in report.failures if finding.method == label(method)}
    assert {*checks} <= found.keys() <= {*checks, *may}
    assert says in found[checks[0]]


@dataclass
class Blank(Plain):
    """The same made-up token takes the place of some of an image's, `times` for each of its crops."""

    times: int = 1

    def compress(self, image):
        kept = image.features[self.index(len(image.features))].clone()
        if self.keep < 1:
            kept[: self.times * len(image.tower)] = 0.5
        return Compressed(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_are_made_alike_for_every_crop_are_no_copies(check, family):
    assert check("budget", Blank(), family).passed
    assert not check("budget", Blank(times=2), family).passed


@pytest.mark.parametrize(
    ("action", "says"),
    [
        (lambda image: image.pixels.zero_(), "edited pixel_values in place"),
        (lambda image: torch.rand(1), "torch"),
        (lambda image: torch.manual_seed(0), "torch"),
        (lambda image: np.random.seed(0), "numpy.random"),
        (lambda image: random.random(), "random"),
    ],
)
def test_what_a_run_may_not_touch(check, action, says):
    class Touching(Plain):
        def compress(self, image):
            kept = super().compress(image)
            action(image)
            return kept

    states = torch.get_rng_state(), random.getstate()
    outcome = check("repeat", Touching())
    assert not outcome.passed and says in outcome.note
    torch.set_rng_state(states[0])
    random.setstate(states[1])


# --- faults of `setup` ------------------------------------------------------------------------------------------------


def test_a_back_end_that_is_switched(failed):
    """Trap 2: eager attention is forced on the model to read its weights."""

    class Eager(Plain):
        def setup(self, model):
            model.set_attn_implementation("eager")

    found = failed(Eager())
    assert "back end changed to eager" in found["attention"]
    assert "without the patch, the model answers otherwise" in found["restore"]


def test_weights_that_are_changed(load):
    """The method that did it is named, and methods after it are not blamed for it."""

    class Edited(Plain):
        def setup(self, model):
            model.lm_head.weight.data.mul_(1.01)

    report = doctor.examine(*load(), [Edited(), "uniform"])
    assert {finding.method for finding in report.findings} == {str(Edited())}
    assert report.failures[-1].check == "restore" and "no other method was examined" in report.failures[-1].note


def test_a_setup_that_fails_is_a_finding(load):
    class Broken(Plain):
        def setup(self, model):
            model.extra = 1
            raise RuntimeError("no such layer")

    report = doctor.examine(*load(), [Broken(), "none"])
    (failure,) = report.failures
    assert (failure.check, failure.note) == ("patch", "RuntimeError: no such layer")
    assert len(report.findings) == 1 + len(CHECKS) and not report.passed


def test_a_method_that_nothing_asks_is_refused(load):
    """Trap 15: it has a budget and `retain`, but no `layers`."""

    @dataclass
    class NoLayers(Compressor):
        keep: int = 4

        def retain(self, tokens):
            return tokens.top(-tokens.origin.float(), self.keep)

    with pytest.raises(ValueError, match="overrides `retain` but has no `layers`"):
        doctor.examine(*load(), [NoLayers()])


# --- videos -----------------------------------------------------------------------------------------------------------


def of_videos(base):
    """Return a faulty method that treats pictures as `Plain` does: the fault shows in videos only."""

    class OfVideos(base):
        def compress(self, image):
            return super().compress(image) if image.video else Plain.compress(self, image)

    OfVideos.__qualname__ = f"{base.__name__}OfVideos"
    return OfVideos()


class Short(Plain):
    def compress(self, image):
        return image.pick(self.index(len(image.features))[: 1 if self.keep < 1 else None])


class Drifting(Plain):
    """It remembers, so that no prompt is answered twice alike."""

    calls: ClassVar = [0]

    def compress(self, image):
        self.calls[0] += 1
        kept = super().compress(image)
        return replace(kept, features=kept.vectors(image) * (1 + 0.01 * self.calls[0]))


def test_faults_that_only_a_video_shows(load):
    methods = [of_videos(base) for base in (Rescaled, Short, Drifting)]
    report = doctor.examine(*load("onevision"), methods)
    for method, checks in zip(
        methods, ({"keep-all"}, {"budget"}, {"batch", "padding", "cache", "repeat"}), strict=True
    ):
        assert checks <= {finding.check for finding in report.failures if finding.method == str(method)}
    report = doctor.examine(*load("next"), methods)
    assert not report.failures, str(report)


@dataclass
class Pictures(Plain):
    """It raises an error for videos."""

    error: Exception | None = None

    def compress(self, image):
        if image.video:
            raise self.error
        return super().compress(image)


@pytest.mark.parametrize("kind", [ValueError, NotImplementedError])
def test_a_method_that_takes_no_videos_says_so(load, kind):
    """That is not applicable, with its reason; pictures are examined all the same."""
    why = "this method ranks by CLS attention, which a pooled video frame has not"
    report = doctor.examine(*load("onevision"), [Pictures(error=kind(why)), "none"])
    assert not report.failures, str(report)
    first, *others = report.findings[: len(CHECKS)]
    assert (first.check, first.status, first.note) == ("video", "n/a", why)
    assert {finding.status for finding in others} == {"pass"}
    assert [receipt["prompts"] for receipt in report.receipts.values()] == [3, 4]


@pytest.mark.parametrize("error", [IndexError("index 9 is out of bounds"), ValueError("shapes do not match")])
def test_a_method_that_crashes_on_videos_fails_there_only(failed, error):
    assert failed(Pictures(error=error), "onevision") == {"video": f"{type(error).__name__}: {error}"}


def test_a_checkpoint_without_videos_gives_the_reason(load):
    (first, *_) = doctor.examine(*load("llava"), ["none"]).findings
    assert (first.check, first.status) == ("video", "n/a")
    assert first.note == "LlavaForConditionalGeneration takes no videos"
    model, processor = load("onevision")
    processor.video_processor = None
    report = doctor.examine(model, processor, ["none"])
    assert report.findings[0].note == "LlavaOnevisionProcessor was loaded without a video processor"
    assert report.passed
