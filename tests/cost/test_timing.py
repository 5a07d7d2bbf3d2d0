"""Timing: its ends, interleaved and in pairs; and peak memory."""

from contextlib import contextmanager, nullcontext
from itertools import count, permutations

import pytest
import torch
from prompts import Picture, batch, words
from tiny import BOS, tiny

import vlmslim
from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.cost.memory import peak_memory
from vlmslim.cost.timing import MedianIqr, Timing, interleave, measure_together, summarise, time_generation, time_warm

ROW = [BOS, *words(0, 5), Picture(0, (60, 30)), *words(1, 30)]


@pytest.fixture
def model():
    return tiny("llava")


@pytest.fixture
def inputs(model):
    return batch(model, [ROW], padding="none")


def ticks():
    """A clock that advances one second whenever it is read."""
    return count().__next__


@pytest.mark.parametrize("method", [None, "fastv"])
def test_what_is_timed_from_where_to_where(model, inputs, method):
    """The clock is read at the call, the prompt, every token, and into and out of tower, projector and decoder."""
    with vlmslim.patch(model, method, keep=4) if method else nullcontext():
        timing = time_generation(model, inputs, 2, ticks())
    assert timing == Timing(encode_ms=2000, ttft_ms=8000, prefill_ms=1000, decode_ms=1000, latency_ms=9000)


def test_a_patch_is_timed_when_it_is_warm(model, inputs):
    clock = ticks()
    assert time_warm(model, inputs, 4, clock) == Timing(2000, 8000, 1000, 1000, 11000)
    assert clock() == 10 + 12  # both generations were timed, and the first one forgotten


def test_a_generation_has_a_fixed_length(model, inputs, monkeypatch):
    model.generation_config.eos_token_id = list(range(2, 90))  # would stop at once
    generate, lengths = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **options: lengths.append(generate(**options).shape[1]))
    timing = time_generation(model, inputs, 4)
    assert lengths == [inputs["input_ids"].shape[1] + 4]
    assert 0 < timing.prefill_ms < timing.ttft_ms < timing.latency_ms
    assert timing.latency_ms == pytest.approx(timing.ttft_ms + 3 * timing.decode_ms)


def test_one_token_has_no_decoding_time(model, inputs):
    with pytest.raises(ValueError, match="at least 2"):
        time_generation(model, inputs, new_tokens=1)


def test_methods_are_timed_interleaved(model, inputs):
    order = []

    @contextmanager
    def attach():
        order.append("on")
        yield
        order.append("off")

    timings = measure_together(model, {"none": nullcontext, "slow": attach}, [inputs] * 2, new_tokens=2, repeats=2)
    assert order == ["on", "off"] * 3
    assert {name: len(t) for name, t in timings.items()} == {"none": 4, "slow": 4}


def test_every_round_has_an_order_of_its_own():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    results = interleave(calls, repeats=40, warmup=1)
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert len(rounds) == 40 and all(sorted(names) == list("abc") for names in rounds)
    assert all([order[i - 1] for i in results[name]] == [name] * 40 and min(results[name]) > 3 for name in "abc")
    followed = {(order[i], order[i + 1]) for i in range(len(order) - 1)}
    assert {pair for pair in followed if pair[0] != pair[1]} == set(permutations("abc", 2))
    again, order = order, []
    interleave(calls, repeats=40, warmup=1)
    assert order == again


def test_summary():
    reference = [Timing(3.0, 10.0, 8.0, 1.0, 20.0), Timing(3.0, 20.0, 8.0, 2.0, 30.0)]
    ours = [Timing(3.0, 5.0, 8.0, 1.0, 20.0), Timing(3.0, 10.0, 8.0, 2.0, 30.0)]
    assert summarise(ours, reference) == {
        "ttft_ms": 7.5, "ttft_ms_iqr": 2.5, "ttft_ratio": 0.5,
        "decode_ms": 1.5, "decode_ms_iqr": 0.5, "decode_ratio": 1.0, "samples": 2,
    }  # fmt: skip
    assert MedianIqr.of([3.0]) == MedianIqr(3.0, 0.0)
    assert MedianIqr.of([1.0, 2.0, 3.0, 4.0, 5.0]) == MedianIqr(3.0, 2.0)


class Hungry:
    """Stands in for a model whose generation takes a known amount of memory."""

    device = torch.device("cpu")

    def generate(self, **options):
        first = torch.empty(1000, 1000)
        second = torch.empty(2000, 1000)
        del first
        third = torch.empty(500, 1000)
        del second, third


def test_peak_memory_is_exact_and_counts_what_lives_at_once():
    kept = torch.empty(4000, 1000)  # what was there before does not count
    assert peak_memory(Hungry(), {}) == 12_000_000
    assert len(kept) == 4000


def test_peak_memory_of_a_shorter_prompt_is_lower():
    model = tiny("llava", "eager")
    prompt = SyntheticPrompt.make(model, batch=4, text_tokens=12)
    peak_memory(model, prompt.inputs())  # the first generation makes tables that stay
    unpatched = peak_memory(model, prompt.inputs())
    with vlmslim.patch(model, "random", keep=2):
        assert 0 < peak_memory(model, prompt.inputs()) <= unpatched
    assert peak_memory(model, prompt.inputs()) == unpatched
