"""`vlmslim doctor`: prove, on a checkpoint in hand, that a compression method does what it says and nothing else.

    from vlmslim import doctor

    report = doctor.examine(model, processor, ["divprune", {"method": "fastv", "keep": 64}])
    assert report.passed, report

prompts.py    made-up pictures, a video, and conversations
reference.py  the patched model once more, by hand and without the engine
fresh.py      a method as it was before it saw any prompt
told.py       what a receipt ought to say
runs.py       what is asked of the model again and again, and what the unpatched one answers
watch.py      what a patch could leave behind, and which tensors are made
checks.py     the checks
report.py     findings, as a table and as JSON

What each check is for, and how its tolerance is reasoned: docs/trust.md.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

from vlmslim import loading
from vlmslim.compressor import Keep, check_keep, resolve_keep
from vlmslim.doctor.checks import CHECKS, FACTOR, NotApplicable, Patient, look
from vlmslim.doctor.pristine_copy import twin_of
from vlmslim.doctor.prompts import LONG, Prompts, why_no_video
from vlmslim.doctor.reference import Reference
from vlmslim.doctor.report import Finding, Report
from vlmslim.doctor.runs import Baseline
from vlmslim.doctor.snapshots import Snapshot
from vlmslim.engine.families import family_of
from vlmslim.patching import Method, Slim, check_unpatched, patch
from vlmslim.registry import BrokenMethod, is_method_name, label, method_names, options_of, parse_method

__all__ = ["Finding", "Report", "examine", "load", "parse"]


def examine(
    model: nn.Module,
    processor: ProcessorMixin,
    methods: Sequence[Method] | None = None,
    *,
    keep: Keep = 0.25,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Run every check on every method.

    Args:
        model: an unpatched LLaVA in evaluation mode, on any device and in any dtype. It is left as it was, if the
            methods leave it so.
        processor: its processor.
        methods: what `vlmslim.patch` takes, each. By default every method that is there, at the budget `keep`; those
            that this checkpoint cannot have are listed as not applicable, with the reason.
        keep: visual tokens per image, a count or a share, of methods given by name alone that have such an option.
        on_finding: told of every finding as it is made.

    Returns:
        The findings.

    Raises:
        TypeError, ValueError, RuntimeError: `vlmslim.patch` refuses the model or a method that was asked for. Another
            error in a method's `setup` is a finding.
        ValueError: `keep` means nothing, or a method is asked for more tokens than a picture of the prompts has.
        ValueError: the model is in training mode, answers with numbers that are not finite, or its tokenizer has no
            padding token.
    """
    family_of(model)
    if model.training:
        raise ValueError("the model is in training mode, in which dropout makes two runs differ; call model.eval()")
    videos = why_no_video(model, processor) is None
    check_unpatched(model)
    check_keep(keep)
    standards = _standards(model, processor, videos)
    if methods is None and isinstance(keep, int):
        resolve_keep(keep, _smallest(standards[False]))
    report = Report.about(model, standards[videos].baseline.noise, FACTOR)
    for given in method_names() if methods is None else methods:
        name, before = label(given), look(model)
        try:
            bare = isinstance(given, str) and given in method_names()
            slim = patch(model, given, **({"keep": keep} if bare and "keep" in options_of(given) else {}))
        except BrokenMethod as error:
            if methods is not None:
                raise
            report.add(Finding(name, "patch", "fail", note=str(error)), on_finding)
            continue
        except (ValueError, ImportError) as error:
            if methods is not None:
                raise
            report.add(Finding(name, "patch", "n/a", note=str(error)), on_finding)
            continue
        except OSError:
            raise  # there is no such saved method
        except Exception as error:  # its `setup` failed
            report.add(Finding(name, "patch", "fail", note=_said(error)), on_finding)
            if any(was.changes(now) for was, now in zip(before, look(model), strict=True)):
                standards = _standards(model, processor, videos)
            continue
        with slim:
            if methods is not None:
                _check_counts(slim, standards[False])
            standard = standards[videos]
            patient = standard.patient(slim, before)
            for check in CHECKS:
                finding = _find(name, check, patient)
                report.add(finding, on_finding)
                if check == "video" and finding.status != "pass":
                    standard = standards[False]
                    patient = standard.patient(slim, before)
                if check == "budget":  # of the batch, once
                    report.receipts[name] = slim.receipt.summary()
                if check == "restore" and finding.status == "fail":  # go on from what the method has left
                    patient.baseline = Baseline(model, patient.prompts)
        if patient.baseline is not standard.baseline:  # the next one, too
            standards = _standards(model, processor, videos)
    return report


