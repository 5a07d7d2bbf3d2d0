"""The ledger: analytic FLOPs against the papers and against a counter, KV bytes against a cache, timings."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from tiny import BACKENDS, BOS, FAMILIES, Picture, batch, tiny, words
from torch.utils.flop_counter import FlopCounterMode

from vlmslim.efficiency import (
    CONVENTIONS,
    DecoderShape,
    Spread,
    Timing,
    equivalent_tokens,
    kv_bytes,
    measure,
    measure_together,
    prefill_flops,
    projector_flops,
    summarise,
    time_generation,
    tower_flops,
)

VICUNA_7B = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000)
VICUNA_13B = DecoderShape(layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, mlp=13824, vocab=32000)
QWEN2_7B = DecoderShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocab=152064)
CLIP_L_336 = SimpleNamespace(
    model_type="clip_vision_model",
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    image_size=336,
    patch_size=14,
    num_channels=3,
)
ROW = [BOS, *words(0, 5), Picture(0, (60, 30)), *words(1, 30)]


@pytest.mark.parametrize(
    "convention, tera", [("fastv", 3.23), ("sparsevlm", 4.13), ("flops", 8.26)], ids=["fastv", "sparsevlm", "flops"]
)
def test_the_three_published_figures_of_one_prefill(convention, tera):
    assert round(prefill_flops(VICUNA_7B, 622, convention=convention) / 1e12, 2) == tera


def test_the_divprune_paper():
    """Its script uses the questions' lengths without the system prompt; mean length 45.6, two roundings of 0.098."""
    full = prefill_flops(VICUNA_13B, 576 + 46, convention="fastv")
    assert full / 1e12 == pytest.approx(6.281, rel=0.002)
    assert prefill_flops(VICUNA_13B, 56 + 46, convention="fastv") / full == pytest.approx(0.157, abs=0.005)


def test_grouped_query_attention_is_cheaper():
    by_hand = 28 * (2 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) * 6372 + 4 * 6372**2 * 3584)
    assert prefill_flops(QWEN2_7B, 6372) == by_hand
    # AIM's published 99.63 T adds softmax, norms, activations and the LM head
    assert by_hand / 1e12 == pytest.approx(99.63, rel=0.03)


def test_the_tower_and_the_kv_cache_of_llava_15():
    assert round(tower_flops(CLIP_L_336) / 1e12, 2) == 0.38
    assert round(kv_bytes(VICUNA_7B, 622) / 2**20) == 311
    assert round(kv_bytes(VICUNA_7B, 64 + 46) / 2**20) == 55
    assert kv_bytes(VICUNA_7B, 10, "float32") == 2 * kv_bytes(VICUNA_7B, 10, torch.bfloat16)


def test_equivalent_tokens_of_fastv():
    per_layer = [576] * 2 + [144] * 30
    assert equivalent_tokens(per_layer) == 171
    whole, dropped = (prefill_flops(VICUNA_7B, [v + 46 for v in p]) for p in ([576] * 32, per_layer))
    assert 0.33 < dropped / whole < 0.35


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown FLOPs convention 'macs'; choose from flops, sparsevlm, fastv"):
        prefill_flops(VICUNA_7B, 622, convention="macs")
    with pytest.raises(ValueError, match="31 lengths for a language model of 32 layers"):
        prefill_flops(VICUNA_7B, [1] * 31)
    with pytest.raises(ValueError, match="at least 2"):
        time_generation(tiny("llava"), {}, new_tokens=1)
    assert set(CONVENTIONS) == {"flops", "sparsevlm", "fastv"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_against_a_flop_counter(family, backend):
    model = tiny(family, backend)
    inputs = batch(model, [ROW], padding="none")
    tokens = inputs["input_ids"].shape[1]
    # transformers repeats grouped keys before the kernel, so the counter sees the same attention as we do
    crops = []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _, args, kwargs: crops.append(len(args[0] if args else kwargs["pixel_values"])), with_kwargs=True
    )
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(**inputs, logits_to_keep=1)

    def counted(module: str) -> int:
        return sum(counter.get_flop_counts()[f"{type(model).__name__}.{module}"].values())

    shape = DecoderShape.from_config(model.config)
    assert prefill_flops(shape, tokens) == pytest.approx(counted("model.language_model"), rel=0.01)
    (crops,) = crops  # anyres families leave out the padding crops
    assert tower_flops(model.config, crops=crops) == pytest.approx(counted("model.vision_tower"), rel=0.01)
    assert projector_flops(model.config, 16 * crops) == pytest.approx(counted("model.multi_modal_projector"), rel=0.01)
    head = prefill_flops(shape, 0, lm_head_positions=1)
    assert head == sum(counter.get_flop_counts()[f"{type(model).__name__}.lm_head"].values())


@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_against_a_cache(family):
    model = tiny(family)
    inputs = batch(model, [ROW], padding="none")
    with torch.inference_mode():
        cache = model(**inputs, use_cache=True).past_key_values
    held = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert kv_bytes(DecoderShape.from_config(model.config), inputs["input_ids"].shape[1], model.dtype) == held


def test_a_generation_has_a_fixed_length():
    model = tiny("llava")
    model.generation_config.eos_token_id = list(range(2, 90))  # would stop at once
    lengths = []
    generate = model.generate

    def spy(**kwargs):
        lengths.append(generate(**kwargs).shape[1])

    model.generate = spy
    inputs = batch(model, [ROW], padding="none")
    timings = measure(model, inputs, new_tokens=4, repeats=3, warmup=1)
    assert lengths == [inputs["input_ids"].shape[1] + 4] * 4
    assert len(timings) == 3
    assert all(t.prefill_ms > 0 and t.decode_ms > 0 and t.peak_bytes is None for t in timings)


def test_methods_are_timed_in_turn():
    model = tiny("llava")
    order = []

    @contextmanager
    def treatment():
        order.append("on")
        yield
        order.append("off")

    prompts = [batch(model, [ROW], padding="none")] * 2
    timings = measure_together(model, {"none": nullcontext, "slow": treatment}, prompts, new_tokens=2, repeats=2)
    assert order == ["on", "off"] * 3
    assert {name: len(t) for name, t in timings.items()} == {"none": 4, "slow": 4}


def test_summary():
    reference = [Timing(10.0, 1.0, None), Timing(20.0, 2.0, None)]
    ours = [Timing(5.0, 1.0, None), Timing(10.0, 2.0, None)]
    summary = summarise(ours, reference)
    assert summary["prefill_ratio"] == 0.5
    assert summary["decode_ratio"] == 1.0
    assert summary["prefill_ms"] == 7.5
    assert summary["peak_bytes"] is None
    assert Spread.of([3.0]) == Spread(3.0, 0.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0)
