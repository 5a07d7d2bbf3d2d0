"""The receipt against what the layers of a patched model really compute and hold."""

import copy
import json
import pickle

import pytest
import torch
from compare import greedy, lengths
from doubles import BlindToLong, Both, Everything, Halve, PairMean, RaggedOriginal, Rule, Stairs, Strided
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import LONG_ROWS, ROWS, SEVERAL, Picture, batch, words
from tiny import BOS, DEPTH, tiny

import vlmslim
from vlmslim import Receipt
from vlmslim.cost.memory import cache_bytes
from vlmslim.cost.timer import Timer
from vlmslim.engine.families import KV_CACHE, kv_cache
from vlmslim.receipt import Image, Prefill, StagePass, Tally, headline

KV_BYTES = 2 * 2 * 8 * 4  # of a token in a layer: keys and values, 2 heads of 8, fp32


def receipt(**counts) -> Receipt:
    """An empty receipt of two layers, or one of a single prompt with a single image."""
    made = Receipt("M()", "renumbered", "sdpa", "float32", 1, 2, (("m", (1,)),))
    if counts:
        image = Image(counts["tokens"], counts["requested"], counts["kept"])
        visual = [[image.kept], [counts.get("last", image.kept)]]
        sequence = [3 + row[0] for row in visual]
        (before,), (after,) = visual
        stage = StagePass([before], [after], int(after < before), image.requested == before, image.requested is None)
        made.saw_prefill(Prefill([[image]], [3], visual, sequence, sequence, [stage]))
    return made


# --- against the model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method", [Strided(), RaggedOriginal(), PairMean(), Halve(), Stairs(), Both(), "none"], ids=str
)
@torch.no_grad()
def test_sequences_and_caches_are_those_of_the_layers(family, method):
    model = tiny(family)
    seen: list[torch.Size] = []
    slim = vlmslim.patch(model, method)
    for layer in model.model.language_model.layers:  # registered after the patch, so they see what the layers get
        layer.self_attn.q_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0].shape))
    prompts = tokens = held = 0
    for rows in ([LONG_ROWS[0]], LONG_ROWS, SEVERAL):
        seen.clear()
        out = model(**batch(model, rows))
        last = slim.receipt.last
        assert last.sequence == [shape[1] for shape in seen]
        assert last.kv == lengths(kv_cache(out))
        assert [len(row) for row in last.images] == [sum(isinstance(x, Picture) for x in row) for row in rows]
        for layer, shape in enumerate(seen):
            per_row = [text + visual for text, visual in zip(last.text, last.visual[layer], strict=True)]
            assert max(per_row) == shape[1], "the longest row has no padding"
        prompts, tokens = prompts + len(rows), tokens + sum(shape[0] * shape[1] for shape in seen)
        held += sum(layer.keys.nbytes + layer.values.nbytes for layer in kv_cache(out).layers)
    summary = slim.receipt.summary()
    assert summary["prompts"] == prompts
    assert sum(summary["sequence_per_layer"]) * prompts == pytest.approx(tokens)
    assert sum(summary["kv_per_layer"]) * prompts * KV_BYTES == pytest.approx(held)
    assert summary["kv_bytes"] * prompts <= held, "kv_bytes leaves padding out"


@torch.no_grad()
def test_kv_bytes_of_a_prompt_without_padding_are_those_of_its_cache(family):
    model = tiny(family)
    for method in (Strided(), Stairs(), Both()):
        with vlmslim.patch(model, method) as slim:
            out = model(**batch(model, ROWS[:1]))
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in kv_cache(out).layers)
        assert slim.receipt.summary()["kv_bytes"] == held


@torch.no_grad()
def test_ranges_tell_what_means_hide():
    model = tiny("next")
    with vlmslim.patch(model, "uniform", keep=0.5) as slim:
        model(**batch(model, LONG_ROWS))
    images = [image for row in slim.receipt.last.images for image in row]
    summary = slim.receipt.summary()
    assert len({image.tokens for image in images}) > 1
    for key, name in (("visual_tokens", "tokens"), ("requested", "requested"), ("kept", "kept")):
        values = [getattr(image, name) for image in images]
        assert summary[f"{key}_range"] == [min(values), max(values)]
        assert summary[key] == pytest.approx(sum(values) / len(values))