def parse(text: str, keep: Keep) -> str | list[dict]:
    """Read a method as the command line writes it: `fastv:layer=3:keep=64`, stages joined by `+`, or a saved one.

    Args:
        text: of the command line.
        keep: for stages that take a budget and do not say theirs.

    Raises:
        ValueError: unknown method, or an option without a value.
    """
    name = text.partition(":")[0]
    if Path(text).is_dir() or ("/" in name and not is_method_name(name)):  # bundled/NAME, or a repository on the hub
        return text
    stages = [parse_method(part) for part in text.split("+")]
    return [({"keep": keep} if "keep" in options_of(stage["method"]) else {}) | stage for stage in stages]


def load(
    checkpoint: str, *, dtype: str = "float32", device: str | None = None, attention: str = "sdpa"
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """A checkpoint and its processor, ready for `examine`; of a saved patch, the checkpoint under it.

    Raises:
        OSError: there is no such checkpoint.
        ValueError: no such bundled one, or no such dtype or device.
    """
    return loading.load(checkpoint, dtype=dtype, device=device or loading.default_device(), attention=attention)


def _find(name: str, check: str, patient: Patient) -> Finding:
    """Run one check. An exception is a finding too: the method failed at what the check does."""
    try:
        found = CHECKS[check](patient)
    except NotApplicable as why:
        return Finding(name, check, "n/a", note=str(why))
    except Exception as error:
        return Finding(name, check, "fail", note=_said(error))
    status = "pass" if found.passed else "fail"
    return Finding(name, check, status, found.measured, found.tolerance, found.unit, found.note)


def _said(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@dataclass(frozen=True)
class _Standard:
    """What patched models are held against, on one set of prompts."""

    prompts: Prompts
    baseline: Baseline
    twin: Reference

    def patient(self, slim: Slim, before: tuple[Snapshot, Snapshot]) -> Patient:
        return Patient(slim, self.prompts, self.baseline, self.twin, before)


def _standards(model: nn.Module, processor: ProcessorMixin, videos: bool) -> dict[bool, _Standard]:
    """One standard without a video, and one with, for checkpoints that take videos. The model is not patched now."""
    found = {}
    for with_video in {False, videos}:
        prompts = Prompts(model, processor, with_video)
        found[with_video] = _Standard(prompts, Baseline(model, prompts), Reference(twin_of(model), prompts))
    return found


@torch.no_grad()
def _smallest(standard: _Standard) -> int:
    """Visual tokens of the smallest picture in the prompts."""
    counts = []
    with patch(standard.twin.model, "none") as slim:
        for row in (*standard.prompts.pictured, LONG):
            slim.model(**standard.prompts.inputs((row,)), use_cache=False, logits_to_keep=1)
            counts += [image.tokens for image in slim.receipt.last.images[0]]
    return min(counts)


def _check_counts(slim: Slim, standard: _Standard) -> None:
    """Refuse a count of tokens that a picture in the prompts does not have: every check would fail of it.

    Raises:
        ValueError: which count.
    """
    stages = [stage for method in slim.methods for stage in method.stages()]
    if any(type(getattr(stage, "keep", None)) is int for stage in stages):
        left = _smallest(standard)
        for stage in stages:
            asked = stage.requested(left)
            left = left if asked is None else asked
