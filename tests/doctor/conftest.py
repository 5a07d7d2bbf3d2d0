"""Fixtures: tiny checkpoints, examinations of one method, and single checks."""

from functools import cache

import pytest
from lmms_fixtures import checkpoint
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmslim
from vlmslim import doctor
from vlmslim.doctor.checks import CHECKS, Outcome, Subject
from vlmslim.doctor.prompts import Prompts
from vlmslim.doctor.runs import UnpatchedRun


@pytest.fixture(scope="session")
def path(tmp_path_factory):
    """Return a function that saves the tiny checkpoint of a family."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return lambda family="llava": checkpoint(family, folder)


@pytest.fixture(scope="session")
def load(path):
    """Return a function that loads a tiny checkpoint and its processor."""

    def load(family="llava", **options):
        model = AutoModelForImageTextToText.from_pretrained(path(family), **options).eval()
        return model, AutoProcessor.from_pretrained(path(family))

    return load


@pytest.fixture(scope="session")
def unpatched(load):
    """Return a function that runs the unpatched model of a family; once, because its answers stay the same."""
    return cache(lambda family: UnpatchedRun(*(given := load(family))[:1], Prompts(*given)))


@pytest.fixture
def failed(load):
    """Return a function that examines one method: the checks that fail, with their notes."""

    def failed(method, *family) -> dict[str, str]:
        report = doctor.examine(*load(*family), [method])
        assert [finding.check for finding in report.findings][: len(CHECKS)] == list(CHECKS)
        return {finding.check: finding.note for finding in report.failures}

    return failed


@pytest.fixture
def check(load, unpatched):
    """Return a function that makes one check of a method."""

    def check(name, method, family="llava") -> Outcome:
        run = unpatched(family)
        with vlmslim.patch(load(family)[0], method) as slim:
            return CHECKS[name](Subject(slim, run))

    return check
