"""The checks: each compares two things that must be alike, and says how far apart they are.

The first line of a check's docstring is what it claims; `docs/trust.md` says which real fault each one is there for.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from vlmslim.compressor import Compressor
from vlmslim.cost.flops import DecoderShape, kv_bytes
from vlmslim.cost.memory import cache_bytes, peak_memory
from vlmslim.doctor.pristine_copy import Fresh, twin_of
from vlmslim.doctor.prompts import LONG, VIDEO, Prompts, why_no_video
from vlmslim.doctor.receipt_audit import Told, counted
from vlmslim.doctor.reference import Notes, Reference, noted
from vlmslim.doctor.runs import (
    STEPS,
    Baseline,
    decode,
    difference,
    generate,
    likelihood,
    loss,
    recompute,
    shapes,
    singles,
    tails,
)
from vlmslim.doctor.snapshots import Dice, Snapshot, anatomy, surroundings
from vlmslim.engine.families import kv_cache
from vlmslim.patching import Slim
from vlmslim.receipt import Prefill
from vlmslim.registry import name_of

FACTOR = 10  # how many times the noise of the unpatched model a patched one may differ from itself
SLACK = 2**18  # bytes of peak memory: seen on models of a MiB only


class NotApplicable(Exception):
    """There is nothing to check; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """measured, tolerance : of what `unit` says; note : details, above all of a failure."""

    measured: float
    tolerance: float
    unit: str
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the difference is within the tolerance."""
        return self.measured <= self.tolerance


@dataclass
class Patient:
    """One model under one method.

    slim     : the patch
    prompts  : what the model is given
    baseline : what the model does without the patch
    twin     : what another model of the same classes does, which nobody patches
    before   : the model, and what it shares with others, without the patch
    """

    slim: Slim
    prompts: Prompts
    baseline: Baseline
    twin: Reference
    before: tuple[Snapshot, Snapshot]
    whole: bool = False  # `restore` has found the model as it was

    @property
    def model(self) -> nn.Module:
        """The model in question."""
        return self.slim.model

    @property
    def before_llm(self) -> Compressor | None:
        """The method that works before the language model."""
        return next((stage.method for stage in self.slim.stages if stage.acts_before_llm), None)

    @property
    def early(self) -> bool:
        """Whether the method works before the language model only: what it keeps does not hang on the last token."""
        return not any(stage.layers for stage in self.slim.stages)

    def __post_init__(self):
        self.fresh = Fresh(self.slim)

    @cached_property
    def first(self) -> tuple[Tensor, Prefill, Notes]:
        """The patched model's logits of the whole batch, decoded token by token; the prefill, and what was answered."""
        with noted(self.slim) as notes:
            logits = decode(self.model, self.prompts.inputs(), self.baseline.answer)
        return logits, self.slim.receipt.last, notes

    @property
    def decoded(self) -> Tensor:
        """The logits of `first`."""
        return self.first[0]

    @property
    def tolerance(self) -> float:
        """In logits, where only rounding may differ."""
        return FACTOR * self.baseline.noise


def look(model: nn.Module) -> tuple[Snapshot, Snapshot]:
    """The model, and what it shares with others."""
    return anatomy(model), surroundings(model)


def video(patient: Patient) -> Outcome:
    """It takes a video, which is then among the prompts of all other checks; or it says that it takes none."""
    if not patient.prompts.videos:
        raise NotApplicable(why_no_video(patient.model, patient.prompts.processor))
    try:
        ours = tails(patient.model, patient.prompts.inputs((VIDEO,)))
    except (ValueError, NotImplementedError) as error:
        if re.search(r"\b(video|frame)s?\b", str(error), re.IGNORECASE):
            raise NotApplicable(str(error)) from error
        raise  # it crashed, or does not say that videos are the reason
    ((seen,),) = patient.slim.receipt.last.images
    patient.slim.reset_receipt()
    wrong = sum(int((~x.isfinite()).sum()) for x in ours)
    return Outcome(wrong, 0, "logits", f"{seen.tokens} -> {seen.kept} visual tokens")


