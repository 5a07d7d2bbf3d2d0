"""The checks. Each compares two things that must be equal, and says how far apart they are.

The first line of a check's docstring is its claim. `docs/trust.md` names the real fault that each check finds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch

from vlmslim.compressor import Compressor
from vlmslim.cost.flops import DecoderShape, kv_bytes
from vlmslim.cost.memory import peak_memory
from vlmslim.doctor.prompts import LONG, VIDEO, why_no_video
from vlmslim.doctor.runs import (
    STEPS,
    ModelRun,
    RngGuard,
    UnpatchedRun,
    clone_sharing_weights,
    decode,
    difference,
    generate,
    shapes,
)
from vlmslim.evaluation.effect import check_effect
from vlmslim.patching import Slim
from vlmslim.registry import options_of

FACTOR = 10  # how many times the unpatched model's noise is tolerated where only rounding may differ
SLACK = 2**18  # bytes of peak memory, for index tensors; visible on models of a MiB only


class NotApplicable(Exception):
    """There is nothing to check; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """The measurement of one check.

    measured  : in `unit`
    tolerance : the largest value that passes
    note      : details, above all of a failure
    """

    measured: float
    tolerance: float
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """True if the difference is within the tolerance."""
        return self.measured <= self.tolerance


class Subject(ModelRun):
    """A model under one method, and what it is compared with.

    slim      : the patch
    unpatched : the run of the same model without a patch
    """

    def __init__(self, slim: Slim, unpatched: UnpatchedRun):
        super().__init__(slim.model, unpatched.prompts, unpatched.answer, clone_sharing_weights(slim.model))
        self.slim, self.unpatched = slim, unpatched

    @property
    def prunes(self) -> bool:
        """True if a stage drops tokens between decoder layers, where the last token of the prompt decides."""
        return any(stage.layers for stage in self.slim.stages)

    def rounding(self, difference: float) -> Outcome:
        """Judge a difference in logits where only rounding may differ."""
        return Outcome(difference, FACTOR * self.unpatched.noise, "logits")


def video(subject: Subject) -> Outcome:
    """Check that a video works, and so belongs to the prompts of all other checks, or is refused in words."""
    if not subject.prompts.videos:
        raise NotApplicable(why_no_video(subject.model, subject.prompts.processor))
    try:
        with torch.no_grad():
            logits = subject.model(**subject.prompts.inputs((VIDEO,)), use_cache=False).logits
    except (ValueError, NotImplementedError) as error:
        if re.search(r"\b(video|frame)s?\b", str(error), re.IGNORECASE):
            raise NotApplicable(str(error)) from error
        raise  # it crashed, or does not say that videos are the reason
    ((seen,),) = subject.slim.receipt.last.images
    return Outcome(int((~logits.isfinite()).sum()), 0, "logits", f"{seen.tokens} -> {seen.kept} visual tokens")


def budget(subject: Subject) -> Outcome:
    """Check that every stage keeps as many visual tokens of every image as asked, and sends no token twice."""
    notes, prefill = subject.together.notes, subject.together.prefill
    assert prefill is not None
    copies, sent = max(((sent.copies, len(sent)) for sent in notes.sent), default=(0, 0))
    if copies:
        return Outcome(copies, 0, "tokens", f"{copies} of the {sent} tokens sent of an image are copies of others")
    try:
        check_effect(subject.slim.receipt.summary())
    except RuntimeError as error:
        return Outcome(1, 0, "stages", str(error))
    counts: list[tuple[int, int | None]] = []  # of each image and stage: kept, asked for
    images = [image for row in prefill.images for image in row]
    for stage in subject.slim.stages:
        if not stage.layers:
            counts += [(image.kept, stage.method.requested(image.tokens)) for image in images]
        elif not notes.hides:
            stayed = notes.counts(stage.layers[-1], [len(row) for row in prefill.images])
            asked_for = [stage.method.requested(image.kept) for image in images]
            counts += zip(sum(stayed, []), asked_for, strict=True)
    known = [(count, asked) for count, asked in counts if asked is not None]
    if not known:
        raise NotApplicable("the method decides itself how many tokens stay")
    kept, asked = max(known, key=lambda pair: abs(pair[0] - pair[1]))
    return Outcome(abs(kept - asked), 0, "tokens", f"{kept} kept of {asked} asked for")


def batch(subject: Subject) -> Outcome:
    """Check that a batch is answered as each prompt by itself, under a method that has not seen the others."""
    return subject.rounding(subject.batch())


def padding(subject: Subject) -> Outcome:
    """Check that rows padded on the left give the logits of rows padded on the right."""
    return subject.rounding(subject.padding())


