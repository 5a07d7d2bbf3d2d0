"""The ledger: analytic FLOPs against the papers and against a counter, KV bytes against a cache, timings."""

import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count, permutations
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from doubles import Rule
from tiny import BACKENDS, BOS, FAMILIES, Picture, anatomy, batch, lengths, tiny, words

import vlmslim
from vlmslim.cost.bench.ideal import ideal
from vlmslim.cost.bench.prompt import Prompt
from vlmslim.cost.bench.shapes import SHAPES, build, shape_config
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
from vlmslim.cost.memory import cache_bytes, peak_memory
from vlmslim.cost.parts import count_flops, flop_counter, time_parts
from vlmslim.cost.timing import (
    Spread,
    Timing,
    interleave,
    measure,
    measure_together,
    summarise,
    time_generation,
    time_steady,
)
from vlmslim.engine.families import kv_cache

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
LLAVA_15_7B = shape_config("llava-1.5-7b")
ROW = [BOS, *words(0, 5), Picture(0, (60, 30)), *words(1, 30)]


PUBLISHED = [  # model, tokens, convention, TFLOPs as printed
    ("FastV", VICUNA_7B, 622, "fastv", 3.23),
    ("SparseVLM", VICUNA_7B, 622, "sparsevlm", 4.13),
    ("real", VICUNA_7B, 622, "flops", 8.26),
    ("AIM, image", VICUNA_7B, 576 + 40, "roofline", 8.18),
    ("AIM, video", QWEN2_7B, 6272 + 100, "roofline", 99.63),
    ("Recoverable Compression", VICUNA_7B, 576 + 60, "roofline", 8.45),
    ("GlobalCom2", VICUNA_7B, 2880, "roofline", 41.70),
]


def test_counting_flops_loads_no_torch():
    """The leaderboard counts FLOPs of stored runs, and must start at once."""
    code = "import sys, vlmslim.cost.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("paper, shape, tokens, convention, tera", PUBLISHED, ids=[row[0] for row in PUBLISHED])
def test_published_figures(paper, shape, tokens, convention, tera):
    assert round(prefill_flops(shape, tokens, convention=convention, lm_head_positions=1) / 1e12, 2) == tera


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
    outside = ledger.tower + ledger.projector + ledger.method + ledger.lm_head
    assert ledger.total() == pytest.approx(ledger.language_model + outside)
    assert ledger.total(tower=False, projector=False, method=False, lm_head=False) == ledger.language_model
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
    # AIM's published 99.63 T adds softmax, norms, activations and the LM head
    assert by_hand / 1e12 == pytest.approx(99.63, rel=0.03)


def test_the_tower_and_the_kv_cache_of_llava_15():
    assert round(tower_flops(CLIP_L_336) / 1e12, 2) == 0.38
    assert round(kv_bytes(VICUNA_7B, 622) / 2**20) == 311
    assert round(kv_bytes(VICUNA_7B, 64 + 46) / 2**20) == 55
    assert kv_bytes(VICUNA_7B, 10, torch.float32.itemsize) == 2 * kv_bytes(VICUNA_7B, 10)


def test_equivalent_tokens_of_fastv():
    per_layer = [576] * 2 + [144] * 30
    assert equivalent_tokens(per_layer) == 171
    whole, dropped = (prefill_flops(VICUNA_7B, [v + 46 for v in p]) for p in ([576] * 32, per_layer))
    assert 0.33 < dropped / whole < 0.35


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="unknown FLOPs convention 'macs'; choose from flops, causal,"):
        prefill_flops(VICUNA_7B, 622, convention="macs")
    with pytest.raises(ValueError, match="31 lengths for a language model of 32 layers"):
        prefill_flops(VICUNA_7B, [1] * 31)
    with pytest.raises(ValueError, match="at least 2"):
        time_generation(tiny("llava"), {}, new_tokens=1)
    assert set(CONVENTIONS) == {"flops", "causal", "roofline", "sparsevlm", "fastv"}


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
    with flop_counter() as counter, torch.inference_mode():
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


PATCHES = {
    "before": [{"method": "divprune", "keep": 8}],
    "inside": [{"method": "fastv", "keep": 4, "layer": 2}],
    "both": [{"method": "random", "keep": 8}, {"method": "fastv", "keep": 0.5, "layer": 3}],
}


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_patched_model_against_a_flop_counter(family, backend, patch):
    model = tiny(family, backend)
    prompt = Prompt.make(model, batch=2, text_tokens=12)
    with vlmslim.patch(model, PATCHES[patch]) as slim:
        counted = count_flops(model, prompt.inputs())
        tokens = [v + prompt.text_tokens for v in slim.receipt.summary()["visual_tokens_per_layer"]]
    ledger = Ledger.of(model.config, tokens, crops=prompt.crops, method=counted["method"] / 2)
    for part in ("tower", "projector", "language_model", "lm_head"):
        assert 2 * getattr(ledger, part) == pytest.approx(counted[part], rel=0.01), part
    assert counted["rest"] == 0
    assert 2 * ledger.total() == pytest.approx(sum(counted.values()), rel=0.01)
    n, d = prompt.tokens, 32
    if patch == "before":  # one Gram matrix an image
        assert counted["method"] == 2 * 2 * n * n * d
    if patch == "inside":  # the query of one token, and its attention to the keys in the cache
        size = prompt.visual_tokens + prompt.text_tokens
        assert counted["method"] == 2 * 2 * (d * d + size * d)


