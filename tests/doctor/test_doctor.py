"""The doctor: honest methods pass, and every planted fault is found by the check that is there for it.

The faults are those of released tools, by their number in docs/traps.md where they have one.
"""

import copy
import io
import json
import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from lmms_fixtures import FAMILIES, checkpoint
from rich.console import Console
from snapshots import changes, model_state, process_state
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

import vlmslim
from vlmslim import Compressor, doctor
from vlmslim.cli import app
from vlmslim.compressor import Compressed, resolve_keep
from vlmslim.doctor.checks import CHECKS, Subject
from vlmslim.doctor.prompts import LONG, LONG_TEXT, VIDEO, Prompts
from vlmslim.doctor.runs import UnpatchedRun, clone_sharing_weights, difference
from vlmslim.engine.entrance import Entrance
from vlmslim.engine.families import kv_cache
from vlmslim.engine.forward import Call
from vlmslim.engine.hooks import Hooks
from vlmslim.engine.layout import Layout, Segment, Selection
from vlmslim.loading import load as load_checkpoint
from vlmslim.methods.uniform import Uniform


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture
def load(folder):
    def load(family="llava", **options):
        path = checkpoint(family, folder)
        model = AutoModelForImageTextToText.from_pretrained(path, **options).eval()
        return model, AutoProcessor.from_pretrained(path)

    return load


@pytest.fixture
def failed(load):
    """The checks that a method fails, with their notes."""

    def failed(method, *family, **options) -> dict[str, str]:
        report = doctor.examine(*load(*family, **options), [method])
        assert [finding.check for finding in report.findings][: len(CHECKS)] == list(CHECKS)
        return {finding.check: finding.note for finding in report.failures}

    return failed


# --- honest methods ---------------------------------------------------------------------------------------------------


@dataclass
class Plain(Compressor):
    """Before the language model: tokens at even distances."""

    keep: int | float = 0.25

    def index(self, n):
        k = resolve_keep(self.keep, n)
        return torch.arange(k) * n // k

    def compress(self, image):
        return image.pick(self.index(len(image.features)))


