"""Unmodified `generate()`: every way of decoding, odd prompts, and what cannot be done says so."""

import pytest
import torch
from compare import answers, close, greedy, lengths
from doubles import (
    Blind,
    Both,
    BothOriginal,
    Everything,
    First,
    Halve,
    Ragged,
    Stairs,
    Strided,
    StridedOriginal,
    expect,
    name_of,
)
from prompts import LONG_ROWS, ROWS, SEVERAL, Picture, batch, words
from tiny import BOS, DEPTH, tiny
from transformers import DynamicCache

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

ALL = [Strided(), StridedOriginal(), Ragged(), Halve(), Stairs(), Blind(), Both(), BothOriginal()]
BETWEEN = ALL[3:6]
by_name = dict(ids=name_of)


# --- ways of decoding, against generate() of an unpatched model that is fed short embeddings --------------------------


WAYS = {
    "greedy": dict(do_sample=False),
    "sampling": dict(do_sample=True, temperature=1.5, top_k=0),
    "top-p": dict(do_sample=True, temperature=2.0, top_p=0.9),
    "beams": dict(do_sample=False, num_beams=3),
    "beam sampling": dict(do_sample=True, num_beams=3, temperature=1.5),
    "several beams back": dict(do_sample=False, num_beams=4, num_return_sequences=2),
    "several samples": dict(do_sample=True, num_return_sequences=3, temperature=1.5),
    "no cache": dict(do_sample=False, use_cache=False),
    "beams, no cache": dict(do_sample=False, num_beams=3, use_cache=False),
    "repetition penalty": dict(do_sample=False, no_repeat_ngram_size=1),
}


def beams_lose_images(model, *rows) -> bool:
    """Tell if this transformers, unpatched, gives beams the wrong images of a prompt with several, as 5.17 does."""
    options = dict(max_new_tokens=1, do_sample=False, num_beams=3, return_dict_in_generate=True, output_logits=True)
    want = [expect(model, row, Everything()).logits()[-1] for row in rows for _ in range(3)]
    (found,) = model.generate(**batch(model, rows), **options).logits
    return not torch.allclose(found, torch.stack(want), atol=1e-3)


