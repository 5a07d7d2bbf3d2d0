"""`examine`: run every check on every method."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedModel, ProcessorMixin

from vlmslim.compressor import Keep, check_keep, resolve_keep
from vlmslim.doctor.checks import CHECKS, FACTOR, NotApplicable, Subject
from vlmslim.doctor.prompts import LONG, Prompts, why_no_video
from vlmslim.doctor.report import Finding, Report
from vlmslim.doctor.runs import UnpatchedRun, clone_sharing_weights
from vlmslim.engine.families import family_of
from vlmslim.patching import Method, Slim, check_unpatched, patch
from vlmslim.registry import BrokenMethod, build, is_method_name, label, method_names, options_of, parse_method

SHARE = 0.25  # of the visual tokens, which a method keeps unless the caller says otherwise
#: How a method says that it does not go with a checkpoint, or that something which it needs is missing.
_REFUSALS = ValueError, ImportError, OSError


def examine(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    methods: Sequence[Method] | None = None,
    *,
    keep: Keep | None = None,
    on_finding: Callable[[Finding], None] = lambda finding: None,
) -> Report:
    """Run every check on every method.

    Args:
        model: an unpatched model in evaluation mode, on any device and in any dtype. It is left as it was, if the
            methods leave it so.
        processor: its processor.
        methods: each is anything that `vlmslim.patch` takes. By default all registered methods at the budget `keep`;
            those that this checkpoint cannot have are listed as not applicable, with the reason.
        keep: visual tokens per image, a count or a share, of methods given by name alone that have such an option.
            By default a quarter, or the method's own default if it takes no share.
        on_finding: called with every finding as it is made.

    Returns:
        The findings.

    Raises:
        TypeError, ValueError, RuntimeError: `vlmslim.patch` refuses the model or a method that was asked for. Another
            error in a method's `setup` is a finding.
        ValueError: `keep` means nothing, or a method is asked for more tokens than a picture of the prompts has.
        ValueError: the model is in training mode, answers with numbers that are not finite, or its tokenizer has no
            padding token.
    """
    family_of(model)  # refuses what is no supported family
    check_unpatched(model)
    if model.training:
        raise ValueError("the model is in training mode, in which dropout makes two runs differ; call model.eval()")
    if keep is not None:
        check_keep(keep)
    other, videos = clone_sharing_weights(model), why_no_video(model, processor) is None

    @cache
    def unpatched(with_video: bool) -> UnpatchedRun:
        return UnpatchedRun(other, Prompts(other, processor, with_video))

    if methods is None and isinstance(keep, int):
        resolve_keep(keep, _smallest_picture(unpatched(videos)))
    report = Report.about(model, unpatched(videos).noise, FACTOR)

    def note(finding: Finding) -> None:
        report.findings.append(finding)
        on_finding(finding)

    for given in method_names() if methods is None else methods:
        name = label(os.fspath(given) if isinstance(given, os.PathLike) else given)
        try:
            slim = _patch(model, given, keep)
        except Exception as error:  # a method may fail in any way, and the others are still examined
            if methods is not None and isinstance(error, _REFUSALS):
                raise
            note(_not_patched(name, error))
        else:
            with slim:
                if methods is not None:
                    _check_counts(slim, unpatched(videos))
                for finding in _findings(name, slim, unpatched, videos):
                    note(finding)
                    if finding.check == "budget":  # the receipt has seen the batch, and that once
                        report.receipts[name] = slim.receipt.summary()
        difference, tolerated = unpatched(videos).changed(model), unpatched(videos).run_to_run_noise
        if difference > tolerated:
            why = "without the patch, the model answers otherwise than before; no other method was examined after that"
            note(Finding(name, "restore", "fail", difference, tolerated, "logits", why))
            break
    return report


def _not_patched(name: str, error: Exception) -> Finding:
    """Return the finding about a method with which the model could not be patched."""
    if not isinstance(error, _REFUSALS):
        return Finding(name, "patch", "fail", note=_one_line(error))
    return Finding(name, "patch", "fail" if isinstance(error, BrokenMethod) else "n/a", note=str(error))


def _patch(model: PreTrainedModel, given: Method, keep: Keep | None) -> Slim:
    """Patch the model; a method given by name alone gets the budget `keep`, if it has one."""
    if isinstance(given, str) and given in method_names():
        return patch(model, [_budgeted({"method": given}, keep)])
    return patch(model, given)


def _budgeted(stage: dict, keep: Keep | None) -> dict:
    """Add a budget to a stage that takes one and does not say its own.

    Without a `keep` that is a share of the tokens, or nothing if the method refuses it and has a default.
    """
    options = options_of(stage["method"])
    if "keep" not in options or "keep" in stage:
        return stage
    if keep is None and options["keep"] is not MISSING:
        try:
            build({"keep": SHARE} | stage)
        except ValueError:
            return stage
    return {"keep": SHARE if keep is None else keep} | stage


def _findings(name: str, slim: Slim, unpatched: Callable[[bool], UnpatchedRun], videos: bool) -> Iterator[Finding]:
    """Run every check on one patched model. Without `videos`, or when the method takes none, on pictures alone."""
    subject = Subject(slim, unpatched(videos))
    for check in CHECKS:
        finding = _find(name, check, subject)
        yield finding
        if check == "video":
            slim.reset_receipt()
            if videos and finding.status != "pass":
                subject = Subject(slim, unpatched(False))


def _find(name: str, check: str, subject: Subject) -> Finding:
    """Run one check. An exception is a finding too: the method failed at what the check does."""
    try:
        outcome = CHECKS[check](subject)
    except NotApplicable as why:
        return Finding(name, check, "n/a", note=str(why))
    except Exception as error:  # a method may fail in any way, and that is a finding
        return Finding(name, check, "fail", note=_one_line(error))
    status = "pass" if outcome.passed else "fail"
    return Finding(name, check, status, outcome.measured, outcome.tolerance, outcome.unit, outcome.note)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


@torch.no_grad()
def _smallest_picture(unpatched: UnpatchedRun) -> int:
    """Return the visual tokens of the smallest picture or video in the prompts."""
    with patch(unpatched.model, "none") as slim:
        for row in (*unpatched.prompts.pictured, LONG):
            unpatched.model(**unpatched.prompts.inputs((row,)), use_cache=False, logits_to_keep=1)
    return slim.receipt.summary()["visual_tokens_range"][0]


def _check_counts(slim: Slim, unpatched: UnpatchedRun) -> None:
    """Refuse a count of tokens that a picture in the prompts does not have, because every check would fail of it.

    Raises:
        ValueError: which count.
    """
    stages = [stage for method in slim.methods for stage in method.stages()]
    if any(type(getattr(stage, "keep", None)) is int for stage in stages):
        left = _smallest_picture(unpatched)
        for stage in stages:
            asked = stage.requested(left)
            left = left if asked is None else asked


def parse(text: str, keep: Keep | None = None) -> str | list[dict]:
    """Read a method as the command line writes it: `fastv:layer=3:keep=64`, stages joined by `+`, or a saved patch.

    Args:
        text: of the command line.
        keep: the budget of stages that take one and do not say theirs; see `examine`.

    Raises:
        ValueError: unknown method, or an option without a value.
    """
    name = text.partition(":")[0]
    if Path(text).is_dir() or ("/" in name and not is_method_name(name)):  # bundled/NAME, or a repository on the hub
        return text
    return [_budgeted(parse_method(part), keep) for part in text.split("+")]
