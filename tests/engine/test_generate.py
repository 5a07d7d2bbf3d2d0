"""Unmodified `generate()`: every way of decoding, several turns, and what cannot be done says so."""

from functools import partial

import pytest
import torch
from compare import close, greedy, lengths
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
from prompts import LONG_ROWS, ROWS, SEVERAL, Clip, Picture, batch, words
from tiny import BOS, DEPTH, IMAGE, VIDEO, tiny

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

BEFORE = [Strided(), StridedOriginal(), Ragged()]
BETWEEN = [Halve(), Stairs(), Blind()]
ALL = [*BEFORE, *BETWEEN, Both(), BothOriginal()]
by_name = dict(ids=name_of)


def answers(out, inputs: dict) -> list[list[int]]:
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    return sequences[:, inputs["input_ids"].shape[1] :].tolist()


def extended(inputs: dict, sequences: torch.Tensor, more: torch.Tensor) -> dict:
    """The next turn: everything so far and `more` (B, t)."""
    ids = torch.cat([sequences, more], 1)
    extra = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), extra, dtype=torch.long)], 1)
    return dict(input_ids=ids, attention_mask=mask)


# --- ways of decoding, against generate() of an unpatched model that is fed short embeddings -------------------------

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
    """Whether this transformers, unpatched, gives beams the wrong images of a prompt with several, as 5.17 does."""
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


# --- turns -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ALL, **by_name)
@torch.no_grad()
def test_a_second_and_third_turn_reuse_the_cache(family, rule):
    model = tiny(family)
    rows = [*LONG_ROWS[:3], SEVERAL[0]]
    inputs = batch(model, rows)
    more = [torch.tensor([words(50 + i, 4) for i in range(4)]), torch.tensor([words(60 + i, 1) for i in range(4)])]
    spoken = [[] for _ in rows]
    with vlmslim.patch(model, rule):
        out, _ = greedy(model, inputs)
        turns, told = [], inputs["input_ids"].shape[1]
        for new in more:
            turn = extended(inputs, out.sequences, new)
            assert lengths(kv_cache(out))[-1] < told
            out, logits = greedy(model, turn, **{KV_CACHE: kv_cache(out)})
            turns.append((turn["input_ids"].shape[1] - inputs["input_ids"].shape[1], logits))
    spoken = answers(out, inputs)
    for i, row in enumerate(rows):
        whole = expect(model, row, rule, spoken[i]).logits()
        start = len(whole) - len(spoken[i])  # tokens before the first answer
        for said, logits in turns:
            close(logits[i], whole[start + said - 1 : start + said - 1 + logits.shape[1]])


@pytest.mark.parametrize("rule", BEFORE, **by_name)
@torch.no_grad()
def test_a_second_turn_equals_starting_over(family, rule):
    """For methods that decide before the language model: the same words, with images again and a fresh cache."""
    model = tiny(family)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, rule) as slim:
        out, _ = greedy(model, inputs)
        turn = extended(inputs, out.sequences, torch.tensor([words(70, 3), words(71, 3)]))
        reused, reused_logits = greedy(model, turn, **{KV_CACHE: kv_cache(out)})
        if isinstance(rule, Ragged):
            return  # decides by the prompt's words, and starting over they are others
        slim.reset_receipt()
        scratch, scratch_logits = greedy(model, inputs | turn)
        assert slim.receipt.summary()["images"] == 2
    assert torch.equal(reused.sequences, scratch.sequences)
    close(reused_logits, scratch_logits)
    assert lengths(kv_cache(reused)) == lengths(kv_cache(scratch))


@pytest.mark.parametrize("rule", [Strided(), StridedOriginal(), Both()], **by_name)
@torch.no_grad()
def test_a_second_turn_without_a_mask(family, rule):
    model = tiny(family)
    row = ROWS[1]
    inputs = batch(model, [row], "none")
    with vlmslim.patch(model, rule):
        out, _ = greedy(model, inputs)
        ids = torch.cat([out.sequences, torch.tensor([words(70, 3)])], 1)
        final, logits = greedy(model, dict(input_ids=ids), **{KV_CACHE: kv_cache(out)})
    close(logits[0], expect(model, row, rule, answers(final, inputs)[0]).logits()[-7:-1])


