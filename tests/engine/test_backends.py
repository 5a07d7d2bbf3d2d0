"""Half precision, inference mode, offloaded weights and other attention back ends."""

import importlib.util

import pytest
import torch
import torch._dynamo
from compare import close, greedy, lengths
from doubles import BUDGETED, BothOriginal, Everything, Stairs, Strided, StridedOriginal, expect, name_of, registered
from prompts import LONG_ROWS, ROWS, Picture, batch, valid, words
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim.engine.families import kv_cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.no_grad()
def test_half_precision(family, backend, dtype):
    model = tiny(family, backend, dtype)
    inputs = batch(model, LONG_ROWS)
    want = greedy(model, inputs)
    for method in ("divprune", "fastv"):
        with vlmslim.patch(model, method, keep=1.0):
            got = greedy(model, inputs)
        assert torch.equal(got[1], want[1])
    for rule in (Strided(), StridedOriginal(), Stairs()):
        references = [expect(model, row, rule) for row in LONG_ROWS]
        with vlmslim.patch(model, rule):
            out = model(**inputs)
        assert out.logits.dtype == dtype
        for i, ref in enumerate(references):
            got, want_row = out.logits[i][valid(inputs, i)].float(), ref.full_logits().float()
            assert torch.isfinite(got).all()
            # half precision alone moves these logits by this much; a wrong position or token by several units
            error = (got - want_row).abs().mean() / want_row.abs().mean()
            assert error < (0.1 if dtype == torch.bfloat16 else 0.02), error


def test_inference_mode(family, backend):
    model = tiny(family, backend)
    inputs = batch(model, LONG_ROWS)
    for rule in (Strided(), Stairs()):
        with vlmslim.patch(model, rule):
            with torch.no_grad():
                want = model(**inputs).logits
            with torch.inference_mode():
                got = model(**inputs).logits
                logits = greedy(model, inputs)[1]
            assert torch.equal(got, want)
            close(logits[:, 0], want[:, -1])


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@pytest.mark.parametrize("order", ["placed, then patched", "patched, then placed"])
def test_offloaded_by_accelerate(family, tmp_path, method, order):
    """Weights on disk while they are not used: nothing may read a parameter outside its module's forward."""
    from accelerate import dispatch_model

    model = tiny(family)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, method, keep=5):
        want, want_logits = greedy(model, inputs)
    # SigLIP's pooling head reads its weights outside of their module: it cannot be offloaded even unpatched.
    tower = "disk" if family in ("llava", "next") else "cpu"
    device_map = {"lm_head": "cpu", "model.vision_tower": tower, "model.multi_modal_projector": "cpu"}
    if hasattr(model.model, "image_newline"):
        device_map["model.image_newline"] = "cpu"
    lm = "model.language_model."
    device_map |= {lm + "embed_tokens": "cpu", lm + "norm": "cpu", lm + "rotary_emb": "cpu"}
    device_map |= {f"{lm}layers.{i}": ("disk" if i % 2 else "cpu") for i in range(DEPTH)}

    def place():
        dispatch_model(model, device_map, main_device="cpu", offload_dir=str(tmp_path), force_hooks=True)

    if order == "placed, then patched":
        place()
        slim = vlmslim.patch(model, method, keep=5)
    else:
        slim = vlmslim.patch(model, method, keep=5)
        place()
    with slim:
        got, got_logits = greedy(model, inputs)
        assert torch.equal(got.sequences, want.sequences)
        close(got_logits, want_logits)
        assert lengths(kv_cache(got)) == lengths(kv_cache(want))


@pytest.mark.slow  # flex_attention is compiled first
@pytest.mark.parametrize("implementation", ["flash_attention_2", "flex_attention"])
@torch.no_grad()
def test_other_attention_back_ends(family, implementation):
    if implementation == "flash_attention_2":
        if importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available():
            pytest.skip("flash-attn is not installed, or there is no CUDA device")
        device, dtype = "cuda", torch.float16
    else:
        device, dtype = ("cuda" if torch.cuda.is_available() else "cpu"), torch.float32
    model = tiny(family, "sdpa", dtype).to(device)
    inputs = {k: v.to(device) for k, v in batch(model, LONG_ROWS).items()}
    wanted = {}
    rules = [Everything(), Strided(), Stairs(), BothOriginal(), vlmslim.method("fastv", keep=4)]
    for rule in rules:
        with vlmslim.patch(model, rule):
            wanted[name_of(rule)] = greedy(model, inputs)[1]
    model.set_attn_implementation({"text_config": implementation})
    mask = inputs["attention_mask"].bool()
    # For a second length torch.compile makes a kernel for all lengths, whose C++ for decoding does not compile on a
    # CPU (PyTorch 2.15, patched or not). A kernel for each length does.
    with torch._dynamo.config.patch(automatic_dynamic_shapes=device == "cuda"):
        try:
            model(**inputs)
        except Exception as error:  # the unpatched model cannot do it here: not ours to test
            pytest.skip(f"{implementation} does not run on this machine unpatched: {type(error).__name__}: {error}")
        for rule in rules:
            with vlmslim.patch(model, rule):
                got = greedy(model, inputs)
                assert torch.isfinite(model(**inputs).logits[mask]).all()
            close(got[1], wanted[name_of(rule)], 2e-2 if dtype == torch.float16 else 1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_left_padding_is_finite_in_half_precision(backend, name, dtype):
    """One row of a few tokens beside one of many: most of the first is padding."""
    model = tiny("llava", backend, dtype)
    rows = [[BOS, Picture(0), 5], [BOS, *words(0, 60), Picture(1), *words(1, 9)], [BOS, 7]]
    with vlmslim.patch(model, registered(name, 2)):
        inputs = batch(model, rows)
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        steps = greedy(model, inputs)[1]
    assert torch.isfinite(logits).all()
    assert torch.isfinite(steps[:, :, 2:90]).all()
