"""Fixtures: configurations of runs on a stand-in, and tiny checkpoints as models of lmms-eval."""

from pathlib import Path

import pytest
from evaluation_doubles import write_config

from vlmslim.evaluation.config import load_config


@pytest.fixture
def config(tmp_path):
    """Return a function that loads a configuration with changes; its output folder stays the same."""
    return lambda **changes: load_config(write_config(tmp_path, **changes))


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """Return a folder for checkpoints."""
    return tmp_path_factory.mktemp("lmms")


@pytest.fixture
def make(folder):
    """Return a function that makes the model of a family; it needs the extra `vlmslim[eval]`."""
    from lmms_fixtures import checkpoint

    from vlmslim.evaluation.lmms_model import VlmSlim

    def make(family="llava", cls=VlmSlim, **arguments):
        lm = cls(checkpoint(family, folder), **arguments)
        lm.task_dict = {"quiz": {"test": [{"id": i} for i in range(12)]}}
        return lm

    return make