@torch.no_grad()
def test_a_later_turn_counts_what_the_cache_holds_of_earlier_ones():
    model = tiny("llava")
    first, second = [BOS, Picture(0), *words(0, 5)], [*words(1, 3), Picture(1), *words(2, 2)]
    with vlmslim.patch(model, Strided()) as slim:
        cache = kv_cache(model(**batch(model, [first], "none")))
        before = slim.receipt.last
        model(**batch(model, [second], "none"), **{KV_CACHE: cache})
    last = slim.receipt.last
    assert last.kv == [a + b for a, b in zip(before.kv, last.sequence, strict=True)] == lengths(cache)
    assert slim.receipt.images == 2


@torch.no_grad()
def test_without_a_cache_nothing_is_held():
    model = tiny("llava")
    with vlmslim.patch(model, Strided()) as slim:
        model(**batch(model, ROWS), use_cache=False)
    assert slim.receipt.last.kv == []
    assert slim.receipt.summary()["kv_per_layer"] == [0] * DEPTH


@torch.no_grad()
def test_a_forward_that_fails_is_not_counted():
    class Grumpy(Halve):
        def left(self, layer, n, text):
            raise ArithmeticError("no")

    model = tiny("llava")
    with vlmslim.patch(model, Grumpy()) as slim:
        with pytest.raises(ArithmeticError):
            model(**batch(model, ROWS))
        assert slim.receipt.images == slim.receipt.prompts == 0
        with pytest.raises(RuntimeError, match="no image seen yet"):
            _ = slim.receipt.last


def test_it_does_not_grow_with_the_run():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, Both()) as slim:
        greedy(model, inputs)
        size = len(pickle.dumps(slim.receipt))
        for _ in range(20):
            greedy(model, inputs)
    assert slim.receipt.images == 42
    assert len(pickle.dumps(slim.receipt)) < size + 100  # digits


# --- stage by stage ---------------------------------------------------------------------------------------------------


def shown(slim) -> list[tuple]:
    """Of each stage: name, layers, visual tokens before and after, and prompts in which it acted."""
    stages = slim.receipt.summary()["stages"]
    return [(s["name"], s["layers"], s["tokens_in"], s["tokens_out"], s["acted"]) for s in stages]


class OddLayers(Rule):
    """Drop the last token of each image before layers 1 and 3."""

    layers = (1, 3)

    def left(self, layer, n, text):
        return torch.arange(n - 1)


@torch.no_grad()
def test_each_stage_says_what_it_did():
    model = tiny("llava")  # images of 16 tokens
    last = vlmslim.method("drop_visual", layer=3, tau=None)
    with vlmslim.patch(model, [vlmslim.method("uniform", keep=8), Halve(), last]) as slim:
        model(**batch(model, ROWS))
        model(**batch(model, [SEVERAL[0]]))  # two images in one prompt
        model(torch.tensor([words(0, 5)]))  # no image: no part in the means
    assert shown(slim) == [
        ("uniform", [], 64 / 3, 32 / 3, 3),
        ("halve", [2], 32 / 3, 16 / 3, 3),
        ("drop_visual", [3], 16 / 3, 0, 3),
    ]
    assert [stage["prompts"] for stage in slim.receipt.summary()["stages"]] == [3, 3, 3]
    assert [(stage.tokens_in, stage.tokens_out) for stage in slim.receipt.last.stages] == [
        ([32], [16]),
        ([16], [8]),
        ([8], [0]),
    ]


@torch.no_grad()
def test_stages_that_take_turns_are_told_apart():
    model = tiny("llava")
    with vlmslim.patch(model, [Halve(), OddLayers()]) as slim:
        model(**batch(model, ROWS))
    assert shown(slim) == [("oddlayers", [1, 3], 16, 7, 2), ("halve", [2], 15, 8, 2)]
    with vlmslim.patch(model, [Both(), "none"]) as slim:  # before the language model, and before layers 2 and 3
        model(**batch(model, ROWS))
    assert shown(slim) == [("both", [2, 3], 16, 2, 2), ("none", [], 2, 2, 0)]


