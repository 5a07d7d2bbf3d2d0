"""Checkpoints in the authors' format, written once a session."""

from pathlib import Path

import pytest
from original_checkpoints import KINDS, original


@pytest.fixture(scope="session")
def originals(tmp_path_factory) -> dict[str, Path]:
    """The folder of each kind. Tests do not write into them."""
    root = tmp_path_factory.mktemp("originals")
    return {kind: original(kind, root / kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param
