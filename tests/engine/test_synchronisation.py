"""How often the host waits for the device in a prefill: never more often for more tokens or more images."""

import sys

import pytest
import torch
from doubles import Both, Halve, Strided, StridedOriginal
from tiny import BOS, ROWS, Picture, batch, tiny, words
from watch import Watch

import vlmslim

WAITING = ("cpu", "tolist", "item", "nonzero", "__bool__", "__int__", "__float__")


@pytest.fixture
def waits(monkeypatch) -> list[str]:
    """The lines of the engine and its checks at which a tensor is brought to the host."""
    seen = []

    def counted(name):
        original = getattr(torch.Tensor, name)

        def call(self, *args, **kwargs):
            frame = sys._getframe(1)
            module = frame.f_globals["__name__"]
            if module.startswith("vlmslim.") and not module.startswith("vlmslim.ops"):
                seen.append(f"{module}:{frame.f_lineno}")
            return original(self, *args, **kwargs)

        return call

    for name in WAITING:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return seen


PROMPTS = {
    "one image": [[BOS, Picture(0), *words(0, 5)]],
    "several images": [[BOS, Picture(i), *words(i, 3), Picture(9 + i), *words(9, 2)] for i in range(3)],
}


@pytest.mark.parametrize(
    ("rule", "layers"), [(Strided(), 0), (StridedOriginal(), 0), (Halve(), 1), (Both(), 2)], ids=str
)
@pytest.mark.parametrize("prompts", PROMPTS)
@torch.no_grad()
def test_the_engine_waits_a_fixed_number_of_times(waits, rule, layers, prompts):
    """For mask, positions, ids, the check of the features, and all indices; and once in each layer that is asked."""
    model = tiny("llava")
    inputs = batch(model, PROMPTS[prompts])
    with vlmslim.patch(model, rule):
        model(**inputs)
    before = 1 if isinstance(rule, Strided | Both) else 0
    assert len(waits) == 4 + before + layers, waits


@pytest.mark.parametrize("name", ["random", "uniform", "pool", "fastv", "divprune"])
@torch.no_grad()
def test_a_method_waits_no_more_often_for_more_tokens(name):
    counts = []
    for keep in (3, 12):
        model = tiny("llava")
        inputs = batch(model, ROWS)
        with vlmslim.patch(model, name, keep=keep), Watch() as watch:
            model(**inputs)
        counts.append(watch.syncs())
    assert counts[0] == counts[1]