def test_parts_leave_no_trace_and_share_out_the_time():
    model = tiny("llava")
    prompt = Prompt.make(model, text_tokens=12)
    time_generation(model, prompt.inputs(), 2)
    before = anatomy(model)
    times = time_parts(model, prompt.inputs())
    assert anatomy(model) == before
    assert times["method"] == 0 and all(times[part] > 0 for part in ("tower", "projector", "language_model", "lm_head"))
    with vlmslim.patch(model, PATCHES["both"]) as slim:
        stages = [vars(stage.method).copy() for stage in slim.stages]
        assert time_parts(model, prompt.inputs())["method"] > 0
        assert [vars(stage.method) for stage in slim.stages] == stages


@pytest.mark.parametrize("patch", [None, *PATCHES])
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_bytes_against_a_cache(family, patch):
    model = tiny(family)
    prompt = Prompt.make(model, batch=2, text_tokens=12)
    visual = [prompt.visual_tokens] * 4
    with nullcontext() if patch is None else vlmslim.patch(model, PATCHES[patch]) as slim, torch.inference_mode():
        cache = kv_cache(model(**prompt.inputs(), use_cache=True))
        if patch is not None:
            visual = slim.receipt.summary()["visual_tokens_per_layer"]
    theory = kv_bytes(DecoderShape.from_config(model.config), [v + 12 for v in visual], model.dtype.itemsize)
    assert cache_bytes(cache) == 2 * theory


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
    prompt = Prompt.make(model, batch=4, text_tokens=12)
    peak_memory(model, prompt.inputs())  # the first generation makes tables that stay
    whole = peak_memory(model, prompt.inputs())
    with vlmslim.patch(model, "random", keep=2):
        assert 0 < peak_memory(model, prompt.inputs()) <= whole
    assert peak_memory(model, prompt.inputs()) == whole


@dataclass
class First(Rule):
    """The first half of an image, and from layer 2 on the first four."""

    layers: ClassVar = (2,)

    def chosen(self, n, prompt):
        return torch.arange(8)

    def left(self, layer, n, text):
        return torch.arange(4)


@pytest.mark.parametrize("images, visual", [(1, [8, 8, 4, 4]), (2, [16, 16, 13, 11])])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ideal_is_the_model_that_keeps_the_first_tokens(family, backend, images, visual):
    """Its caches have the lengths asked for, and its logits are those of a method that keeps the same tokens."""
    model = tiny(family, backend)
    prompt = Prompt.make(model, batch=2, images=images, text_tokens=9)
    time_generation(model, prompt.inputs(), 2)
    before = anatomy(model)
    options = dict(max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True)
    with ideal(model, prompt, visual) as inputs, torch.inference_mode():
        bound = model.generate(**inputs, **options)
    assert anatomy(model) == before
    assert lengths(kv_cache(bound)) == [v + 9 + 3 for v in visual]
    if images == 1:
        with vlmslim.patch(model, First()), torch.inference_mode():
            patched = model.generate(**prompt.inputs(), **options)
        torch.testing.assert_close(torch.stack(bound.logits), torch.stack(patched.logits), rtol=1e-4, atol=1e-4)


def test_the_ideal_refuses_what_cannot_be():
    model = tiny("llava")
    prompt = Prompt.make(model, text_tokens=4)
    for wrong in ([8] * 3, [4, 8, 8, 8], [17] * 4):
        with pytest.raises(ValueError, match="never rising, and at most 16"), ideal(model, prompt, wrong):
            pass
    with vlmslim.patch(model, "none"), pytest.raises(RuntimeError, match="unpatched"), ideal(model, prompt, [8] * 4):
        pass


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_have_the_size_they_say(family):
    model = tiny(family)
    prompt = Prompt.make(model, batch=2, images=2, text_tokens=9, image_size=(64, 32))
    inputs = prompt.inputs()
    assert inputs["input_ids"].shape == (2, 9 + prompt.visual_tokens)
    assert (inputs["input_ids"] == prompt.image_token).sum() == 2 * prompt.visual_tokens
    assert not torch.equal(*inputs["input_ids"])
    many = Prompt.make(model, batch=2, text_tokens=2000)  # placeholders are no words
    assert (many.inputs()["input_ids"] == prompt.image_token).sum() == 2 * many.visual_tokens
    assert not torch.equal(inputs["pixel_values"][0], inputs["pixel_values"][1])
    assert prompt.crops == (3 if family == "next" else 1)  # OneVision tiles lone images only
    with pytest.raises(ValueError, match="at least 2"):
        Prompt.make(model, text_tokens=1)


