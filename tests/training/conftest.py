"""Training in one process leaves accelerate's shared state, which would change other tests."""

import pytest


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    state = pytest.importorskip("accelerate.state")

    def reset():
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()

    reset()  # tests of other shelves may have run before, in the same process
    yield
    reset()
