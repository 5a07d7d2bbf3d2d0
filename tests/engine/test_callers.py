"""Real callers: threads, tasks, interrupts, a patch that goes while something runs, and calls that compress nothing.

Every answer is compared with the same thing done the plain way: one row alone, one thread, greedy decoding.
"""

import asyncio
import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import greedy
from doubles import Both, BothOriginal, Halve, Ragged, Stairs, build, name_of
from prompts import ROWS, batch, varied_row, words
from snapshots import changes, model_state
from tiny import BOS, tiny
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

METHODS = [Both(), BothOriginal(), Ragged(), Stairs(), "fastv", "divprune", "globalcom2", "todre", "aim", "none"]


@pytest.fixture
def switching():
    """Let threads take turns as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# --- threads and tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_threads_share_a_patched_model(family, switching, method):
    model = tiny(family)
    inputs = [batch(model, [varied_row(i)]) for i in range(5)]
    inputs[4] = batch(model, [[BOS, *words(9, 6)]])  # without a picture
    with vlmslim.patch(model, build(method)) as slim:
        want = [greedy(model, x)[1] for x in inputs]
        counted = slim.receipt.summary()
        slim.reset_receipt()
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda x: greedy(model, x)[1], inputs))
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)
        assert slim.receipt.summary() | {"selection_ms": None} == counted | {"selection_ms": None}


@torch.no_grad()
def test_threads_on_several_models(family, switching):
    models = [tiny(family) for _ in range(2)]
    inputs = [batch(models[0], [varied_row(i)]) for i in range(4)]
    slims = [vlmslim.patch(model, build(method)) for model, method in zip(models, ("divprune", "fastv"), strict=True)]
    want = [[greedy(model, x)[1] for x in inputs] for model in models]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda model: [greedy(model, x)[1] for x in inputs], models))
    for slim in slims:
        slim.remove()
    for a, b in zip(sum(found, []), sum(want, []), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_tasks_of_an_async_server_share_a_patched_model(switching):
    model = tiny("llava")
    inputs = [batch(model, [varied_row(i)]) for i in range(4)]

    async def serve():
        return await asyncio.gather(*(asyncio.to_thread(greedy, model, x) for x in inputs))

    with vlmslim.patch(model, Both()):
        want = [greedy(model, x)[1] for x in inputs]
        found = asyncio.run(serve())
    for (_, a), b in zip(found, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
@torch.no_grad()
def test_soak(switching):
    """Four threads, 500 generations each: no wrong answer, and nothing grows."""
    model = tiny("llava")
    inputs = [batch(model, [varied_row(i)]) for i in range(12)]
    with vlmslim.patch(model, Both()) as slim:
        want = [greedy(model, x)[0].sequences for x in inputs]

        def work(thread: int) -> int:
            picks = [(thread + 5 * i) % len(inputs) for i in range(500)]
            return sum(not torch.equal(greedy(model, inputs[i])[0].sequences, want[i]) for i in picks)

        def alive() -> int:
            gc.collect()
            return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

        before, gate = alive(), model.model.forward
        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(work, range(4))) == 0
        assert alive() <= before + 100, "tensors of ended forwards are still held"
        assert gate.caches == 0
        assert slim.receipt.summary()["prompts"] == 12 + 2000


# --- forwards that die ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
@pytest.mark.parametrize("place", ["tower", "projector", "first layer", "last layer", "norm", "head"])
@torch.no_grad()
def test_an_interrupted_forward_leaves_nothing(error, place):
    model = tiny("llava")
    lm = model.model.language_model
    module = {
        "tower": model.model.vision_tower,
        "projector": model.model.multi_modal_projector,
        "first layer": lm.layers[0],
        "last layer": lm.layers[-1],
        "norm": lm.norm,
        "head": model.lm_head,
    }[place]
    inputs, embeds = batch(model, ROWS), torch.ones(1, 4, 32)
    alone = lm(inputs_embeds=embeds).last_hidden_state
    text = batch(model, [[BOS, *words(3, 6)]])
    plain = model(**text).logits

    def stop(*_):
        raise error

    with vlmslim.patch(model, Both()):
        want = greedy(model, inputs)[1]
        hook = module.register_forward_pre_hook(stop)
        with pytest.raises(error):
            model(**inputs)
        hook.remove()
        assert torch.equal(lm(inputs_embeds=embeds).last_hidden_state, alone)
        assert torch.equal(model(**text).logits, plain)
        assert torch.equal(greedy(model, inputs)[1], want)


# --- a patch that is removed while something runs ---------------------------------------------------------------------


def state(model, inputs: dict) -> dict:
    """The state of a model that has run: transformers adds hooks of its own to a model that runs the first time."""
    greedy(model, inputs)
    return model_state(model)


class OneByOne(BaseStreamer):
    """A reader that takes tokens when it likes."""

    def __init__(self, before_token: int, then):
        self.left, self.then, self.tokens = before_token, then, []

    def put(self, value):
        self.tokens += value.flatten().tolist()
        self.left -= 1
        if self.left == 0:
            self.then()

    def end(self):
        pass


@pytest.mark.parametrize("method", METHODS, ids=str)
@torch.no_grad()
def test_a_streamed_answer_ends_as_it_began(family, method):
    model = tiny(family)
    inputs = batch(model, [ROWS[0]])
    before = state(model, inputs)
    with vlmslim.patch(model, build(method)):
        want = greedy(model, inputs)[0].sequences[0].tolist()
    slim = vlmslim.patch(model, build(method))
    streamer = OneByOne(3, slim.remove)
    model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert streamer.tokens == want
    gc.collect()
    assert changes(before, model_state(model)) == []


@pytest.mark.parametrize("method", [Both(), BothOriginal(), Stairs()], ids=name_of)
@torch.no_grad()
def test_a_conversation_goes_on_after_its_patch(family, method):
    model = tiny(family)
    inputs = batch(model, [ROWS[0]])
    before = state(model, inputs)
    unpatched = greedy(model, inputs)[1]
    with vlmslim.patch(model, method):
        outputs = [greedy(model, inputs)[0] for _ in range(2)]
        ids = torch.cat([outputs[0].sequences, torch.tensor([words(3, 4)])], 1)
        turn = dict(input_ids=ids, attention_mask=torch.ones_like(ids))
        want = greedy(model, turn, **{KV_CACHE: kv_cache(outputs[0])})[1]
    assert torch.equal(greedy(model, inputs)[1], unpatched), "a new prompt is not patched"
    assert torch.equal(greedy(model, turn, **{KV_CACHE: kv_cache(outputs[1])})[1], want)
    with vlmslim.patch(model, method):  # another patch takes over the caches of the one before
        again = greedy(model, inputs)[0]
    with vlmslim.patch(model, "none"):
        assert torch.equal(greedy(model, turn, **{KV_CACHE: kv_cache(again)})[1], want)
    del outputs, again
    gc.collect()
    assert changes(before, model_state(model)) == []


@torch.no_grad()
def test_a_patch_is_removed_inside_a_forward_of_another_thread():
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    before = state(model, inputs)
    inside, go_on = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        go_on.wait(10)

    slim = vlmslim.patch(model, Both())
    want = model(**inputs).logits
    hook = model.model.language_model.layers[1].register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: torch.no_grad()(model)(**inputs).logits)
        inside.wait(10)
        slim.remove()
        hook.remove()
        other = vlmslim.patch(model, Halve())
        middle = model(**inputs).logits
        go_on.set()
        assert torch.equal(answer.result(), want)
    assert torch.equal(model(**inputs).logits, middle)
    other.remove()
    del answer
    gc.collect()
    assert changes(before, model_state(model)) == []


@torch.no_grad()
def test_a_compressed_cache_on_an_unpatched_model_is_a_clear_error():
    model, other = tiny("llava"), tiny("llava")
    inputs = batch(model, [ROWS[0]])
    with vlmslim.patch(model, Both()):
        cache = kv_cache(model(**inputs, use_cache=True))
    turn = dict(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + 1))
    with pytest.raises(RuntimeError, match="visual tokens were dropped"):
        other(**turn, **{KV_CACHE: cache})


@torch.no_grad()
def test_a_cache_that_lost_its_plan_is_a_clear_error():
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    with vlmslim.patch(model, Both()):
        cache = kv_cache(model(**inputs, use_cache=True))
        bare = DynamicCache()
        for i, layer in enumerate(cache.layers):
            bare.update(layer.keys, layer.values, i)
        turn = dict(input_ids=torch.tensor([[5]]), attention_mask=torch.ones(1, inputs["input_ids"].shape[1] + 1))
        with pytest.raises(ValueError, match="copy.deepcopy"):
            model(**turn, **{KV_CACHE: bare})


# --- what needs no compression ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "rows"), [("none", ROWS), (Both(), [[BOS, *words(3, 6)]])], ids=["none", "text"])
@torch.no_grad()
def test_a_static_cache_where_nothing_goes(family, method, rows):
    model = tiny(family)
    inputs = batch(model, rows)
    static = dict(max_new_tokens=3, do_sample=False, cache_implementation="static")
    want = model.generate(**inputs, **static)
    with vlmslim.patch(model, method) as slim:
        assert torch.equal(model.generate(**inputs, **static), want)
        assert slim.receipt.images == (2 if method == "none" else 0)


@pytest.mark.parametrize("method", ["none", "divprune"])
def test_continuous_batching_of_text(method):
    from transformers import ContinuousBatchingConfig, GenerationConfig

    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16)  # by default it takes most of the memory
    model = tiny("llava")
    prompts = [words(0, 6), words(1, 5)]
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def answer() -> list:
        results = model.generate_batch(
            inputs=prompts, generation_config=settings, continuous_batching_config=small, progress_bar=False
        )
        return [results[name].generated_tokens for name in sorted(results)]

    want = answer()
    with vlmslim.patch(model, build(method)):
        assert answer() == want and all(map(len, want))