def budget(patient: Patient) -> Outcome:
    """It keeps as many visual tokens of every image as it was asked to, at the entrance and in the last layer."""
    _, last, notes = patient.first
    before = patient.before_llm
    pruners = {layer: stage.method for stage in patient.slim.stages for layer in stage.layers}
    pairs = []
    if before or not pruners:
        pairs += [(image.kept, image.requested) for row in last.images for image in row]
    if pruners:
        final = pruners[max(pruners)]
        asked = [[final.requested(image.kept) for image in row] for row in last.images]
        pairs += [(n, sum(row)) for n, row in zip(last.visual[-1], asked, strict=True) if row and None not in row]
        if not notes.hides:
            counts = [row + [0] * len(told) for row, told in zip(notes.counts(max(pruners)), asked, strict=True)]
            pairs += [pair for row, told in zip(counts, asked, strict=True) for pair in zip(row, told, strict=False)]
    pairs = [pair for pair in pairs if pair[1] is not None]
    copies, sent = max(((sent.copies, len(sent)) for sent in notes.sent), default=(0, 0))
    if copies:
        return Outcome(copies, 0, "tokens", f"{copies} of the {sent} sent of an image are copies of others")
    if not pairs:
        raise NotApplicable("the method decides itself how many tokens stay")
    kept, wanted = max(pairs, key=lambda pair: abs(pair[0] - pair[1]))
    return Outcome(abs(kept - wanted), 0, "tokens", f"{kept} kept of {wanted} asked for")


def batch(patient: Patient) -> Outcome:
    """A batch of prompts is answered as each prompt by itself, also by a method that has seen none of them yet."""
    together = patient.decoded
    with patient.fresh.on(twin_of(patient.twin.model)) as fresh:
        alone = singles(fresh.model, patient.prompts, patient.baseline.answer)
    return _close(patient, difference(together, alone))


def padding(patient: Patient) -> Outcome:
    """Rows padded on the left give the logits of rows padded on the right."""
    left, right = (tails(patient.model, patient.prompts.inputs(side=side)) for side in ("left", "right"))
    return _close(patient, difference(left, right))


def reference(patient: Patient) -> Outcome:
    """From the method's own answers, another model computed layer by layer by hand gives the logits of every place."""
    before, tokens = patient.before_llm, patient.baseline.answer[:1]
    renumbered = before is not None and before.positions == "renumbered"
    apart = {}
    for row in (*patient.prompts.pictured, LONG):
        with noted(patient.slim) as notes:
            ours = decode(patient.model, patient.prompts.inputs((row,)), tokens, whole=True)[0]
        if notes.hides:
            raise NotApplicable("the method is in training, and hides tokens instead of dropping them")
        places, theirs = patient.twin.logits(row, tokens, notes, renumbered)
        apart[f"prompt {row}"] = difference(ours[places], theirs)
    note = ", ".join(f"{name} {x:.2g}" for name, x in apart.items() if not x <= patient.tolerance)
    return Outcome(max(apart.values()), patient.tolerance, "logits", note)


def cache(patient: Patient) -> Outcome:
    """Decoding through the KV cache gives the logits of recomputing the whole sequence without one."""
    if not patient.early:
        raise NotApplicable("pruned between layers: in a longer sequence the last token, which decides, is another")
    whole = recompute(patient.model, patient.prompts.inputs(), patient.baseline.answer)
    return _close(patient, difference(patient.decoded, whole))


def answer(patient: Patient) -> Outcome:
    """The log-likelihood of a forced answer, fed at once or as labels, is that of its tokens one by one."""
    model, prompts, tokens = patient.model, patient.prompts, patient.baseline.answer
    steps = likelihood(patient.decoded, tokens)
    apart = {"at once": difference(likelihood(decode(model, prompts.inputs(), tokens, stride=STEPS), tokens), steps)}
    if patient.early:
        apart["as labels"] = abs(loss(model, prompts.inputs(), tokens) - float(steps.mean()))
    note = ", ".join(f"{name} {x:.2g}" for name, x in apart.items())
    return Outcome(max(apart.values()), patient.tolerance, "nats", note)