#: Parameters of the public checkpoints, in billions.
PARAMETERS = {"llava-1.5-7b": 7.063, "llava-1.5-13b": 13.351, "llava-next-7b": 7.567, "llava-onevision-7b": 8.030}


@pytest.mark.parametrize("name", SHAPES)
def test_named_shapes_are_those_of_the_public_models(name):
    with torch.device("meta"):
        model = vlmslim.cost.bench.shapes.AutoModelForImageTextToText.from_config(shape_config(name))
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 3) == PARAMETERS[name]


def test_a_shape_that_does_not_fit_says_what_it_needs(monkeypatch):
    monkeypatch.setattr("vlmslim.cost.bench.shapes.free_bytes", lambda device: 20 * 2**30)
    with pytest.raises(ValueError, match=r"the weights need 49\.7 GiB in float32 and cpu has 20\.0 GiB free"):
        build(shape_config("llava-1.5-13b"), dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="unknown shape 'llava-2'"):
        shape_config("llava-2")
    with pytest.raises(ValueError, match="llava-1.5-7b has 1 to 32 decoder layers"):
        shape_config("llava-1.5-7b", layers=33)


def test_a_shape_is_built_with_working_weights():
    config = tiny("onevision").config
    model = build(config, dtype=torch.bfloat16, device="cpu", attention="eager")
    assert model.dtype == torch.bfloat16 and not model.training
    assert model.config.text_config._attn_implementation == "eager"
    prompt = Prompt.make(model, text_tokens=4)
    with torch.inference_mode():
        assert model(**prompt.inputs()).logits.isfinite().all()
    again = build(config, dtype=torch.bfloat16, device="cpu")
    assert all(map(torch.equal, model.parameters(), again.parameters()))


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
    assert all(t.ttft_ms > 0 and t.decode_ms > 0 and t.peak_bytes is None for t in timings)


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


def test_every_round_has_an_order_of_its_own():
    order = []
    calls = {name: lambda name=name: order.append(name) or len(order) for name in "abc"}
    results = interleave(calls, repeats=40, warmup=1)
    rounds = ["".join(order[i : i + 3]) for i in range(3, len(order), 3)]
    assert len(rounds) == 40 and all(sorted(turn) == list("abc") for turn in rounds)
    assert all([order[i - 1] for i in results[name]] == [name] * 40 and min(results[name]) > 3 for name in "abc")
    followed = {(order[i], order[i + 1]) for i in range(len(order) - 1)}
    assert {pair for pair in followed if pair[0] != pair[1]} == set(permutations("abc", 2))
    again, order = order, []
    interleave(calls, repeats=40, warmup=1)
    assert order == again


def test_a_patch_is_timed_when_it_is_warm():
    model = tiny("llava")
    inputs = batch(model, [ROW], padding="none")
    ticks = count()
    timing = time_steady(model, inputs, 4, ticks.__next__)
    assert timing == Timing(4000, 1000, None, 1000, 7000)
    assert next(ticks) == 6 + 8  # both generations were timed, and the first one forgotten


def test_a_timing_splits_the_prefill():
    timing = time_generation(tiny("llava"), batch(tiny("llava"), [ROW], padding="none"), 3)
    assert 0 < timing.prefill_ms < timing.ttft_ms < timing.latency_ms
    assert timing.latency_ms == pytest.approx(timing.ttft_ms + 2 * timing.decode_ms)


def test_what_is_timed_from_where_to_where():
    """A clock that ticks when it is read: the call, the prompt, into and out of the language model, two tokens."""
    model = tiny("llava")
    inputs = batch(model, [ROW], padding="none")
    assert time_generation(model, inputs, 2, count().__next__) == Timing(4000, 1000, None, 1000, 5000)
    with vlmslim.patch(model, "fastv", keep=4):
        assert time_generation(model, inputs, 2, count().__next__) == Timing(4000, 1000, None, 1000, 5000)


def test_summary():
    reference = [Timing(10.0, 1.0, None), Timing(20.0, 2.0, None)]
    ours = [Timing(5.0, 1.0, None), Timing(10.0, 2.0, None)]
    summary = summarise(ours, reference)
    assert summary["ttft_ratio"] == 0.5
    assert summary["decode_ratio"] == 1.0
    assert summary["ttft_ms"] == 7.5
    assert summary["peak_bytes"] is None
    assert Spread.of([3.0]) == Spread(3.0, 0.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0)
