"""Shared fixtures. The tiny models, prompts and test-only compressors are in tiny.py and doubles.py."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "support"))

pytest_plugins = ["clip_fixtures"]

torch.set_num_threads(1)  # bit-identical comparisons must not depend on how work is split


@pytest.fixture(autouse=True)
def _same_random_state():
    torch.manual_seed(0)


@pytest.fixture(params=["llava", "siglip", "next", "onevision"])
def family(request) -> str:
    return request.param


@pytest.fixture(params=["eager", "sdpa"])
def backend(request) -> str:
    return request.param