@pytest.mark.parametrize("use", ["generate", "forward"])
@pytest.mark.parametrize("rule", [Strided(), StridedOriginal(), Both(), Stairs()], **by_name)
@torch.no_grad()
def test_a_later_turn_brings_a_new_image(family, rule, use):
    """Before the language model: the new image is compressed, the old tokens stay as they are."""
    model = tiny(family)
    rows = [[BOS, Picture(0), *words(80, 4)], [BOS, *words(81, 3), Picture(1, (32, 64)), *words(82, 2)]]
    if family == "onevision":  # a row's only image is cut into tiles, one of several is not: each is alone in its turn
        rows = [[BOS, *words(80, 4), Picture(0)], [BOS, *words(81, 3), Picture(1, (32, 64)), *words(82, 2)]]
    later = [[*words(83, 2), Picture(2, (60, 60)), *words(84, 3)], [*words(85, 2), Picture(3, (60, 60)), *words(86, 3)]]
    inputs, addition = batch(model, rows), batch(model, later)
    mask = torch.cat([inputs["attention_mask"], addition["attention_mask"]], 1)
    wanted = [_two_turns_by_hand(model, row, new, rule) for row, new in zip(rows, later, strict=True)]
    with vlmslim.patch(model, rule) as slim:
        # one step of generation leaves the prompt alone in the cache
        out = model(**inputs) if use == "forward" else greedy(model, inputs, max_new_tokens=1)[0]
        cache = kv_cache(out)
        before = lengths(cache)
        images = slim.receipt.summary()["images"]
        pixels = {k: addition[k] for k in ("pixel_values", "image_sizes", "batch_num_images") if k in addition}
        if use == "forward":
            step = partial(model, addition["input_ids"], attention_mask=mask, **{KV_CACHE: cache}, **pixels)
        else:
            ids = torch.cat([inputs["input_ids"], addition["input_ids"]], 1)
            step = partial(greedy, model, dict(input_ids=ids, attention_mask=mask, **pixels), **{KV_CACHE: cache})
        if rule.layers:  # takes its decisions in the first prefill of a cache: a second one is refused, and says so
            with pytest.raises(ValueError, match="(?i)image.*later turn"):
                step()
            return
        out = step()
        logits = out.logits[:, -1] if use == "forward" else out[1][:, 0]
        out = out if use == "forward" else out[0]
        assert slim.receipt.summary()["images"] == images + 2
    for i, want in enumerate(wanted):
        close(logits[i], want)
    grown = [b - a for a, b in zip(before, lengths(kv_cache(out)), strict=True)]
    assert grown[-1] < addition["input_ids"].shape[1], "the new image was not compressed"


def _two_turns_by_hand(model, row: list, new: list, rule) -> torch.Tensor:
    """Logits of the last token, when each turn's images are treated by that turn's own decisions."""
    from prompts import visual
    from unpatched import keep_only, merged_embeddings, reference

    pieces, kept, drops, offset, total = [], [], {}, 0, 0
    for part in (row, new):
        inputs = batch(model, [part])
        ids = inputs["input_ids"][0]
        text = ids[(ids != IMAGE) & (ids != VIDEO)]
        places = visual(inputs)
        mine = keep_only(inputs, [rule.chosen(len(place), text) for place in places])
        there = [torch.isin(mine, place).nonzero()[:, 0] for place in places]
        for layer in rule.layers:
            gone = torch.zeros(len(mine), dtype=torch.bool)
            for i, place in enumerate(there):
                stay = place[rule.left(layer, len(place), len(text))]
                gone[place], gone[stay] = True, False
                there[i] = stay
            drops.setdefault(layer, []).append(gone)
        pieces.append(merged_embeddings(model, inputs)[:, mine])
        kept.append(mine + offset)
        offset += len(ids)
        total += len(mine)
    ids = torch.cat([batch(model, [part])["input_ids"] for part in (row, new)], 1)
    hidden = {layer: torch.cat(masks) for layer, masks in drops.items()}
    ref = reference(
        model, dict(input_ids=ids), torch.cat(kept), positions=rule.positions, embeds=torch.cat(pieces, 1), drops=hidden
    )
    return ref.logits()[-1]


@torch.no_grad()
def test_two_conversations_take_turns(family):
    model = tiny(family)
    rule = Both()
    with vlmslim.patch(model, rule):
        chats = []
        for row in ROWS:
            inputs = batch(model, [row])
            chats.append((inputs, greedy(model, inputs)[0]))
        for (inputs, out), row, new in zip(chats, ROWS, (words(90, 3), words(91, 3)), strict=True):
            turn = extended(inputs, out.sequences, torch.tensor([new]))
            final, logits = greedy(model, turn, **{KV_CACHE: kv_cache(out)})
            said = answers(final, inputs)[0]
            vlm = tiny(family)
            close(logits[0], expect(vlm, row, rule, said).logits()[-7:-1])


@torch.no_grad()
def test_a_video_conversation():
    model = tiny("onevision")
    row = [BOS, Clip(0), *words(0, 4)]
    inputs = batch(model, [row])
    for rule in (Strided(), Halve()):
        with vlmslim.patch(model, rule):
            out, _ = greedy(model, inputs)
            turn = extended(inputs, out.sequences, torch.tensor([words(1, 3)]))
            final, logits = greedy(model, turn, **{KV_CACHE: kv_cache(out)})
        close(logits[0], expect(model, row, rule, answers(final, inputs)[0]).logits()[-7:-1])


# --- odd prompts and other decoders ----------------------------------------------------------------------------------


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
    from transformers import DynamicCache

    model = tiny(family)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, rule):
        want, logits = greedy(model, inputs)
        got, own = greedy(model, inputs, **{KV_CACHE: DynamicCache(config=model.config.text_config)})
        assert torch.equal(own, logits)
        assert lengths(kv_cache(got)) == lengths(kv_cache(want))


@torch.no_grad()
def test_streaming(family):
    from transformers.generation.streamers import BaseStreamer

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens = []

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            pass

    model = tiny(family)
    inputs = batch(model, [ROWS[0]])
    with vlmslim.patch(model, Both()):
        want = greedy(model, inputs)[0].sequences[0].tolist()
        streamer = Collect()
        greedy(model, inputs, streamer=streamer)
    assert streamer.tokens == want


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