def kv(patient: Patient) -> Outcome:
    """The KV cache takes the bytes that theory gives the tokens of the receipt, in which every entry is true."""
    model, receipt, prompts = patient.model, patient.slim.receipt, patient.prompts
    layers = model.model.language_model.layers
    shape = DecoderShape.from_config(model.config)
    held = theory = strange = texts = 0
    told = Told(patient.slim)
    receipt.reset()
    for row in prompts.batch:  # one by one: theory knows no padding
        computed = [0] * len(layers)
        hooks = counted(layers, computed)
        try:
            with torch.no_grad():
                out = model(**prompts.inputs((row,)), use_cache=True, logits_to_keep=1)
        finally:
            for hook in hooks:
                hook.remove()
        if row not in prompts.pictured:
            texts += 1
            continue
        tokens = [receipt.last.text[0] + visual for (visual,) in receipt.last.visual]
        held += cache_bytes(kv_cache(out))
        theory += kv_bytes(shape, tokens, model.dtype.itemsize)
        strange += sum(abs(a - b) for a, b in zip(computed, tokens, strict=True))
        told.prompt(prompts.visual(row), prompts.media(row), computed, kv_cache(out))
    told.summary(receipt, texts)
    notes = [f"the layers computed {strange} tokens more or less than the receipt says"] if strange else []
    notes += told.wrong[:3]
    if notes and held == theory:
        return Outcome(len(told.wrong) + bool(strange), 0, "entries", "; ".join(notes))
    note = "; ".join(notes) or f"{held / 2**20:.2f} MiB"
    return Outcome(abs(held - theory), 0, "bytes", note)


def memory(patient: Patient) -> Outcome:
    """Its peak memory is not above the unpatched model's, but for a quarter of a MiB of index tensors."""
    if not patient.slim.receipt.had_effect:
        raise NotApplicable("no visual token was dropped, so there is nothing to save")
    ours, plain = peak_memory(patient.model, patient.prompts.inputs()), patient.baseline.peak
    return Outcome(ours / plain, 1 + SLACK / plain, "x", f"{ours / 2**20:.1f} MiB of {plain / 2**20:.1f} MiB")


def attention(patient: Patient) -> Outcome:
    """No full attention map is made, and the attention back end stays what it was."""
    inputs = patient.prompts.inputs((LONG,))
    plain, length = patient.baseline.shapes, inputs["input_ids"].shape[1]
    if _maps(plain, {length}):
        raise NotApplicable("the unpatched model makes full maps itself; load it with a fused back end (sdpa) to see")
    made = shapes(patient.model, inputs) - plain
    maps = _maps(made, {length, *patient.slim.receipt.last.sequence})
    notes = [f"made {', '.join(map(str, maps[:3]))}"] if maps else []
    before, now = patient.baseline.backend, patient.model.config.get_text_config()._attn_implementation
    if now != before:
        notes.append(f"the back end changed to {now}")
    return Outcome(len(maps) + (now != before), 0, "maps", "; ".join(notes))


def _maps(shapes: set[tuple[int, ...]], lengths: set[int]) -> list[tuple[int, ...]]:
    """Those that end in one of `lengths` twice."""
    return sorted(shape for shape in shapes if len(shape) > 1 and shape[-1] == shape[-2] and shape[-1] in lengths)


def repeat(patient: Patient) -> Outcome:
    """The same prompts twice give the same logits; they, and the process's random generators, stay as they were."""
    inputs, dice = patient.prompts.inputs(), Dice()
    first = patient.decoded
    with dice.watched():
        again = decode(patient.model, inputs, patient.baseline.answer)
    edited = [name for name, x in patient.prompts.inputs().items() if not torch.equal(x, inputs[name])]
    touched = [f"edited {name} in place" for name in edited] + [f"drew from, or seeded, {name}" for name in dice.used]
    if touched:
        return Outcome(len(touched), 0, "changes", "; ".join(touched))
    return Outcome(difference(first, again), patient.baseline.wobble, "logits")


def others(patient: Patient) -> Outcome:
    """Another model in the process answers as before, and no shared class or function was replaced."""
    changed = patient.before[1].changes(surroundings(patient.model))
    apart = patient.twin.changed()
    return _nothing(changed, "the other model's logits", apart, patient.twin.wobble)


