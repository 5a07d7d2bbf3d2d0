"""Analytic FLOPs against the papers and against a counter; KV bytes against a cache."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from doubles import Everything
from snapshots import changes, model_state
from tiny import BACKENDS, FAMILIES, tiny
from zoo import ZOO, build

import vlmslim
from vlmslim.cost.bench.prompt import SyntheticPrompt
from vlmslim.cost.bench.shapes import shape_config
from vlmslim.cost.flops import (
    CONVENTIONS,
    DecoderShape,
    Ledger,
    equivalent_tokens,
    kv_bytes,
    prefill_flops,
    projector_flops,
    tower_flops,
)
from vlmslim.cost.memory import cache_bytes
from vlmslim.cost.parts import count_flops
from vlmslim.cost.vision import TowerShape
from vlmslim.engine.families import kv_cache

VICUNA_7B = DecoderShape(layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000)
VICUNA_13B = DecoderShape(layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, mlp=13824, vocab=32000)
QWEN2_7B = DecoderShape(layers=28, hidden=3584, heads=28, kv_heads=4, head_dim=128, mlp=18944, vocab=152064)
LLAVA_15_7B = shape_config("llava-1.5-7b")
TEXT = 12


def test_counting_flops_loads_no_torch():
    """The leaderboard counts FLOPs of stored runs, and must start at once."""
    code = "import sys, vlmslim.cost.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "paper, shape, tokens, convention, tflops",
    [
        ("FastV", VICUNA_7B, 622, "fastv", 3.23),
        ("SparseVLM", VICUNA_7B, 622, "sparsevlm", 4.13),
        ("real", VICUNA_7B, 622, "flops", 8.26),
        ("causal", VICUNA_7B, 622, "causal", 8.16),
        ("AIM, image", VICUNA_7B, 576 + 40, "roofline", 8.18),
        ("AIM, video", QWEN2_7B, 6272 + 100, "roofline", 99.63),
        ("Recoverable Compression", VICUNA_7B, 576 + 60, "roofline", 8.45),
        ("GlobalCom2", VICUNA_7B, 2880, "roofline", 41.70),
    ],
)
def test_published_figures(paper, shape, tokens, convention, tflops):
    assert round(prefill_flops(shape, tokens, convention=convention, lm_head_positions=1) / 1e12, 2) == tflops
    assert set(CONVENTIONS) == {"flops", "causal", "roofline", "sparsevlm", "fastv"}


def test_a_causal_mask_halves_attention_and_nothing_else():
    full, causal = (Ledger.of(LLAVA_15_7B, 622, convention=c) for c in ("flops", "causal"))
    assert causal.attention / full.attention == pytest.approx(623 / 622 / 2)
    assert (causal.mlp, causal.projections, causal.tower) == (full.mlp, full.projections, full.tower)
    assert causal.attention == 32 * 4 * 4096 * sum(range(1, 623))


def test_the_ledger_adds_up():
    ledger = Ledger.of(LLAVA_15_7B, 622, method=2.7e9)
    assert ledger.language_model == prefill_flops(VICUNA_7B, 622)
    assert ledger.tower == tower_flops(LLAVA_15_7B)
    assert ledger.projector == projector_flops(LLAVA_15_7B, 576)
    assert ledger.lm_head == 2 * 4096 * 32064
    with_head = prefill_flops(VICUNA_7B, 622, lm_head_positions=3)
    assert with_head - ledger.language_model == 3 * 2 * 4096 * 32000
    outside = ledger.tower + ledger.projector + ledger.method + ledger.lm_head
    assert ledger.total == pytest.approx(ledger.language_model + outside)
    assert Ledger.of(LLAVA_15_7B, 622, method=2.7e9, convention="fastv").method == 1.35e9
    shown = str(ledger)
    assert "8,258.989" in shown and "method" in shown and "elementwise" not in shown
    assert "elementwise" in str(Ledger.of(LLAVA_15_7B, 622, convention="roofline"))


def test_the_divprune_paper():
    """Its script uses the questions' lengths without the system prompt; mean length 45.6, two roundings of 0.098."""
    full = prefill_flops(VICUNA_13B, 576 + 46, convention="fastv")
    assert full / 1e12 == pytest.approx(6.281, rel=0.002)
    assert prefill_flops(VICUNA_13B, 56 + 46, convention="fastv") / full == pytest.approx(0.157, abs=0.005)


def test_grouped_query_attention_is_cheaper():
    by_hand = 28 * (2 * (2 * 3584**2 + 2 * 3584 * 512 + 3 * 3584 * 18944) * 6372 + 4 * 6372**2 * 3584)
    assert prefill_flops(QWEN2_7B, 6372) == by_hand


def test_the_tower_and_the_kv_cache_of_llava_15():
    assert round(tower_flops(LLAVA_15_7B) / 1e12, 2) == 0.38
    assert round(kv_bytes(VICUNA_7B, 622) / 2**20) == 311
    assert round(kv_bytes(VICUNA_7B, 64 + 46) / 2**20) == 55
    assert kv_bytes(VICUNA_7B, 10, torch.float32.itemsize) == 2 * kv_bytes(VICUNA_7B, 10)


def test_equivalent_tokens_of_fastv():
    per_layer = [576] * 2 + [144] * 30
    assert equivalent_tokens(per_layer) == 171
    full, dropped = (prefill_flops(VICUNA_7B, [v + 46 for v in p]) for p in ([576] * 32, per_layer))
    assert 0.33 < dropped / full < 0.35


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown FLOPs convention 'macs'; choose from flops, causal,"):
        prefill_flops(VICUNA_7B, 622, convention="macs")
    with pytest.raises(ValueError, match="31 lengths for a language model of 32 layers"):
        prefill_flops(VICUNA_7B, [1] * 31)


