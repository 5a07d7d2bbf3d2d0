"""Planted faults: each is found by the check that is there for it.

The faults are those of released tools, by their number in docs/traps.md where they have one.
"""

import random
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar

import numpy as np
import pytest
import torch
from doctor_methods import Late, Original, Plain
from lmms_fixtures import FAMILIES

from vlmslim import Compressor, doctor
from vlmslim.compressor import Compressed, resolve_keep
from vlmslim.doctor.checks import CHECKS
from vlmslim.doctor.prompts import LONG_TEXT
from vlmslim.engine.entrance import Entrance
from vlmslim.engine.families import kv_cache
from vlmslim.engine.forward import Call
from vlmslim.engine.hooks import Hooks
from vlmslim.engine.layout import Layout, Segment, Selection
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
    """Trap 15: a stage does nothing, and nobody notices."""

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


# --- faults of the engine ---------------------------------------------------------------------------------------------


ENGINE_FAULTS = {}  # by name: class and method of the engine, what takes its place, a method, the checks that fail


def engine_fault(owner: type, name: str, method: Compressor, *checks: str, called: str = ""):
    """Note which checks fail if the decorated function of (original, self, *arguments) takes the place of `name`."""

    def note(change):
        ENGINE_FAULTS[called or change.__name__] = owner, name, change, method, checks
        return change

    return note


def shift_positions(call: Call, by) -> None:
    call.runs[0].tokens.position = call.runs[0].tokens.position + by


@engine_fault(Call, "describe", Plain(), "reference", "cache", "positions", "answer")
def the_answer_goes_on_at_the_callers_positions(original, self, *sent):
    """Trap 7: the prompt is renumbered, the answer is not."""
    original(self, *sent)
    if self.past:
        shift_positions(self, self.past.shift)


@engine_fault(Call, "describe", Late(), "reference", "positions", called="the_same_after_drops_between_layers")
@engine_fault(Call, "describe", Original(), "reference", "cache", "positions", "answer")
def the_answer_goes_on_lower_by_the_dropped_tokens(original, self, *sent):
    """Trap 7: the prompt keeps its positions, but the answer goes on as if it had been renumbered.

    The first token of the answer is right, because the prompt predicts it. A check of the prefill, or of answers of one
    token, passes.
    """
    original(self, *sent)
    if self.past:
        _, mask = self.past.masks[-1]
        shift_positions(self, mask.shape[1] - self.past.length)


@engine_fault(Call, "describe", Plain(), "reference", "positions")
def positions_after_a_long_prompt(original, self, *sent):
    original(self, *sent)
    if self.past and self.past.length > LONG_TEXT:
        shift_positions(self, 7)


@engine_fault(Layout, "select", Plain(), "memory")
def tokens_are_masked_and_not_removed(original, self, keep, renumber=False, counts=None):
    """Trap 9: tokens are hidden by the attention mask, but computed and cached."""
    keep = keep & self.mask
    if torch.equal(keep, self.mask):
        return None
    every = torch.arange(keep.shape[1]).expand(keep.shape)
    dropped = (self.mask ^ keep).sum(1, keepdim=True)
    layout = replace(self, mask=keep, source=every, counts=keep.sum(1).tolist())
    return Selection(layout, every, every, dropped)


@engine_fault(Hooks, "_leave_lm", Plain(), "memory")
def keys_are_cached_twice(original, self, lm, args, output):
    """Trap 1: a layer is run again for its attention, and appends to the cache again."""
    output = original(self, lm, args, output)
    if self.call.encoded and kv_cache(output) is not None:
        layer = kv_cache(output).layers[-1]
        layer.keys, layer.values = (torch.cat([x, x], dim=-2) for x in (layer.keys, layer.values))
    return output


@engine_fault(Hooks, "_enter_lm", Plain(), "keep-all")
def the_callers_mask_is_edited(original, self, lm, args, kwargs):
    """Trap 8: the attention mask belongs to the caller, who decodes with it. A plan on the cache hides it."""
    if self.call.encoded and kwargs["attention_mask"] is not None:
        whole = kwargs["attention_mask"].clone()
        kwargs["attention_mask"][:, 2:4] = 0
        kwargs["attention_mask"] = whole
    return original(self, lm, args, kwargs)


def change_features(edit, original, self, call, layout, embeds, placed, is_text, results):
    """Edit the tokens that the images send, if some are dropped: `edit` gets and returns one tensor for each image."""
    if sum(map(len, results)) < sum(len(image.columns) for image in placed):
        features = edit([x.vectors(image.tokens) for image, x in zip(placed, results, strict=True)])
        results = [Compressed(vectors, x.index) for vectors, x in zip(features, results, strict=True)]
    return original(self, call, layout, embeds, placed, is_text, results)


