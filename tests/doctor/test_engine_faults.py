"""Planted faults of the engine: each is found by the check that is there for it.

The faults are those of released tools, by their number in docs/traps.md where they have one.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from doctor_methods import Late, Original, Plain

from vlmslim import Compressor
from vlmslim.compressor import Compressed
from vlmslim.doctor.prompts import LONG_TEXT
from vlmslim.engine.entrance import Entrance
from vlmslim.engine.families import kv_cache
from vlmslim.engine.forward import Call
from vlmslim.engine.hooks import Hooks
from vlmslim.engine.layout import Layout, Segment, Selection

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