def reference(subject: Subject) -> Outcome:
    """Check every logit against another model, computed by hand layer by layer from the method's own answers."""
    stages = subject.slim.stages
    renumbered = any(s.acts_before_llm and s.method.positions == "renumbered" for s in stages)
    closing = {layer for s in stages if s.method.layer_positions == "renumbered" for layer in s.layers}
    differences = {}
    for row, alone in subject.alone.items():
        if alone.notes.hides:
            raise NotApplicable("the method is in training, and hides tokens instead of dropping them")
        if alone.prefill is not None:
            answer = subject.answer_of(row)
            places, logits = subject.unpatched.reference.logits(row, answer, alone.notes, renumbered, closing)
            differences[row] = difference(alone.logits[0][places], logits)
    outcome = subject.rounding(max(differences.values()))
    wrong = [f"prompt {row} {x:.2g}" for row, x in differences.items() if not x <= outcome.tolerance]
    return replace(outcome, note=", ".join(wrong))


def cache(subject: Subject) -> Outcome:
    """Check that decoding from the KV cache gives the logits of recomputing the whole sequence without one."""
    if subject.prunes:
        raise NotApplicable("the last token decides what stays, and in a longer sequence that is another token")
    return subject.rounding(subject.cache())


def positions(subject: Subject) -> Outcome:
    """Check that the rotary positions of an answer go on by one from the last token of the prompt, in every layer."""
    strayed, note = 0, ""
    for run in (subject.together, *subject.alone.values()):
        for step, noted in enumerate(run.positions):
            for found in noted:  # layers after drops that close gaps count from another place than those before
                stray = min(int((found - last - step).abs().max()) for last in run.positions[0])
                if stray > strayed:
                    strayed, note = stray, f"token {step} of an answer stands {stray} positions away from its place"
    return Outcome(strayed, 0, "positions", note)


def answer(subject: Subject) -> Outcome:
    """Check that the log-likelihood of a forced answer, at once or as labels, is that of its tokens one by one."""
    differences = {"at once": subject.at_once()}
    if not subject.prunes:
        differences["as labels"] = subject.as_labels()
    note = ", ".join(f"{name} {x:.2g}" for name, x in differences.items())
    return replace(subject.rounding(max(differences.values())), unit="nats", note=note)


def memory(subject: Subject) -> Outcome:
    """Check that the KV cache holds the tokens of the receipt, and peak memory is not above the unpatched model's.

    A patch may hold the pixels of a prompt on top, because methods read them, and Idefics3 makes a copy of them.
    """
    shape = DecoderShape.from_config(subject.model.config)
    held = expected = 0.0
    for alone in subject.alone.values():  # one by one, because the formula knows no padding
        if alone.prefill is not None:
            tokens = [alone.prefill.text[0] + visual + STEPS for (visual,) in alone.prefill.visual]
            held, expected = held + alone.kv_bytes, expected + kv_bytes(shape, tokens, subject.model.dtype.itemsize)
    if held != expected:
        note = f"the KV cache takes {held:.0f} bytes, the tokens of the receipt {expected:.0f}"
        return Outcome(abs(held - expected), 0, "bytes", note)
    if not subject.slim.receipt.had_effect:
        return Outcome(0, 0, "bytes", "no visual token was dropped, so there is no peak memory to save")
    inputs = subject.prompts.inputs()
    ours, plain = peak_memory(subject.model, inputs), subject.unpatched.peak
    pixels = sum(x.nbytes for x in inputs.values() if torch.is_tensor(x) and x.is_floating_point())
    note = f"{ours / 2**20:.1f} MiB of {plain / 2**20:.1f} MiB"
    return Outcome(ours / plain, 1 + (SLACK + pixels) / plain, "x", note)


def attention(subject: Subject) -> Outcome:
    """Check that no full attention map is made, and that the attention back end stays what it was."""
    inputs = subject.prompts.inputs((LONG,))
    plain, length = subject.unpatched.shapes, inputs["input_ids"].shape[1]
    if _maps(plain, {length}):
        raise NotApplicable("the unpatched model makes full maps itself; load it with a fused back end (sdpa) to see")
    made = shapes(subject.model, inputs) - plain
    maps = _maps(made, {length, *subject.slim.receipt.last.sequence})
    if any(sent.size is not None for sent in subject.together.notes.sent):
        maps = [shape for shape in maps if prod(shape[:-2]) > 1]  # merged tokens count by a mask, which is no map
    notes = [f"made {', '.join(map(str, maps[:3]))}"] if maps else []
    backend = subject.model.config.get_text_config()._attn_implementation
    if backend != subject.unpatched.backend:
        notes.append(f"the back end changed to {backend}")
    return Outcome(len(maps) + (backend != subject.unpatched.backend), 0, "maps", "; ".join(notes))