@pytest.mark.parametrize("row", [ROWS[1], SEVERAL[0]], ids=["one image", "several images"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_every_way_of_decoding_equals_short_embeddings(family, way, row):
    model = tiny(family)
    expands = "num_beams" in WAYS[way] or "num_return_sequences" in WAYS[way]
    if expands and row is SEVERAL[0] and beams_lose_images(model, row):
        pytest.skip("this version of transformers mixes up the images of beams, unpatched too")
    options = dict(max_new_tokens=6, return_dict_in_generate=True, output_logits=True, **WAYS[way])
    short = expect(model, row, Strided()).embeds
    if way == "repetition penalty":  # looks at ids, which short embeddings don't have: greedy then
        options.pop("no_repeat_ngram_size")
    torch.manual_seed(7)
    want = model.generate(inputs_embeds=short, attention_mask=torch.ones(short.shape[:2]), **options)
    inputs = batch(model, [row])
    torch.manual_seed(7)
    with vlmslim.patch(model, Strided()):
        got = model.generate(**inputs, **options)
    assert answers(got, inputs) == want.sequences.tolist()
    assert torch.equal(got.sequences[:1, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    for a, b in zip(got.logits, want.logits, strict=True):
        close(a, b)
    if options.get("use_cache", True):
        assert lengths(kv_cache(got)) == lengths(kv_cache(want))


@pytest.mark.parametrize("rule", ALL, **by_name)
@torch.no_grad()
def test_beams_of_a_batch_are_scored_as_recomputed(family, rule):
    """Each returned beam's score is the mean log-probability of its tokens, recomputed whole without cache or patch."""
    model = tiny(family)
    rows = [*LONG_ROWS[:3], SEVERAL[0]]
    if beams_lose_images(model, *rows):
        pytest.skip("this version of transformers mixes up the images of beams, unpatched too")
    inputs = batch(model, rows)
    options = dict(max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
    with vlmslim.patch(model, rule):
        out = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
        singles = [model.generate(**batch(model, [row]), **options)[:, -4:].tolist() for row in rows]
    found = answers(out, inputs)
    for i, row in enumerate(rows):
        assert found[2 * i : 2 * i + 2] == singles[i]
        for j in (2 * i, 2 * i + 1):
            logits = expect(model, row, rule, found[j]).logits()[-5:-1]
            score = logits.log_softmax(-1).gather(1, torch.tensor(found[j])[:, None]).mean()
            close(out.sequences_scores[j], score)


@pytest.mark.parametrize("rule", [Strided(), Stairs()], **by_name)
def test_sampling_is_repeatable_with_a_seed(family, rule):
    model = tiny(family)
    inputs = batch(model, ROWS)
    found = []
    with vlmslim.patch(model, rule):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            found.append(model.generate(**inputs, do_sample=True, top_k=0, temperature=2.0, max_new_tokens=8))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("rule", [First(), Strided(), StridedOriginal(), vlmslim.method("divprune", keep=5)], **by_name)
@torch.no_grad()
def test_cached_decode_equals_uncached(family, backend, rule):
    model = tiny(family, backend)
    inputs = batch(model, [*LONG_ROWS, *SEVERAL])
    with vlmslim.patch(model, rule):
        cached, cached_logits = greedy(model, inputs)
        uncached, uncached_logits = greedy(model, inputs, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    close(cached_logits, uncached_logits)
    assert max(lengths(kv_cache(cached))) < cached.sequences.shape[1] - 1, "nothing was removed"


@pytest.mark.parametrize("rule", [*BETWEEN, vlmslim.method("fastv", keep=5)], **by_name)
@torch.no_grad()
def test_between_layers_without_a_cache_decides_anew_each_step(family, rule):
    """Works and stays finite; the first step, before any decision can differ, equals the cached one."""
    model = tiny(family)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, rule):
        cached = greedy(model, inputs)[1]
        uncached = greedy(model, inputs, use_cache=False)[1]
    assert torch.isfinite(uncached).all()
    close(uncached[:, 0], cached[:, 0])


@pytest.mark.parametrize("rule", ALL, **by_name)
@torch.no_grad()
def test_decoding_by_hand_with_and_without_a_mask(family, rule):
    """`model(token, cache=...)` as a serving loop calls it, one token and several at a time."""
    model = tiny(family)
    row, more = ROWS[1], words(40, 5)
    want = expect(model, row, rule, more).logits()[-5:]
    inputs = batch(model, [row])
    length = inputs["input_ids"].shape[1]
    for pieces in ([1, 1, 1, 1, 1], [5], [2, 3]):
        for masked in (True, False):
            with vlmslim.patch(model, rule):
                if masked:
                    cache = kv_cache(model(**inputs))
                else:
                    cache = kv_cache(model(**{k: v for k, v in inputs.items() if k != "attention_mask"}))
                got, done = [], 0
                for n in pieces:
                    step = dict(input_ids=torch.tensor([more[done : done + n]]), **{KV_CACHE: cache})
                    done += n
                    if masked:
                        step["attention_mask"] = torch.ones(1, length + done, dtype=torch.long)
                    got.append(model(**step).logits[0])
            close(torch.cat(got), want)


@pytest.mark.filterwarnings("ignore:.past_key_values. is deprecated")
@pytest.mark.parametrize("name", sorted({KV_CACHE, "past_key_values"}))
@torch.no_grad()
def test_the_cache_goes_by_its_old_name_too(family, name):
    model = tiny(family)
    row, rule = ROWS[1], ALL[0]
    token = words(40, 1)
    want = expect(model, row, rule, token).logits()[-1]
    with vlmslim.patch(model, rule):
        cache = kv_cache(model(**batch(model, [row], "none")))
        out = model.model(input_ids=torch.tensor([token]), **{name: cache})
    close(model.lm_head(out.last_hidden_state)[0, -1], want)


# --- odd prompts and other decoders -----------------------------------------------------------------------------------


@torch.no_grad()
def test_one_token_prompts(family):
    model = tiny(family)
    one = dict(input_ids=torch.tensor([[5]]))
    want, want_logits = greedy(model, one)
    single = batch(model, [[Picture(0), 7]])
    with vlmslim.patch(model, "uniform", keep=1):
        got, got_logits = greedy(model, one)
        assert torch.equal(got_logits, want_logits)
        out = greedy(model, single)[0]  # one visual token and one word
        assert lengths(kv_cache(out)) == [1 + 1 + 5] * DEPTH
        masked = greedy(model, one | dict(attention_mask=torch.ones(1, 1, dtype=torch.long)))[1]
        assert torch.equal(masked, want_logits)
    with vlmslim.patch(model, "fastv", keep=1):
        out = greedy(model, single)[0]
        got, got_logits = greedy(model, one)
        assert torch.equal(got_logits, want_logits)
        assert lengths(kv_cache(out))[2:] == [1 + 1 + 5] * 2


@torch.no_grad()
def test_one_token_is_not_taken_for_a_decode_step(family):
    """A prefill of one token, a decode of several, and a prompt that is an image alone."""
    model = tiny(family)
    one = dict(input_ids=torch.tensor([[5], [6]]))
    want = model(**one).logits
    with vlmslim.patch(model, Both()):
        assert torch.equal(model(**one).logits, want)
        cache = kv_cache(model(**batch(model, [ROWS[0]])))
        assert torch.equal(model(**one).logits, want), "another conversation's plan was used"
        single = batch(model, [[Picture(0)]])
        assert lengths(kv_cache(model(**single)))[0] == (single["input_ids"].shape[1] + 1) // 2
        more = words(3, 4)
        several = model(torch.tensor([more]), **{KV_CACHE: cache}).logits[0]
    close(several, expect(model, ROWS[0], Both(), more).logits()[-4:])


def works_or_says_so(run, want, word: str):
    """`run()` gives what `want` is, or raises an error that names the feature."""
    try:
        got = run()
    except (NotImplementedError, ValueError) as error:
        assert word in str(error).lower(), f"the error does not say what is not supported: {error}"
        return
    assert torch.equal(got, want)


@pytest.mark.parametrize("rule", [Strided(), Stairs()], **by_name)
@torch.no_grad()
def test_chunked_prefill_works_or_says_so(family, rule):
    model = tiny(family)
    inputs = batch(model, [ROWS[1]])
    whole, parts = (greedy(model, inputs, **chunk)[1] for chunk in ({}, {"prefill_chunk_size": 7}))
    if not torch.allclose(whole, parts, atol=1e-3):
        pytest.skip("this version of transformers answers otherwise when it prefills in chunks, unpatched too")
    with vlmslim.patch(model, rule):
        want = greedy(model, inputs)[0].sequences
        for chunk in (7, 1000):
            works_or_says_so(lambda n=chunk: greedy(model, inputs, prefill_chunk_size=n)[0].sequences, want, "chunk")
        assert torch.equal(greedy(model, inputs)[0].sequences, want), "the failed attempt left something behind"


@pytest.mark.parametrize("rule", [Strided(), StridedOriginal(), Stairs()], **by_name)
@torch.no_grad()
def test_prompt_lookup_decoding_works_or_says_so(family, rule):
    model = tiny(family)
    row = [BOS, Picture(0), *words(0, 3) * 4]
    inputs = batch(model, [row])
    with vlmslim.patch(model, rule):
        want = greedy(model, inputs, max_new_tokens=12)[0].sequences
        works_or_says_so(
            lambda: greedy(model, inputs, max_new_tokens=12, prompt_lookup_num_tokens=3)[0].sequences, want, "assist"
        )


@torch.no_grad()
def test_a_static_cache_is_a_clear_error(family):
    model = tiny(family)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, Strided()), pytest.raises((NotImplementedError, ValueError), match="(?i)static"):
        model.generate(**inputs, max_new_tokens=3, cache_implementation="static")


@pytest.mark.parametrize("rule", [Strided(), Stairs()], **by_name)
@torch.no_grad()
def test_offloaded_and_caller_made_caches(family, rule):
    model = tiny(family)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, rule):
        want, logits = greedy(model, inputs)
        got, own = greedy(model, inputs, **{KV_CACHE: DynamicCache(config=model.config.text_config)})
        assert torch.equal(own, logits)
        assert lengths(kv_cache(got)) == lengths(kv_cache(want))


@torch.no_grad()
def test_end_of_sequence_stops_rows_separately(family):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, Both()):
        free, _ = greedy(model, inputs)
        stop = answers(free, inputs)[0][1]
        got, logits = greedy(model, inputs, eos_token_id=stop, pad_token_id=0)
        for i, row in enumerate(LONG_ROWS):
            single = batch(model, [row])
            want = answers(greedy(model, single, eos_token_id=stop, pad_token_id=0)[0], single)[0]
            found = answers(got, inputs)[i]
            assert found[: len(want)] == want
            assert not any(found[len(want) :])
