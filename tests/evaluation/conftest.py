"""Fixtures: tiny checkpoints as models of lmms-eval. Only tests that need the extra `vlmslim[eval]` ask for them."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Return a folder for checkpoints."""
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture
def make(folder):
    """Return a function that makes the model of a family; the checkpoint is written once."""
    from lmms_fixtures import checkpoint

    from vlmslim.evaluation.lmms_model import VlmSlim

    def make(family="llava", cls=VlmSlim, **arguments):
        lm = cls(checkpoint(family, folder), **arguments)
        lm.task_dict = {"quiz": {"test": [{"id": i} for i in range(12)]}}
        return lm

    return make
