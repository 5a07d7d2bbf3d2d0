"""Two processes that share one model: tensor parallelism and FSDP2 answer as one process does."""

import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from shared_models import METHODS, logits, sharded, tensor_parallel, work
from tiny import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict]:
    folder = str(tmp_path_factory.mktemp("shared"))
    tiny("llava").save_pretrained(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, folder), nprocs=2)
    return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("way", [tensor_parallel, sharded])
def test_two_processes_answer_as_one(found, way, method):
    want = logits(tiny("llava"), method)
    assert method == "none" or (want - logits(tiny("llava"), "none")).abs().max() > 0.1, "nothing was dropped"
    for cache in (True, False):
        for own in found:
            torch.testing.assert_close(own[way.__name__, method, cache], want, rtol=1e-3, atol=1e-3)
        assert torch.equal(*(own[way.__name__, method, cache] for own in found)), "the processes disagree"
