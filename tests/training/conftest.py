"""Training in one process leaves accelerate's shared state behind, which the next test must not meet."""

import pytest


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    state = pytest.importorskip("accelerate.state")
    yield
    state.AcceleratorState._reset_state(True)
    state.GradientState._reset_state()