def restore(patient: Patient) -> Outcome:
    """Taken off, the patch leaves the model as it was: attributes, hooks, weights, classes and answers."""
    patient.slim.remove()
    changed = [name for was, now in zip(patient.before, look(patient.model), strict=True) for name in was.changes(now)]
    outcome = _nothing(changed, "the logits", patient.baseline.changed(), patient.baseline.wobble)
    patient.whole = outcome.passed
    return outcome


def keep_all(patient: Patient) -> Outcome:
    """Asked to keep everything, it changes nothing: answers, logits and cache are those of the unpatched model."""
    before = patient.before_llm
    if before is not None and name_of(before) in patient.slim.trained:
        raise NotApplicable(f"{type(before).__name__} is trained to make tokens of its own, however many")
    model, prompts, baseline = patient.model, patient.prompts, patient.baseline
    with Slim(model, [keeping_everything(stage) for stage in patient.slim.methods]) as slim:
        pairs = [(generate(model, prompts.inputs()), baseline.generated)]
        count = slim.receipt.last.images[0][0].tokens  # of the first row, which has one picture
    if (counted := _keeping_count(patient.slim.methods, count)) is not None:
        with Slim(model, counted):
            pairs.append((generate(model, prompts.inputs((0,))), baseline.brief))
    names = ("answers", "logits", "cache")
    apart = {name: max(difference(ours[i], plain[i]) for ours, plain in pairs) for i, name in enumerate(names)}
    notes = [f"{name} differ by {x:.3g}" for name, x in apart.items() if x > baseline.wobble]
    changed = [name for was, now in zip(patient.before, look(model), strict=True) for name in was.changes(now)]
    if patient.whole and changed and not notes:
        return _nothing(changed, "the logits", 0.0, baseline.wobble)
    return Outcome(max(apart.values()), baseline.wobble, "logits", ", ".join(notes))


def _keeping_count(methods: list[Compressor], count: int) -> list[Compressor] | None:
    """The same methods, asked for all of an image's `count` tokens by number.

    None if there is nothing to ask, or a stage that decides itself would still drop some.
    """
    try:
        asked = [replace(method, keep=count) for method in methods if _keeps(method)]
        stages = [stage for method in asked for stage in method.stages()]
        return asked if asked and all(stage.requested(count) == count for stage in stages) else None
    except ValueError:
        return None  # it takes shares only


def _keeps(stage: Compressor) -> bool:
    """Whether a method has an option `keep`."""
    return is_dataclass(stage) and "keep" in {f.name for f in fields(stage) if f.init}


def keeping_everything(stage: Compressor) -> Compressor:
    """The same method at a budget of everything.

    Raises:
        NotApplicable: it has no option `keep`.
    """
    cls = type(stage)
    if not stage.acts_before_llm and cls.retain is Compressor.retain and cls.stages is Compressor.stages:
        return stage  # it only counts
    if not _keeps(stage):
        raise NotApplicable(f"{cls.__name__} has no option `keep`")
    return replace(stage, keep=1.0)


def _close(patient: Patient, apart: float) -> Outcome:
    return Outcome(apart, patient.tolerance, "logits")


def _nothing(changed: list[str], what: str, apart: float, wobble: float) -> Outcome:
    """Nothing may have changed, neither by name nor in what a model answers."""
    if not apart <= wobble:
        changed = [f"{what} by {apart:.3g}", *changed]
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return Outcome(len(changed), 0, "changes", f"changed: {', '.join(changed[:3])}{more}" if changed else "")


#: In this order: `video` decides what the others are given, `restore` takes the patch off, `keep-all` puts on its own.
CHECKS: dict[str, Callable[[Patient], Outcome]] = {
    "video": video,
    "budget": budget,
    "batch": batch,
    "padding": padding,
    "reference": reference,
    "cache": cache,
    "answer": answer,
    "kv": kv,
    "memory": memory,
    "attention": attention,
    "repeat": repeat,
    "others": others,
    "restore": restore,
    "keep-all": keep_all,
}
