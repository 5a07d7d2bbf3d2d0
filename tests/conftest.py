"""Shared fixtures. Tiny models, prompts and test-only compressors are in support/: tiny.py, prompts.py, doubles.py."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports Triton, whose kernels then run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from contract import add_option as pytest_addoption  # noqa: F401
from contract import choose as pytest_configure  # noqa: F401

import vlmslim.evaluation  # noqa: F401, before tests import `datasets`, which reads a setting of it

pytest_plugins = ["browser", "clip_fixtures", "method_files"]

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
