"""Real callers: threads, tasks, interrupts, packed rows, guesses, hidden pictures, caches that move, a patch that goes.

Every answer is compared with the same thing done the plain way: one row alone, one thread, greedy decoding.
"""

import asyncio
import copy
import gc
import io
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from compare import close, greedy
from doubles import Both, BothOriginal, Halve, Ragged, Rule, Stairs, Strided, StridedOriginal, name_of
from prompts import ROWS, Picture, batch, words
from snapshots import changes, model_state
from tiny import BOS, IMAGE, tiny
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

METHODS = [Both(), BothOriginal(), Ragged(), Stairs(), "fastv", "divprune", "globalcom2", "todre", "aim", "none"]
by_name = dict(ids=str)


def patched(model, method):
    return vlmslim.patch(model, method, **({"keep": 5} if isinstance(method, str) and method != "none" else {}))


def row(i: int) -> list:
    return [BOS, *words(i, i % 3), Picture(i, [(60, 30), (32, 64), (60, 60)][i % 3]), *words(50 + i, 3 + i % 4)]


@pytest.fixture
def switching():
    """Let threads take turns as often as possible."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


# --- threads and tasks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, **by_name)
@torch.no_grad()
def test_threads_share_a_patched_model(family, switching, method):
    model = tiny(family)
    inputs = [batch(model, [row(i)]) for i in range(5)]
    inputs[4] = batch(model, [[BOS, *words(9, 6)]])  # without a picture
    with patched(model, method) as slim:
        want = [greedy(model, x)[1] for x in inputs]
        counted = slim.receipt.summary()
        slim.reset_receipt()
        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(lambda x: greedy(model, x)[1], inputs))
        for a, b in zip(found, want, strict=True):
            assert torch.equal(a, b)
        ours = slim.receipt.summary()
        assert {k: v for k, v in ours.items() if k != "selection_ms"} == {
            k: v for k, v in counted.items() if k != "selection_ms"
        }


@torch.no_grad()
def test_threads_on_several_models(family, switching):
    models = [tiny(family) for _ in range(2)]
    inputs = [batch(models[0], [row(i)]) for i in range(4)]
    slims = [patched(model, method) for model, method in zip(models, ("divprune", "fastv"), strict=True)]
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
    inputs = [batch(model, [row(i)]) for i in range(4)]

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
    inputs = [batch(model, [row(i)]) for i in range(12)]
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


@pytest.mark.parametrize("method", METHODS, **by_name)
@torch.no_grad()
def test_a_streamed_answer_ends_as_it_began(family, method):
    model = tiny(family)
    inputs = batch(model, [ROWS[0]])
    before = state(model, inputs)
    with patched(model, method):
        want = greedy(model, inputs)[0].sequences[0].tolist()
    slim = patched(model, method)
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


# --- rows of a cache --------------------------------------------------------------------------------------------------

CUT = [Both(), BothOriginal(), Stairs(), Strided(), Ragged()]


def prefilled(model, rows) -> tuple:
    inputs = batch(model, rows)
    return kv_cache(model(**inputs, use_cache=True)), inputs["attention_mask"]


def next_logits(model, cache, mask, tokens: list[int]) -> torch.Tensor:
    """The logits of one more token for each row."""
    mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=mask.dtype)], 1)
    return model(input_ids=torch.tensor(tokens)[:, None], attention_mask=mask, **{KV_CACHE: cache}).logits[:, -1]


MOVES = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
    "reorder and drop": (lambda cache: cache.reorder_cache(torch.tensor([1, 1, 2])), [1, 1, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "select by mask": (lambda cache: cache.batch_select_indices(torch.tensor([False, True, True])), [1, 2]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
}


@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("method", CUT, ids=name_of)
@torch.no_grad()
def test_the_plan_moves_with_the_rows_of_a_cache(family, method, move):
    change, order = MOVES[move]
    model, rows = tiny(family), [row(i) for i in range(3)]
    with vlmslim.patch(model, method):
        cache, mask = prefilled(model, rows)
        change(cache)
        found = next_logits(model, cache, mask[order], [7 + i for i in order])
        for i, logits in zip(order, found, strict=True):
            alone, ones = prefilled(model, [rows[i]])
            close(logits, next_logits(model, alone, ones, [7 + i])[0])


@pytest.mark.parametrize("method", CUT, ids=name_of)
@torch.no_grad()
def test_copies_of_a_cache(method):
    model = tiny("llava")
    with vlmslim.patch(model, method):
        cache, mask = prefilled(model, [ROWS[0]])
        file = io.BytesIO()
        torch.save(cache, file)
        file.seek(0)
        copies = [copy.deepcopy(cache), torch.load(file, weights_only=False)]
        want = next_logits(model, cache, mask, [7])
        for other in copies:
            assert torch.equal(next_logits(model, other, mask, [7]), want)


@torch.no_grad()
def test_a_reset_cache_is_an_empty_one():
    model = tiny("llava")
    text = batch(model, [[BOS, *words(3, 6)]])
    plain = greedy(model, text)[1]
    with vlmslim.patch(model, Both()):
        cache, _ = prefilled(model, [ROWS[0]])
        kind = type(cache)
        cache.reset()
        assert type(cache) is DynamicCache is not kind
        assert torch.equal(greedy(model, text, **{KV_CACHE: cache})[1], plain)


@pytest.mark.parametrize("method", [Both(), BothOriginal(), Stairs()], ids=name_of)
@torch.no_grad()
def test_crops_of_a_cache(method):
    """What came after the picture may be cropped. A crop into the shortened prompt is an error."""
    model = tiny("llava")
    with vlmslim.patch(model, method):
        cache, mask = prefilled(model, [ROWS[0]])
        want = next_logits(model, copy.deepcopy(cache), mask, [7])
        next_logits(model, cache, mask, [9])
        cache.crop(-1)
        close(next_logits(model, cache, mask, [7]), want, 1e-5)
        cache.crop(-7)  # the decoded token, the five words, and one token of the picture
        with pytest.raises(ValueError, match="cropped into its compressed prompt"):
            next_logits(model, cache, mask, [7])


@torch.no_grad()
def test_other_rows_than_the_cache_holds_are_a_clear_error():
    model = tiny("llava")
    with vlmslim.patch(model, Both()):
        cache, mask = prefilled(model, ROWS)
        for layer in cache.layers:
            layer.batch_select_indices(torch.tensor([1]))
        with pytest.raises(ValueError, match="holds 2 rows and 1 came in"):
            next_logits(model, cache, mask[1:], [7])


# --- packed rows ------------------------------------------------------------------------------------------------------


def packed(model, rows) -> dict:
    singles = [batch(model, [one]) for one in rows]
    inputs = {
        "input_ids": torch.cat([x["input_ids"] for x in singles], 1),
        "position_ids": torch.cat([torch.arange(x["input_ids"].shape[1]) for x in singles])[None],
        "use_cache": False,
    }
    for name in ("pixel_values", "image_sizes", "batch_num_images"):
        if any(name in x for x in singles):
            inputs[name] = torch.cat([x[name] for x in singles if name in x])
    return inputs


@pytest.mark.parametrize("method", [*CUT, "fastv", "divprune", "todre", "aim"], **by_name)
@torch.no_grad()
def test_packed_samples_are_compressed_one_by_one(family, backend, method):
    model = tiny(family, backend)
    rows = [row(0), row(1), [BOS, *words(5, 4)], row(3)]
    inputs = packed(model, rows)
    with patched(model, method) as slim:
        want = [model(**batch(model, [one]), use_cache=False, output_hidden_states=True) for one in rows]
        slim.reset_receipt()
        found = model(**inputs, output_hidden_states=True)
        assert slim.receipt.prompts == 4
    close(found.logits[0], torch.cat([x.logits[0] for x in want]))
    for i, hidden in enumerate(found.hidden_states):
        close(hidden[0], torch.cat([x.hidden_states[i][0] for x in want]))


def test_gradients_of_packed_samples():
    model = tiny("llava")
    inputs = packed(model, ROWS)
    with vlmslim.patch(model, Both()):
        model(**inputs).logits.square().sum().backward()
        found = model.model.multi_modal_projector.linear_1.weight.grad.clone()
        model.zero_grad()
        sum(model(**batch(model, [one]), use_cache=False).logits.square().sum() for one in ROWS).backward()
    close(found, model.model.multi_modal_projector.linear_1.weight.grad, 1e-3)


@torch.no_grad()
def test_packed_samples_with_a_cache_are_a_clear_error():
    model = tiny("llava")
    with vlmslim.patch(model, Both()), pytest.raises(ValueError, match="use_cache=False"):
        model(**packed(model, ROWS) | {"use_cache": True})


# --- where the prompt ends --------------------------------------------------------------------------------------------


class Last(Rule):
    """Looks at the last token between layers, and at the words before the language model."""

    layers = (1,)

    def chosen(self, n, prompt):
        return torch.arange(int(prompt.sum()) % 4, n)

    def retain(self, tokens):
        last = tokens.hidden[torch.arange(len(tokens.last)), tokens.last]
        score = torch.einsum("bsd,bd->bs", tokens.hidden, last)
        return tokens.top(score, 3) | (tokens.image == 0)


LOOKING = [Last(), "fastv", "todre", "aim", "recoverable"]


def looking(method):
    if method == "fastv":
        return vlmslim.method("fastv", keep=3)
    if method == "todre":
        return [{"method": "todre", "keep": 8, "tau": None}]
    return vlmslim.method("aim", keep=8) if method == "aim" else method


@pytest.mark.parametrize("method", LOOKING[:4], **by_name)
@torch.no_grad()
def test_guesses_do_not_change_what_a_method_sees(family, method):
    model = tiny(family)
    repeated = [BOS, Picture(0), *words(0, 3) * 4]
    inputs = batch(model, [repeated])
    with vlmslim.patch(model, looking(method)):
        want, logits = greedy(model, inputs, max_new_tokens=12)
        got, own = greedy(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)
    assert torch.equal(got.sequences, want.sequences)
    close(own, logits)


@pytest.mark.parametrize("method", LOOKING[:4], **by_name)
@torch.no_grad()
def test_a_scored_answer_does_not_change_what_a_method_sees(family, method):
    """The logits of an answer, in one forward, are those of decoding it."""
    model = tiny(family)
    answer = words(33, 3)
    inputs = batch(model, [row(1)])
    whole = batch(model, [[*row(1), *answer]])
    with vlmslim.patch(model, looking(method)):
        cache = kv_cache(first := model(**inputs, use_cache=True))
        steps, mask = [first.logits[:, -1]], inputs["attention_mask"]
        for token in answer:
            mask = torch.cat([mask, torch.ones(1, 1, dtype=mask.dtype)], 1)
            step = model(input_ids=torch.tensor([[token]]), attention_mask=mask, **{KV_CACHE: cache})
            steps.append(step.logits[:, -1])
        close(model(**whole, logits_to_keep=len(answer) + 1).logits[0], torch.cat(steps))


# --- what a mask hides ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Both(), BothOriginal(), Stairs(), Strided(), StridedOriginal()], ids=name_of)
@torch.no_grad()
def test_a_hidden_picture_is_left_alone(family, method):
    """The first of two pictures is masked: the rest of the row reads as if it were not there."""
    model = tiny(family)
    pictures = [Picture(3, (60, 60)), Picture(4, (60, 60))]
    inputs = batch(model, [[BOS, pictures[0], *words(6, 2), pictures[1], *words(7, 4)]])
    ids = inputs["input_ids"][0]
    second = int((ids == IMAGE).nonzero()[-1]) - int((ids == IMAGE).sum()) // 2 + 1
    inputs["attention_mask"][0, : second - 2][ids[: second - 2] == IMAGE] = 0
    shown = inputs["attention_mask"][0].bool()
    hidden = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    hidden = {name: value[1:] if name != "batch_num_images" else value for name, value in hidden.items()}
    if family == "onevision":
        hidden["batch_num_images"] = torch.tensor([2])  # the same tokens as beside the other picture
    short = dict(input_ids=inputs["input_ids"][:, shown], position_ids=(shown.long().cumsum(0) - 1)[shown][None])
    if family in ("next", "onevision"):
        assert (ids == IMAGE).sum() % 2 == 0
    with vlmslim.patch(model, method) as slim:
        found = model(**inputs, position_ids=(shown.long().cumsum(0) - 1).clamp(min=0)[None]).logits[0, shown]
        assert slim.receipt.images == 1
        want = model(**short, **hidden, attention_mask=torch.ones_like(short["input_ids"])).logits[0]
    close(found, want)


@torch.no_grad()
def test_every_picture_is_hidden():
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    inputs["attention_mask"][inputs["input_ids"] == IMAGE] = 0
    want = model(**inputs).logits
    with vlmslim.patch(model, Both()) as slim:
        assert torch.equal(model(**inputs).logits, want)
        assert slim.receipt.images == 0 and slim.receipt.text_prompts == 1


# --- what needs no compression ----------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_static_cache_under_none(family):
    model = tiny(family)
    inputs = batch(model, ROWS)
    static = dict(max_new_tokens=3, do_sample=False, cache_implementation="static")
    want = model.generate(**inputs, **static)
    with vlmslim.patch(model, "none") as slim:
        assert torch.equal(model.generate(**inputs, **static), want)
        assert slim.receipt.images == 2


@torch.no_grad()
def test_a_static_cache_of_text(family):
    model = tiny(family)
    inputs = batch(model, [[BOS, *words(3, 6)]])
    static = dict(max_new_tokens=3, do_sample=False, cache_implementation="static")
    want = model.generate(**inputs, **static)
    with vlmslim.patch(model, Both()):
        assert torch.equal(model.generate(**inputs, **static), want)


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
    with patched(model, method):
        assert answer() == want and all(map(len, want))