@torch.no_grad()
def test_merging_is_acting():
    model = tiny("llava")
    with vlmslim.patch(model, PairMean()) as slim:
        model(**batch(model, ROWS))
    assert shown(slim) == [("pairmean", [], 16, 8, 2)]


@torch.no_grad()
def test_a_stage_that_acts_on_some_prompts_or_none_says_so():
    model = tiny("llava")
    with vlmslim.patch(model, BlindToLong()) as slim:  # looks at how many words there are: 6 and 14
        model(**batch(model, [*ROWS, [BOS, Picture(0), *words(0, 4)]]))
    ((*_, acted),) = shown(slim)
    assert acted == 2
    assert "blindtolong acted on 2 of 3 prompts" in str(slim.receipt)
    with vlmslim.patch(model, [Strided(), vlmslim.method("drop_visual", layer=2, tau=0.0)]) as slim:
        model(**batch(model, ROWS))
    assert slim.receipt.had_effect
    assert [(s["acted"], s["decides"]) for s in slim.receipt.summary()["stages"]] == [(2, True), (0, True)]
    assert "drop_visual acted on 0 of 2 prompts" in str(slim.receipt)
    assert "strided acted" not in str(slim.receipt)


@pytest.mark.parametrize(
    ("method", "keeps_all"),
    [
        ("none", [True]),
        ({"method": "uniform", "keep": 16}, [True]),
        ({"method": "uniform", "keep": 15}, [False]),
        ({"method": "fastv", "keep": 1.0}, [True]),
        ([{"method": "uniform", "keep": 4}, {"method": "fastv", "keep": 4}], [False, True]),
        ([{"method": "uniform", "keep": 4}, {"method": "fastv", "keep": 0.5}], [False, False]),
        (Everything(), [False]),  # decides itself
    ],
    ids=str,
)
@torch.no_grad()
def test_a_stage_says_whether_it_was_asked_to_keep_everything(method, keeps_all):
    model = tiny("llava")
    with vlmslim.patch(model, method) as slim:
        assert all(stage["keeps_all"] for stage in slim.receipt.summary()["stages"]), "of no image at all"
        model(**batch(model, ROWS))
    summary = slim.receipt.summary()
    assert [stage["keeps_all"] for stage in summary["stages"]] == keeps_all
    assert [stage["decides"] for stage in summary["stages"]] == [isinstance(method, Everything)] * len(keeps_all)
    assert ("acted on" in str(slim.receipt)) == isinstance(method, Everything)


# --- selection time ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_selection_time_is_the_time_in_the_methods(monkeypatch):
    """With a clock that only the methods move."""
    now = [100.0]
    monkeypatch.setattr("vlmslim.cost.timer.time.perf_counter", lambda: now[0])

    class Slow(Both):
        def chosen(self, n, prompt):
            now[0] += 0.25
            return super().chosen(n, prompt)

        def left(self, layer, n, text):
            now[0] += 0.5
            return super().left(layer, n, text)

    model = tiny("llava")
    with vlmslim.patch(model, Slow()) as slim:
        for _ in range(3):
            model(**batch(model, ROWS))  # two images, two layers that prune
            now[0] += 10
        assert slim.receipt.last.selection_ms == pytest.approx(2 * 250 + 4 * 500)
        assert slim.receipt.selection_ms == pytest.approx(3 * 2500)
        assert slim.receipt.summary()["selection_ms"] == pytest.approx(1250)
        model(torch.tensor([words(0, 5)]))  # no image, no method
        assert slim.receipt.selection_ms == pytest.approx(7500)
        slim.reset_receipt()
        assert slim.receipt.selection_ms == 0


@pytest.mark.gpu
@torch.no_grad()
def test_on_a_gpu_time_is_the_devices_and_counting_does_not_wait():
    model = tiny("llava").cuda()
    inputs = {k: v.cuda() for k, v in batch(model, ROWS).items()}
    with vlmslim.patch(model, "divprune", keep=5) as slim:
        for _ in range(3):
            model(**inputs)
        twin = pickle.loads(pickle.dumps(slim.receipt))
        assert twin.selection_ms == slim.receipt.selection_ms > 0
    torch.cuda.set_sync_debug_mode("error")
    try:
        with Timer(torch.device("cuda")) as timer:
            torch.ones(8, device="cuda").sum()
        assert timer.finished in (True, False)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# --- the record itself ------------------------------------------------------------------------------------------------