@dataclass
class Fixed(Compressor):
    """Between layers, without a budget, and with layers that only the model tells."""

    def setup(self, model):
        self.layers = (len(model.model.language_model.layers) // 2,)

    def retain(self, tokens):
        return tokens.mask & (tokens.image == 0)


@dataclass
class Late(Compressor):
    """Between layers: the first tokens of each image."""

    layers: ClassVar = (2,)
    keep: int | float = 0.25

    def score(self, tokens):
        return -tokens.origin.float()

    def retain(self, tokens):
        return tokens.top(self.score(tokens), self.keep)


@pytest.mark.parametrize("family", FAMILIES)
def test_honest_methods_pass(load, family):
    model, processor = load(family)
    report = doctor.examine(
        model, processor, [Plain(), Late(), Fixed(), "none", "divprune", [{"method": "uniform", "keep": 0.5}, Late()]]
    )
    assert report.passed and not report.failures, str(report)
    given = {(finding.method, finding.check): finding.status for finding in report.findings}
    assert len(given) == 6 * len(CHECKS)
    skipped = {key for key, status in given.items() if status == "n/a"}
    late, both = "Late(keep=0.25)", "uniform-0.5+Late(keep=0.25)"
    fixed = {("Fixed()", check) for check in ("budget", "cache", "keep-all")}
    pictures_only = set() if family == "onevision" else {(method, "video") for method, _ in given}
    assert skipped == {(late, "cache"), (both, "cache")} | fixed | pictures_only
    assert report.receipts["Plain(keep=0.25)"]["kept"] < report.receipts["none"]["kept"]
    assert report.receipts["none"]["prompts"] == (4 if family == "onevision" else 3)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_passes(load, family):
    report = doctor.examine(*load(family))
    assert report.passed, str(report)
    assert {finding.method for finding in report.findings} == set(vlmslim.method_names())
    for finding in report.findings:
        if finding.check == "patch":
            assert finding.status == "n/a" and len(finding.note) > 20


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-llava", "tiny-llava-next"])
def test_every_method_passes_on_the_bundled_checkpoints(name):
    report = doctor.examine(*load_checkpoint(f"bundled/{name}", dtype="float32"))
    assert report.passed, str(report)
    assert {finding.method for finding in report.findings} == set(vlmslim.method_names())


def test_the_model_and_the_processor_are_left_alone(load):
    model, processor = load()
    doctor.examine(model, processor, ["none"])  # transformers sets a few things up in a first run
    before, around, tokenizer = model_state(model), process_state(model), repr(processor.tokenizer)
    doctor.examine(model, processor, ["uniform"])
    assert changes(before, model_state(model)) == changes(around, process_state(model)) == []
    assert repr(processor.tokenizer) == tokenizer


@pytest.mark.slow
def test_trained_methods_pass():
    saved = ["bundled/tiny-atp-16", "bundled/tiny-tokenflex"]
    report = doctor.examine(*load_checkpoint("bundled/tiny-llava", dtype="float32"), saved)
    assert report.passed, str(report)
    skipped = {finding.method for finding in report.findings if finding.check == "keep-all" and finding.status == "n/a"}
    assert len(skipped) == 2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_judged_by_its_own_noise(load, dtype):
    model, processor = load(dtype=dtype)
    report = doctor.examine(model, processor, [Plain(), Late()])
    assert not report.failures, str(report)
    assert report.noise > 1e-4


# --- planted faults ---------------------------------------------------------------------------------------------------


def test_keep_all_that_is_not_the_identity(failed):
    """A method that goes on working where there is nothing to do."""

    class Rescaled(Plain):
        def compress(self, image):
            kept = super().compress(image)
            return replace(kept, features=kept.vectors(image) * (1 + 1e-5))

    assert list(failed(Rescaled())) == ["keep-all"]


def test_a_budget_that_is_not_met(failed):
    """Trap 17: half-precision selection picked tokens twice, 44 distinct ones of 58."""

    class Twice(Plain):
        def index(self, n):
            index = super().index(n)
            return index if len(index) == n else (index // 8 * 8).unique()

    found = failed(Twice())
    assert list(found) == ["budget"] and "kept of 4 asked for" in found["budget"]


def test_a_budget_that_a_later_stage_does_not_meet(failed):
    class Lax(Late):
        def retain(self, tokens):
            return tokens.top(self.score(tokens), min(2 * self.keep, 1.0))

    found = failed([Plain(keep=0.5), Lax()])
    assert found == {"budget": "4 kept of 2 asked for"}


def test_a_stage_that_never_acts(failed):
    """Trap 15: the method does nothing, and nobody notices."""

    class Idle(Late):
        def retain(self, tokens):
            return tokens.mask

    found = failed([Plain(keep=0.5), Idle()])
    assert list(found) == ["budget"] and "stage 2 (idle, before layer 2) acted on 0 of 3 prompts" in found["budget"]


def test_a_method_that_nothing_asks_is_refused(load):
    @dataclass
    class NoLayers(Compressor):
        keep: int = 4

        def retain(self, tokens):
            return tokens.top(-tokens.origin.float(), self.keep)

    with pytest.raises(ValueError, match="overrides `retain` but has no `layers`"):
        doctor.examine(*load(), [NoLayers()])


def test_a_stage_that_decides_itself_and_drops_nothing_is_said(load):
    report = doctor.examine(*load(), [{"method": "drop_visual", "layer": 2, "tau": 0.0}, "none"])
    assert not report.failures
    (sentence,) = report.abstentions
    assert "stage 1 (drop_visual, before layer 2) acted on 0 of 3 prompts; it decides itself" in sentence
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report.render())
    assert sentence in str(report) and sentence in console.export_text()


def test_a_ranking_that_depends_on_the_neighbours(failed):
    """Trap 6: the ranking of the first image is applied to all of the batch."""

    class Neighbours(Plain):
        def compress_images(self, images):
            first = images[0].features.norm(dim=-1).argsort(descending=True)
            return [image.pick(first[: resolve_keep(self.keep, len(image.features))].sort().values) for image in images]

    assert list(failed(Neighbours())) == ["batch"]


def test_an_image_that_is_assumed_at_a_fixed_place(failed):
    """Trap 5: places count from the start of the row, padding included."""

    class Absolute(Late):
        def score(self, tokens):
            return torch.rand(4096, generator=torch.Generator().manual_seed(0))[tokens.origin]

    found = failed(Absolute())
    assert {"batch", "padding"} == set(found)


def test_positions_that_go_wrong_in_decoding(failed, monkeypatch):
    """Trap 7: the prompt is renumbered, but the answer goes on from the caller's positions."""
    describe = Call.describe

    def wrong(call, embeds, cache, mask, position):
        describe(call, embeds, cache, mask, position)
        if call.past:
            call.runs[0].tokens.position = call.runs[0].tokens.position + call.past.shift

    monkeypatch.setattr(Call, "describe", wrong)
    assert set(failed(Plain())) == {"reference", "cache", "answer"}


def test_decoding_that_goes_on_lower_by_the_dropped_tokens(failed, monkeypatch):
    """Trap 7: the prompt keeps its positions, but the answer goes on as if it had been renumbered.

    The first token of the answer is right, because it is predicted by the prompt.
    """
    describe = Call.describe

    def wrong(call, embeds, cache, mask, position):
        describe(call, embeds, cache, mask, position)
        if call.past:
            _, mask = call.past.masks[-1]
            call.runs[0].tokens.position = call.runs[0].tokens.position - (call.past.length - mask.shape[1])

    monkeypatch.setattr(Call, "describe", wrong)
    assert {"reference", "cache", "answer"} <= set(failed(Original()))
    assert "reference" in failed(Late())


def test_one_token_taken_to_mean_decoding(failed, monkeypatch):
    """Trap 29: several tokens behind a cached prompt are treated as if there were no cache."""
    describe = Call.describe

    def wrong(call, embeds, cache, mask, position):
        describe(call, embeds, cache, mask, position)
        if call.past and embeds.shape[1] > 1:
            call.runs[0].tokens.position = call.runs[0].tokens.position + call.past.shift

    monkeypatch.setattr(Call, "describe", wrong)
    found = failed(Plain())
    assert list(found) == ["answer"] and "at once" in found["answer"]


def test_masking_instead_of_removing(failed, monkeypatch):
    """Trap 9: tokens are hidden by the attention mask, but computed and cached."""

    def mask_only(self, keep, renumber=False):
        keep = keep & self.mask
        if (keep == self.mask).all():
            return None
        every = np.tile(np.arange(keep.shape[1]), (len(keep), 1))
        dropped = (self.mask ^ keep).sum(1, keepdims=True)
        layout = replace(self, mask=keep, source=every)
        return Selection(layout, every, every, keep.sum(1), dropped)

    monkeypatch.setattr(Layout, "select", mask_only)
    assert "KV cache takes" in failed(Plain())["memory"]


def test_keys_that_are_cached_twice(failed, monkeypatch):
    """Trap 1: a layer is run again for its attention, and appends to the cache again."""
    leave = Hooks._leave_lm

    def again(self, lm, args, output):
        output = leave(self, lm, args, output)
        if self.call.encoded and kv_cache(output) is not None:
            layer = kv_cache(output).layers[-1]
            layer.keys, layer.values = (torch.cat([x, x], dim=-2) for x in (layer.keys, layer.values))
        return output

    monkeypatch.setattr(Hooks, "_leave_lm", again)
    assert "KV cache takes" in failed(Plain())["memory"]


def test_memory_above_the_unpatched_model(failed):
    """Trap 22: what a selection needs is more than what it saves."""

    class Greedy(Plain):
        def compress(self, image):
            kept = super().compress(image)
            torch.ones(4096, 4096).sum()
            return kept

    found = failed(Greedy())
    assert list(found) == ["memory"] and "MiB of" in found["memory"]


def test_a_full_attention_map(failed):
    """Traps 2 and 22: every row of the attention is computed to look at one."""

    class Mapped(Late):
        def score(self, tokens):
            rows = torch.arange(tokens.mask.shape[1]).expand_as(tokens.mask)
            return super().score(tokens) + 0 * tokens.attention(rows)[:, 0, -1]

    found = failed(Mapped())
    assert "attention" in found and set(found) <= {"attention", "memory"}
    assert "made (1, " in found["attention"]


def test_a_back_end_that_is_switched(failed):
    """Trap 2: eager attention is forced on the model to read its weights."""

    class Eager(Plain):
        def setup(self, model):
            model.set_attn_implementation("eager")

    found = failed(Eager())
    assert "back end changed to eager" in found["attention"]
    assert "without the patch, the logits differ" in found["restore"]


def test_choices_that_cannot_be_repeated(failed):
    """Trap 16: random numbers without a seed."""

    class Unseeded(Plain):
        def index(self, n):
            return torch.randperm(n)[: resolve_keep(self.keep, n)].sort().values

    assert "repeat" in failed(Unseeded())


def test_weights_that_are_changed(load):
    """The method that did it is named, and methods after it are not blamed for it."""

    class Edited(Plain):
        def setup(self, model):
            model.lm_head.weight.data.mul_(1.01)

    report = doctor.examine(*load(), [Edited(), "uniform"])
    assert report.failures and all("Edited" in finding.method for finding in report.failures)
    assert report.failures[-1].check == "restore" and "the logits differ by" in report.failures[-1].note
    last = report.findings[-1]
    assert (last.method, last.status) == ("uniform", "n/a") and "Edited(keep=0.25) changed the model" in last.note


def test_a_mask_that_is_edited_in_place(failed, monkeypatch):
    """Trap 8: the attention mask belongs to the caller, who decodes with it. A plan on the cache hides it."""
    enter = Hooks._enter_lm

    def edit(self, lm, args, kwargs):
        if self.call.encoded and kwargs["attention_mask"] is not None:
            whole = kwargs["attention_mask"].clone()
            kwargs["attention_mask"][:, 2:4] = 0
            kwargs["attention_mask"] = whole
        return enter(self, lm, args, kwargs)

    monkeypatch.setattr(Hooks, "_enter_lm", edit)
    assert "keep-all" in failed(Plain())


def test_a_method_that_fails(failed):
    """Trap 6: a batch is refused. It is a finding, not a crash of the doctor."""

    class Single(Plain):
        def compress_images(self, images):
            if len(images) > 2:
                raise NotImplementedError("batch size 1 only")
            return super().compress_images(images)

    found = failed(Single())
    assert found["batch"] == "NotImplementedError: batch size 1 only"
    assert not {"reference", "attention"} & set(found)


# --- the engine against an independent computation -------------------------------------------------------------------


@pytest.fixture
def seen(load):
    """Return a function that makes one check of a method."""

    def seen(check, method, family="llava"):
        model, processor = load(family)
        unpatched = UnpatchedRun(clone_sharing_weights(model), Prompts(model, processor))
        with vlmslim.patch(model, method) as slim:
            return CHECKS[check](Subject(slim, unpatched))

    return seen


def wraps(owner, name):
    """A fault of the engine: a function of (original, self, *arguments) in place of the method `name`."""

    def fault(change):
        def plant(monkeypatch):
            original = vars(owner)[name]
            monkeypatch.setattr(owner, name, lambda self, *args, **kwargs: change(original, self, *args, **kwargs))

        return plant

    return fault


def of_features(edit):
    @wraps(Entrance, "_close_gaps")
    def plant(original, self, call, layout, embeds, placed, is_text, results):
        if sum(map(len, results)) < sum(len(image.columns) for image in placed):
            pairs = zip(placed, results, strict=True)
            results = edit([Compressed(x.vectors(image.tokens), x.index) for image, x in pairs])
        return original(self, call, layout, embeds, placed, is_text, results)

    return plant


def edited(edit):
    return of_features(lambda results: [Compressed(edit(x.features), x.index) for x in results])


@wraps(Call, "describe")
def late_positions(original, self, embeds, cache, mask, position):
    original(self, embeds, cache, mask, position)
    if self.past and self.past.length > LONG_TEXT:
        self.runs[0].tokens.position = self.runs[0].tokens.position + 7


@wraps(Segment, "restore")
def early_logits(original, self, hidden):
    restored = original(self, hidden).clone()
    restored[:, : restored.shape[1] - 24 if self.shortened else 0] = 0
    return restored


@wraps(Layout, "select")
def other_columns(original, self, keep, renumber=False):
    selection = original(self, keep, renumber)
    if selection is not None:
        visual = selection.layout.image > 0
        selection.index[visual] += 1
    return selection


@wraps(Layout, "select")
def text_one_further(original, self, keep, renumber=False):
    selection = original(self, keep, renumber)
    if selection is not None:
        selection.layout.position[selection.dropped[:, 0] > 0, -5:] += 1
        selection.dropped[selection.dropped > 0] -= 1  # the answer goes on from there
    return selection


@wraps(Layout, "select")
def first_text_token_dropped(original, self, keep, renumber=False):
    keep = keep.copy()
    for row, first in enumerate(self.mask.argmax(1)):
        gone = (self.image[row] > 0) & ~keep[row]
        if gone.any():
            keep[row, first], keep[row, gone.argmax()] = False, True
    return original(self, keep, renumber)


@wraps(Hooks, "_leave_lm")
def values_lost(original, self, lm, args, output):
    call = self.call
    output = original(self, lm, args, output)
    if call.encoded and kv_cache(output) is not None and (tokens := call.runs[-1].tokens).shortened:
        layer = kv_cache(output).layers[-1]
        layer.values = layer.values * torch.from_numpy(tokens.layout.image == 0)[:, None, :, None]
    return output


@wraps(Hooks, "_enter_layer")
def dense_rope(original, self, i, layer, args, kwargs):
    done = original(self, i, layer, args, kwargs)
    if done is not None and self.call.encoded and self.call.run(i) is not self.call.runs[0]:
        dense = (self.call.run(i).tokens.mask.long().cumsum(1) - 1).clamp(min=0)
        done[1]["position_embeddings"] = self.lm.rotary_emb(done[0][0], position_ids=dense)
    return done


@dataclass
class Original(Plain):
    positions: str = "original"


def swapped(results):
    return [Compressed(x.features, x.index) for x in results[::-1]]


ENGINE_FAULTS = {
    "images are swapped": (
        of_features(lambda results: [Compressed(x.features, x.index) for x in results[::-1]]),
        Plain(),
    ),
    "tokens in reverse": (edited(lambda x: x.flip(0)), Plain()),
    "tokens scaled": (edited(lambda x: 1.001 * x), Plain()),
    "tokens rounded": (edited(lambda x: x.bfloat16().float()), Original()),
    "positions behind a picture": (text_one_further, Plain()),
    "positions behind a long prompt": (late_positions, Plain()),
    "logits early in the prompt": (early_logits, Plain()),
    "other tokens gathered": (other_columns, Late()),
    "text dropped between layers": (first_text_token_dropped, Late()),
    "values lost after the prefill": (values_lost, Late()),
    "rotary embeddings of the prefill": (dense_rope, Late()),
}


@pytest.mark.parametrize("name", ENGINE_FAULTS)
def test_faults_that_only_the_reference_shows(seen, monkeypatch, name):
    plant, method = ENGINE_FAULTS[name]
    plant(monkeypatch)
    outcome = seen("reference", method)
    assert not outcome.passed and outcome.measured > 2 * outcome.tolerance and "prompt" in outcome.note


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_agrees_with_honest_methods(seen, family):
    for method in (Original(), [Original(keep=0.5), Late()], {"method": "pool", "keep": 0.25}):
        assert seen("reference", method, family).passed


# --- budgets, memories, generators ------------------------------------------------------------------------------------


@dataclass
class Unfair(Late):
    """All of a prompt's budget goes to its first image."""

    def retain(self, tokens):
        total = torch.tensor([[sum(resolve_keep(self.keep, n) for n in row)] for row in tokens.entered])
        return (tokens.image > 0) & ((tokens.image > 0).cumsum(1) <= total)


@dataclass
class Copies(Plain):
    """Tokens are sent several times, and nothing is said about their slots."""

    def compress(self, image):
        index = self.index(len(image.features))
        return Compressed(image.features[index // 8 * 8 if self.keep < 1 else index])


@dataclass
class Blank(Plain):
    """The same made-up token takes the place of some of an image's, `times` for each of its crops."""

    times: int = 1

    def compress(self, image):
        kept = image.features[self.index(len(image.features))].clone()
        if self.keep < 1:
            kept[: self.times * len(image.tower)] = 0.5
        return Compressed(kept)


def test_budgets_that_are_met_in_sum_only(seen):
    assert not seen("budget", Unfair()).passed
    outcome = seen("budget", Copies())
    assert not outcome.passed and "copies of others" in outcome.note


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_that_are_made_alike_for_every_crop_are_no_copies(seen, family):
    assert seen("budget", Blank(), family).passed
    assert not seen("budget", Blank(times=2), family).passed


@dataclass
class Mixed(Plain):
    """The first image is added to all."""

    first: list = field(default_factory=list, repr=False)

    def compress(self, image):
        self.first.append(image.features.clone())
        return Compressed((image.features + 0.1 * self.first[0].mean(0))[self.index(len(image.features))])


def test_a_method_that_remembers_another_prompt(seen):
    assert not seen("batch", Mixed()).passed


def with_call(action):
    """A method that does something besides for every image."""

    class Calling(Plain):
        def compress(self, image):
            kept = super().compress(image)
            action(image)
            return kept

    return Calling()


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
def test_what_a_run_may_not_touch(seen, action, says):
    state = torch.get_rng_state(), random.getstate()
    outcome = seen("repeat", with_call(action))
    assert not outcome.passed and says in outcome.note
    torch.set_rng_state(state[0])
    random.setstate(state[1])


def test_a_fault_that_only_a_count_of_everything_shows(failed):
    class Number(Plain):
        def compress(self, image):
            kept = super().compress(image)
            if isinstance(self.keep, int):
                kept.features = 1.5 * kept.vectors(image)
            return kept

    assert list(failed(Number())) == ["keep-all"]


def test_a_setup_that_fails_is_a_finding(load):
    class Broken(Plain):
        def setup(self, model):
            model.extra = 1
            raise RuntimeError("no such layer")

    report = doctor.examine(*load(), [Broken(), "none"])
    (failure,) = report.failures
    assert (failure.check, failure.note) == ("patch", "RuntimeError: no such layer")
    assert len(report.findings) == 1 + len(CHECKS) and not report.passed


# --- videos ----------------------------------------------------------------------------------------------------------


def of_videos(base):
    """A faulty method, as `Plain` for pictures: the fault shows in videos only."""

    class OfVideos(base):
        def compress(self, image):
            return super().compress(image) if image.video else Plain.compress(self, image)

    return OfVideos()


class Rescaling(Plain):
    def compress(self, image):
        kept = super().compress(image)
        kept.features = kept.vectors(image) * (1 + 1e-5)
        return kept


class Short(Plain):
    def compress(self, image):
        return image.pick(self.index(len(image.features))[: 1 if self.keep < 1 else None])


class Drifting(Plain):
    """It remembers, so that no prompt is answered twice alike."""

    calls: ClassVar = [0]

    def compress(self, image):
        self.calls[0] += 1
        kept = super().compress(image)
        kept.features = kept.vectors(image) * (1 + 0.01 * self.calls[0])
        return kept


def test_faults_that_only_a_video_shows(load):
    expected = {Rescaling: {"keep-all"}, Short: {"budget"}, Drifting: {"batch", "padding", "cache", "repeat"}}
    for fault, checks in expected.items():
        label = str(of_videos(fault))
        assert checks <= {f.check for f in doctor.examine(*load("onevision"), [of_videos(fault)]).failures}, label
    report = doctor.examine(*load("next"), [of_videos(fault) for fault in expected])
    assert not report.failures, str(report)


def test_positions_of_a_video_that_go_wrong_in_decoding(failed, monkeypatch):
    """Trap 7, in rows with a video."""
    describe = Call.describe

    def wrong(call, embeds, cache, mask, position):
        describe(call, embeds, cache, mask, position)
        if call.past and len(call.past.shift) > 3:
            shift = call.past.shift.clone()
            shift[:3] = 0
            call.runs[0].tokens.position = call.runs[0].tokens.position + shift

    monkeypatch.setattr(Call, "describe", wrong)
    assert {"cache", "answer"} <= set(failed(Plain(), "onevision"))


@dataclass
class Pictures(Plain):
    """It raises an error for videos."""

    error: Exception = None

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


# --- the instruments --------------------------------------------------------------------------------------------------


def test_prompts(load):
    for family in FAMILIES:
        model, processor = load(family)
        videos = family == "onevision"
        prompts = Prompts(model, processor, videos)
        image = model.config.image_token_id
        media = torch.tensor([image, getattr(model.config, "video_token_id", image)])
        left, right = prompts.inputs(), prompts.inputs(side="right")
        assert left["input_ids"].shape == right["input_ids"].shape
        assert left["attention_mask"][:, -1].all() and right["attention_mask"][:, 0].all()
        assert not left["attention_mask"].all() and not right["attention_mask"].all()
        shown = [prompts.batch[i] for i, row in enumerate(left["input_ids"]) if torch.isin(row, media).any()]
        assert tuple(shown) == prompts.pictured and len(prompts.pictured) < len(prompts.batch)
        assert ("pixel_values_videos" in left) == videos == (VIDEO in prompts.batch)
        if videos:
            frames = left["pixel_values_videos"][0]
            assert len(frames) == 3 and all((a - b).abs().max() > 0.1 for a, b in zip(frames, frames[1:], strict=False))
        long = prompts.inputs((LONG,))["input_ids"]
        assert int((long != image).sum()) >= LONG_TEXT
        prompts.inputs()["attention_mask"].zero_()
        assert torch.equal(prompts.inputs()["attention_mask"], left["attention_mask"])


def test_differences():
    one, nan = torch.ones(2), torch.tensor([1.0, float("nan")])
    assert difference(one, one) == 0
    assert difference(one, 3 * one) == 2
    assert difference(nan, nan) == float("inf")
    assert difference(one, torch.ones(3)) == float("inf")


# --- what is refused, and the command ---------------------------------------------------------------------------------


def test_refusals(load):
    model, processor = load()
    with pytest.raises(ValueError, match="divprun"):
        doctor.examine(model, processor, ["divprun"])
    with pytest.raises(ValueError, match="training mode"):
        doctor.examine(model.train(), processor, ["none"])
    model.eval()
    broken = copy.deepcopy(model)
    broken.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="logits in torch.float32 are not all finite.*another dtype"):
        doctor.examine(broken, processor, ["none"])  # differences to it are no numbers: everything would pass
    processor.tokenizer.pad_token = None
    with pytest.raises(ValueError, match="pad_token"):
        doctor.examine(model, processor, ["none"])
    with pytest.raises(TypeError, match="cannot patch"):
        doctor.examine(torch.nn.Linear(1, 1), processor, ["none"])


def test_an_empty_report_has_not_passed(load):
    report = doctor.examine(*load(), [])
    assert not report.passed


def test_a_narrow_terminal_shows_every_method_and_check():
    names = ["bipartite_merge", "divprune(keep=128) + fastv(keep=64)"]
    report = doctor.Report({"checkpoint": "x", "dtype": "float32", "device": "cpu", "attention": "sdpa"}, 1e-5, 10)
    report.findings = [doctor.Finding(name, check, "pass") for name in names for check in CHECKS]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(report.render())
    rows = [line for line in console.export_text().splitlines() if "✓" in line]
    assert [line.count("✓") for line in rows] == [len(CHECKS)] * 2
    assert all(line.startswith(name) for line, name in zip(rows, names, strict=True))


def test_methods_on_the_command_line(tmp_path):
    assert doctor.parse("none", 0.5) == [{"method": "none"}]
    assert doctor.parse("divprune", 0.5) == [{"keep": 0.5, "method": "divprune"}]
    assert doctor.parse("divprune:keep=9+fastv:layer=3", 4) == [
        {"keep": 9, "method": "divprune"},
        {"keep": 4, "method": "fastv", "layer": 3},
    ]
    for saved in (str(tmp_path), "bundled/tiny-atp-16"):
        assert doctor.parse(saved, 0.5) == saved
    with pytest.raises(ValueError, match="divprune"):
        doctor.parse("divprun", 0.5)


def test_the_command(folder, monkeypatch):
    path = checkpoint("llava", folder)
    runner = CliRunner()
    done = runner.invoke(app, ["doctor", path, "-m", "uniform:keep=4", "--device", "cpu"])
    assert done.exit_code == 0, done.output
    for text in (*CHECKS, "uniform-4", "16.0 -> 4.0", "0 failed", "10 checks passed"):
        assert text in done.output
    compress = Uniform.compress

    def wrong(self, image):
        kept = compress(self, image)
        kept.features = kept.vectors(image) * 1.00001
        return kept

    monkeypatch.setattr(Uniform, "compress", wrong)
    done = runner.invoke(app, ["doctor", path, "-m", "uniform", "-m", "none", "--json", "--device", "cpu"])
    assert done.exit_code == 1, done.output
    read = json.loads(done.stdout)
    assert read["passed"] is False and read["model"]["dtype"] == "float32" and read["noise"] > 0
    (failure,) = (finding for finding in read["findings"] if finding["status"] == "fail")
    assert failure["method"] == "uniform-0.25" and failure["check"] == "keep-all"
    assert failure["measured"] > failure["tolerance"] == 0


@pytest.mark.slow
def test_a_saved_patch_is_examined_on_its_checkpoint():
    done = CliRunner().invoke(app, ["doctor", "bundled/tiny-tokenflex", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    read = json.loads(done.stdout)
    assert {finding["method"] for finding in read["findings"]} == {"bundled/tiny-tokenflex"}
    assert read["model"]["checkpoint"].endswith("tiny-llava")


def test_a_package_that_a_method_lacks_is_told(folder, monkeypatch):
    def lacking(self, model):
        raise ImportError("recoverable needs open_clip: pip install open_clip_torch")

    monkeypatch.setattr(Uniform, "setup", lacking)
    done = CliRunner().invoke(app, ["doctor", checkpoint("llava", folder), "-m", "uniform", "--device", "cpu"])
    assert done.exit_code == 2 and "pip install open_clip_torch" in done.output


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["bundled/nothing"], "no bundled checkpoint"),
        (["bundled/tiny-llava", "-m", "fastv:layer"], "option=value"),
        (["bundled/tiny-llava", "--dtype", "float33"], "float32, bfloat16"),
        (["bundled/tiny-llava", "--device", "foo"], "device='foo': there is no such device"),
        (["bundled/tiny-llava", "--keep", "inf"], "keep=inf"),
        (["bundled/tiny-llava", "--keep", "145"], "has 144 visual tokens"),
        (["bundled/tiny-llava", "-m", "uniform:keep=145"], "has 144 visual tokens"),
    ],
)
def test_wrong_commands(arguments, says):
    done = CliRunner().invoke(app, ["doctor", "--device", "cpu", *arguments])
    assert done.exit_code == 2, done.output
    assert says in done.output