PATCHES = {
    "unpatched": None,
    "before": [{"method": "divprune", "keep": 8}],
    "inside": [{"method": "fastv", "keep": 4, "layer": 2}],
    "both": [{"method": "random", "keep": 8}, {"method": "fastv", "keep": 0.5, "layer": 3}],
}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ledger_against_a_flop_counter(family, backend, patch):
    """To within 1 %, part by part. Transformers repeats grouped keys for the kernel, so the counter sees all heads."""
    model = tiny(family, backend)
    prompt = SyntheticPrompt.make(model, batch=2, text_tokens=TEXT)
    count_flops(model, prompt.inputs())  # the first forward leaves a trace in the model
    before, visual = model_state(model), [prompt.visual_tokens] * 4
    with vlmslim.patch(model, PATCHES[patch]) if PATCHES[patch] else nullcontext() as slim:
        patched = model_state(model)
        counted = count_flops(model, prompt.inputs())
        assert model_state(model) == patched
        if slim is not None:
            visual = slim.receipt.summary()["visual_tokens_per_layer"]
    assert changes(before, model_state(model)) == []
    ledger = Ledger.of(model.config, [v + TEXT for v in visual], crops=prompt.crops, method=counted["method"] / 2)
    for part in ("tower", "projector", "language_model", "lm_head"):
        assert 2 * getattr(ledger, part) == pytest.approx(counted[part], rel=0.01), part
    assert counted["rest"] == 0
    n, d, size = prompt.tokens, 32, prompt.visual_tokens + TEXT
    # a Gram matrix; one query, and its products with all keys
    by_hand = {"unpatched": 0, "before": 2 * n * n * d, "inside": 2 * (d * d + size * d)}
    if patch in by_hand:
        assert counted["method"] == 2 * by_hand[patch]


@pytest.mark.parametrize("name", ZOO)
def test_the_ledger_of_other_families_against_a_flop_counter(name):
    """Windowed and packed towers, patch mergers, features added later, sliding windows; and the bytes of the cache."""
    model = build(name)
    prompt = SyntheticPrompt.make(model, text_tokens=TEXT, image_size=(64, 48))
    length = prompt.visual_tokens + prompt.text_tokens
    counted = count_flops(model, prompt.inputs())
    ledger = Ledger.of(model.config, length, crops=prompt.crops, grid=prompt.grid)
    for part in ("tower", "projector", "language_model", "lm_head"):
        assert getattr(ledger, part) == pytest.approx(counted[part], rel=0.01), part
    assert counted["rest"] == 0
    with torch.inference_mode():
        cache = kv_cache(model(**prompt.inputs(), use_cache=True))
    shape = DecoderShape.from_config(model.config)
    assert cache_bytes(cache) == kv_bytes(shape, length, model.dtype.itemsize)


def test_windows_of_a_tower_cut_what_patches_see():
    """Qwen2.5-VL: a picture of 3 x 2 windows, of which the last column is half as wide."""
    shape = TowerShape.from_config(shape_config("qwen2.5-vl-7b"))
    assert (shape.layers, shape.windows, shape.window) == (32, 28, 8)
    inside = 2 * (3 * 64**2) - 3 * 64**2 + 3 * 32**2
    assert shape.pairs((1, 24, 12)) == 28 * inside + 4 * (24 * 12) ** 2


def test_sliding_windows_of_a_decoder():
    """They shorten the cache, and what a causal mask counts; kernels do the rest of the work all the same."""
    full = DecoderShape(layers=2, hidden=8, heads=2, kv_heads=1, head_dim=4, mlp=16, vocab=10)
    slides = replace(full, windows=(4, 0))
    assert kv_bytes(slides, 10, 1) == 2 * 4 * (3 + 10) and kv_bytes(slides, 3, 1) == kv_bytes(full, 3, 1)
    assert prefill_flops(slides, 10) == prefill_flops(full, 10)
    pairs = sum(min(i + 1, 4) for i in range(10)) + sum(i + 1 for i in range(10))
    by_hand = prefill_flops(full, 10, convention="causal") - 2 * 2 * (2 * 55 - pairs) * 8
    assert prefill_flops(slides, 10, convention="causal") == by_hand
    with pytest.raises(ValueError, match=r"any size: give grid=\(frames, rows, columns\)"):
        tower_flops(shape_config("qwen3-vl-8b"))


def test_counting_leaves_a_method_as_it_was():
    seen = []

    class Recording(Everything):
        def chosen(self, n, prompt):
            seen.append(vars(self).copy())
            return super().chosen(n, prompt)

    model = tiny("llava")
    inputs = SyntheticPrompt.make(model, text_tokens=TEXT).inputs()
    with vlmslim.patch(model, Recording()):
        model(**inputs)
        count_flops(model, inputs)
        model(**inputs)
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_against_a_cache(family, patch):
    model = tiny(family)
    prompt = SyntheticPrompt.make(model, batch=2, text_tokens=TEXT)
    visual = [prompt.visual_tokens] * 4
    with vlmslim.patch(model, PATCHES[patch]) if PATCHES[patch] else nullcontext() as slim, torch.inference_mode():
        cache = kv_cache(model(**prompt.inputs(), use_cache=True))
        if slim is not None:
            visual = slim.receipt.summary()["visual_tokens_per_layer"]
    theory = kv_bytes(DecoderShape.from_config(model.config), [v + TEXT for v in visual], model.dtype.itemsize)
    assert cache_bytes(cache) == 2 * theory