for called, edit, method in (
    ("images_are_swapped", lambda features: features[::-1], Plain()),
    ("tokens_come_in_reverse", lambda features: [x.flip(0) for x in features], Plain()),
    ("tokens_are_scaled", lambda features: [1.001 * x for x in features], Plain()),
    ("tokens_are_rounded", lambda features: [x.bfloat16().float() for x in features], Original()),
):
    engine_fault(Entrance, "_close_gaps", method, "reference", called=called)(partial(change_features, edit))


@engine_fault(Layout, "select", Plain(), "reference")
def positions_after_a_picture(original, self, *given):
    selection = original(self, *given)
    if selection is not None:
        selection.layout.position[selection.shift[:, 0] > 0, -5:] += 1
        selection.shift[selection.shift > 0] -= 1  # the answer goes on from there
    return selection


@engine_fault(Segment, "restore", Plain(), "reference")
def logits_early_in_the_prompt(original, self, hidden):
    restored = original(self, hidden).clone()
    restored[:, : restored.shape[1] - 24 if self.shortened else 0] = 0
    return restored


@engine_fault(Layout, "select", Late(), "reference")
def other_tokens_are_gathered(original, self, *given):
    selection = original(self, *given)
    if selection is not None:
        selection.index[selection.layout.image > 0] += 1
    return selection


@engine_fault(Layout, "select", Late(), "reference")
def text_is_dropped_between_layers(original, self, keep, *given):
    keep = keep.clone()
    for row, first in enumerate(self.mask.byte().argmax(1)):
        gone = (self.image[row] > 0) & ~keep[row]
        if gone.any():
            keep[row, first], keep[row, gone.byte().argmax()] = False, True
    return original(self, keep, *given)


@engine_fault(Hooks, "_leave_lm", Late(), "reference")
def values_are_lost_after_the_prefill(original, self, lm, args, output):
    call = self.call
    output = original(self, lm, args, output)
    if call.encoded and kv_cache(output) is not None and (tokens := call.runs[-1].tokens).shortened:
        layer = kv_cache(output).layers[-1]
        layer.values = layer.values * (tokens.layout.image == 0)[:, None, :, None]
    return output


@engine_fault(Hooks, "_enter_layer", Late(), "reference")
def rotary_embeddings_of_the_prefill(original, self, i, layer, args, kwargs):
    done = original(self, i, layer, args, kwargs)
    if done is not None and self.call.encoded and self.call.run(i) is not self.call.runs[0]:
        dense = (self.call.run(i).tokens.mask.long().cumsum(1) - 1).clamp(min=0)
        done[1]["position_embeddings"] = self.lm.rotary_emb(done[0][0], position_ids=dense)
    return done


@pytest.mark.parametrize("name", ENGINE_FAULTS)
def test_a_faulty_engine_fails(check, unpatched, monkeypatch, name):
    owner, attribute, change, method, checks = ENGINE_FAULTS[name]
    original = vars(owner)[attribute]
    unpatched("llava")
    monkeypatch.setattr(owner, attribute, lambda self, *args, **kwargs: change(original, self, *args, **kwargs))
    for each in checks:
        outcome = check(each, method)
        assert not outcome.passed and outcome.measured > 2 * outcome.tolerance, each
        assert each != "reference" or "prompt" in outcome.note
        assert each != "positions" or "away from its place" in outcome.note
        assert each != "memory" or "the KV cache takes" in outcome.note


def test_one_token_taken_to_mean_decoding(failed, monkeypatch):
    """Trap 29: several tokens after a cached prompt are treated as if there were no cache."""
    describe = Call.describe

    def wrong(self, embeds, *sent):
        describe(self, embeds, *sent)
        if self.past and embeds.shape[1] > 1:
            shift_positions(self, self.past.shift)

    monkeypatch.setattr(Call, "describe", wrong)
    found = failed(Plain())
    assert list(found) == ["answer"] and "at once" in found["answer"]


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


def test_positions_of_a_video_that_go_wrong_in_decoding(failed, monkeypatch):
    """Trap 7, in rows with a video."""
    describe = Call.describe

    def wrong(self, *sent):
        describe(self, *sent)
        if self.past and len(self.past.shift) > 3:
            shift = self.past.shift.clone()
            shift[:3] = 0
            shift_positions(self, shift)

    monkeypatch.setattr(Call, "describe", wrong)
    assert {"cache", "answer"} <= set(failed(Plain(), "onevision"))


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
