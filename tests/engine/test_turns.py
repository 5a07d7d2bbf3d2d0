"""Conversations: later turns reuse the shortened cache, and may bring new images."""

from functools import partial

import pytest
import torch
from compare import answers, close, greedy, lengths
from doubles import Blind, Both, BothOriginal, Halve, Ragged, Stairs, Strided, StridedOriginal, decide, expect, name_of
from prompts import LONG_ROWS, ROWS, SEVERAL, Clip, Picture, batch, words
from tiny import BOS, tiny
from unpatched import merged_embeddings, reference

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

ALL = [Strided(), StridedOriginal(), Ragged(), Halve(), Stairs(), Blind(), Both(), BothOriginal()]
BEFORE = ALL[:3]
by_name = dict(ids=name_of)


def extended(inputs: dict, sequences: torch.Tensor, more: torch.Tensor) -> dict:
    """The next turn: everything so far and `more` (B, t)."""
    ids = torch.cat([sequences, more], 1)
    extra = ids.shape[1] - inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), extra, dtype=torch.long)], 1)
    return dict(input_ids=ids, attention_mask=mask)


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
    turns = [batch(model, [part]) for part in (row, new)]
    (first, early), (second, late) = (decide(inputs, rule) for inputs in turns)
    embeds = [merged_embeddings(model, inputs)[:, kept] for inputs, kept in zip(turns, (first, second), strict=True)]
    ids = torch.cat([inputs["input_ids"] for inputs in turns], 1)
    kept = torch.cat([first, second + turns[0]["input_ids"].shape[1]])
    drops = {layer: torch.cat([early[layer], late[layer]]) for layer in early}
    return reference(
        model, dict(input_ids=ids), kept, positions=rule.positions, embeds=torch.cat(embeds, 1), drops=drops
    ).logits()[-1]


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