def test_json_and_text():
    made = receipt(tokens=16, requested=5, kept=5, last=2)
    read = json.loads(made.to_json())
    assert read["kept"] == 5 and read["kept_range"] == [5, 5]
    assert read["last"]["images"] == [[{"tokens": 16, "requested": 5, "kept": 5}]]
    assert read["last"]["visual"] == [[5], [2]] and read["last"]["sequence"] == [8, 5]
    del read["last"]
    assert read == made.summary()
    assert headline(read) == str(made)
    for part in ("16.0 -> 5.0", "5.0 asked for", "2.0 in the last", "renumbered", "sdpa", "float32"):
        assert part in str(made)
    assert "the method's choice" in str(receipt(tokens=16, requested=None, kept=5))


def test_an_empty_receipt():
    empty = receipt()
    assert str(empty) == "M(): no image seen yet"
    assert json.loads(empty.to_json())["last"] is None
    assert not empty.had_effect
    assert empty.summary()["requested"] is empty.summary()["kept_range"] is None


def test_receipts_of_several_processes_add_up():
    parts = [
        receipt(tokens=16, requested=5, kept=5),
        receipt(),
        receipt(tokens=20, requested=None, kept=9, last=1),
    ]
    whole = Receipt.pooled(pickle.loads(pickle.dumps(parts)))
    assert whole.images == whole.prompts == 2
    assert whole.summary()["kept_range"] == [5, 9] and whole.summary()["kept"] == 7
    assert whole.summary()["requested"] == 5, "an image without a request has no part in the mean"
    assert whole.visual == [14, 6] and whole.sequence == whole.kv == [20, 12]
    assert whole.last.visual == [[9], [1]]
    (stage,) = whole.summary()["stages"]
    assert stage == {
        "name": "m",
        "layers": [1],
        "tokens_in": 7,
        "tokens_out": 3,
        "prompts": 2,
        "acted": 1,
        "keeps_all": False,
        "decides": True,
    }
    assert parts[0].images == 1, "the parts are left as they were"


def test_a_copy_counts_for_itself():
    made = receipt(tokens=16, requested=5, kept=5)
    twin = copy.deepcopy(made)
    twin.saw_text(3)
    twin.saw_prefill(made.last)
    assert (made.text_prompts, made.images) == (0, 1) and (twin.text_prompts, twin.images) == (3, 2)


@pytest.mark.parametrize(("kept", "last", "effect"), [(16, 16, False), (15, 15, True), (16, 15, True)])
def test_effect(kept, last, effect):
    assert receipt(tokens=16, requested=5, kept=kept, last=last).had_effect is effect


@given(st.lists(st.lists(st.integers(0, 5000))))
@settings(deadline=None, derandomize=True)
def test_tallies_add_up(parts):
    whole = sum((Tally.of(part[:2]) + Tally.of(part[2:]) for part in parts), Tally())
    values = [value for part in parts for value in part]
    assert whole.count == len(values)
    assert whole.range == ([min(values), max(values)] if values else None)
    assert whole.mean == (pytest.approx(sum(values) / len(values)) if values else None)


@torch.no_grad()
def test_settings_are_those_of_the_model_as_it_is():
    model = tiny("llava", "sdpa")
    with vlmslim.patch(model, "uniform", keep=4) as slim:
        model(**batch(model, [ROWS[0]], "none"))
        before = slim.receipt.summary()
        model.set_attn_implementation("eager")
        model.to(torch.bfloat16)
        slim.reset_receipt()
        inputs = batch(model, [ROWS[0]], "none")
        held = cache_bytes(kv_cache(model(**inputs | {"pixel_values": inputs["pixel_values"].bfloat16()})))
        after = slim.receipt.summary()
    assert (before["backend"], before["dtype"]) == ("sdpa", "float32")
    assert (after["backend"], after["dtype"]) == ("eager", "bfloat16")
    assert after["kv_bytes"] == held == before["kv_bytes"] / 2