def _maps(shapes: set[tuple[int, ...]], lengths: set[int]) -> list[tuple[int, ...]]:
    """Return the shapes (..., n, n) with n in `lengths`."""
    return sorted(shape for shape in shapes if len(shape) > 1 and shape[-1] == shape[-2] and shape[-1] in lengths)


def repeat(subject: Subject) -> Outcome:
    """Check that the same prompts give the same logits twice; that they and all random generators stay the same."""
    inputs, guard, first = subject.prompts.inputs(), RngGuard(), subject.together.answer_logits
    with guard.watch():
        again, _ = decode(subject.model, inputs, subject.answer)
    edited = [name for name, x in subject.prompts.inputs().items() if not torch.equal(x, inputs[name])]
    touched = [f"edited {name} in place" for name in edited] + [f"drew from, or seeded, {name}" for name in guard.used]
    if touched:
        return Outcome(len(touched), 0, "changes", "; ".join(touched))
    return Outcome(difference(first, again[:, -STEPS - 1 :]), subject.unpatched.run_to_run_noise, "logits")


def keep_all(subject: Subject) -> Outcome:
    """Check that keeping everything gives the answers, logits and cache of the unpatched model."""
    slim, model, prompts, unpatched = subject.slim, subject.model, subject.prompts, subject.unpatched
    for stage in slim.stages:
        if stage.acts_before_llm and stage.name in slim.trained:
            raise NotApplicable(f"{stage.name} is trained to make tokens of its own, however many")
    assert subject.together.prefill is not None
    count = subject.together.prefill.images[0][0].tokens  # of the first row, which has one picture
    by_share, by_count = _keeping_share(slim.methods), _keeping_count(slim.methods, count)
    if by_share is None and by_count is None:
        raise NotApplicable(f"no budget keeps everything: neither keep=1.0 nor keep={count} is taken")
    slim.remove()
    pairs = []
    if by_share is not None:
        with Slim(model, by_share):
            pairs.append((generate(model, prompts.inputs()), unpatched.generated))
    if by_count is not None:
        with Slim(model, by_count):
            pairs.append((generate(model, prompts.inputs((0,))), unpatched.first_row))
    differences = {
        "answers": max(difference(ours.answers, plain.answers) for ours, plain in pairs),
        "logits": max(difference(ours.logits, plain.logits) for ours, plain in pairs),
        "cache": max(difference(ours.cache, plain.cache) for ours, plain in pairs),
    }
    notes = [f"{name} differ by {x:.3g}" for name, x in differences.items() if x > unpatched.run_to_run_noise]
    return Outcome(max(differences.values()), unpatched.run_to_run_noise, "logits", ", ".join(notes))


def _keeping_count(methods: list[Compressor], count: int) -> list[Compressor] | None:
    """Return the same methods, asked for all of an image's `count` tokens by number.

    None if no method has a budget, or a stage that decides itself would still drop some.
    """
    try:
        asked = [_with_keep(method, count) for method in methods if "keep" in options_of(method)]
        stages = [stage for method in asked for stage in method.stages()]
        return asked if asked and all(stage.requested(count) == count for stage in stages) else None
    except ValueError:
        return None  # it takes shares only


def _with_keep(method: Any, keep: int | float) -> Compressor:
    """Return the same method at another budget."""
    return replace(method, keep=keep)


def _keeping_share(methods: list[Compressor]) -> list[Compressor] | None:
    """Return the same methods at a budget of 1.0; None if one of them takes counts only.

    Raises:
        NotApplicable: one has no option `keep`.
    """
    try:
        return [_keeping_everything(method) for method in methods]
    except ValueError:
        return None


def _keeping_everything(method: Compressor) -> Compressor:
    """Return the same method at a budget of 1.0."""
    cls = type(method)
    if not method.acts_before_llm and cls.retain is Compressor.retain and cls.stages is Compressor.stages:
        return method  # it only counts
    if "keep" not in options_of(method):
        raise NotApplicable(f"{cls.__name__} has no option `keep`")
    return _with_keep(method, 1.0)


#: In this order: `video` decides what the others are given, and `keep-all` takes the patch off to put on its own.
CHECKS: dict[str, Callable[[Subject], Outcome]] = {
    "video": video,
    "budget": budget,
    "batch": batch,
    "padding": padding,
    "reference": reference,
    "cache": cache,
    "positions": positions,
    "answer": answer,
    "memory": memory,
    "attention": attention,
    "repeat": repeat,
    "keep-all": keep_all,
}
