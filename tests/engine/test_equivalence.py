"""The patched model against an unpatched one that is fed, by hand, what should be left."""

import copy

import pytest
import torch
from checks import check_changes_nothing
from compare import close, greedy, lengths, same_cache
from doubles import (
    BUDGETED,
    RULES,
    Both,
    BothOriginal,
    Everything,
    Halve,
    PairMean,
    PlacedPairMean,
    Stairs,
    Strided,
    StridedOriginal,
    build,
    every_method,
    expect,
    expected_lengths,
    keeping_everything,
    name_of,
    pair_mean,
)
from prompts import EQUAL, LONG_ROWS, ROWS, SEVERAL, Clip, Picture, batch, valid, visual, words
from tiny import BOS, DEPTH, IMAGE, tiny
from unpatched import keep_only, merged_embeddings, reference

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache

PADDINGS = ["left", "right", "none"]
METHODS = ["none", *BUDGETED]


# --- keeping everything ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", [*METHODS, "everything"])
@torch.no_grad()
def test_keeping_everything_is_bit_identical_in_forward(family, backend, method, padding):
    model = tiny(family, backend)
    inputs = batch(model, EQUAL if padding == "none" else LONG_ROWS, padding)
    want = model(**inputs, output_hidden_states=True)
    with vlmslim.patch(model, Everything() if method == "everything" else keeping_everything(method)):
        got = model(**inputs, output_hidden_states=True)
    assert torch.equal(want.logits, got.logits)
    same_cache(kv_cache(want), kv_cache(got))
    assert len(want.hidden_states) == len(got.hidden_states)
    for a, b in zip(want.hidden_states, got.hidden_states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", [*METHODS, "everything"])
def test_keeping_everything_is_bit_identical_in_generate(family, backend, method, padding):
    model = tiny(family, backend)
    inputs = batch(model, EQUAL if padding == "none" else LONG_ROWS, padding)
    check_changes_nothing(model, inputs, Everything() if method == "everything" else keeping_everything(method))


@pytest.mark.parametrize("method", every_method(), ids=str)
@torch.no_grad()
def test_text_only_prompts_are_bit_identical_under_any_method(family, backend, method):
    model = tiny(family, backend)
    inputs = batch(model, [[BOS, *words(0, 5)], [BOS, *words(1, 9)]])
    want = model(**inputs).logits
    with vlmslim.patch(model, build(method)):
        assert torch.equal(model(**inputs).logits, want)
    check_changes_nothing(model, inputs, build(method))


# --- against hand-shortened rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("rows", [LONG_ROWS, SEVERAL], ids=["one", "several"])
@pytest.mark.parametrize("rule", RULES, ids=name_of)
@torch.no_grad()
def test_forward_equals_feeding_what_is_left(family, backend, rule, rows, padding):
    model = tiny(family, backend)
    references = [expect(model, row, rule) for row in rows]
    inputs = batch(model, rows, padding)
    with vlmslim.patch(model, rule):
        out = model(**inputs)
    assert out.logits.shape == (*inputs["input_ids"].shape, 100)
    for i, ref in enumerate(references):
        close(out.logits[i][valid(inputs, i)], ref.full_logits())
    per_row = [expected_lengths(ref) for ref in references]
    assert lengths(kv_cache(out)) == [max(row[layer] for row in per_row) for layer in range(DEPTH)]


@pytest.mark.parametrize("rule", RULES, ids=name_of)
def test_generate_equals_recomputing_by_hand(family, backend, rule):
    """Greedy on a batch; then each row with its answer is recomputed whole, without a cache, on an unpatched model."""
    model = tiny(family, backend)
    rows = [*LONG_ROWS[:3], *SEVERAL]
    inputs = batch(model, rows)
    with vlmslim.patch(model, rule):
        out, logits = greedy(model, inputs)
    answers = out.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    steps = len(answers[0])
    per_row = []
    for i, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        ref = expect(model, row, rule, answer)
        close(logits[i], ref.logits()[-steps - 1 : -1])
        per_row.append(expected_lengths(expect(model, row, rule)))
    longest = [max(row[layer] for row in per_row) for layer in range(DEPTH)]
    assert lengths(kv_cache(out)) == [n + steps - 1 for n in longest]


@torch.no_grad()
def test_right_padded_decode_equals_recomputing_by_hand(family):
    """Tokens appended by the caller after a right-padded prefill."""
    model = tiny(family)
    inputs = batch(model, ROWS, "right")
    steps = torch.tensor([[5, 6, 7], [8, 9, 10]])
    for rule in (Strided(), StridedOriginal(), Stairs(), Both()):
        with vlmslim.patch(model, rule):
            out = model(**inputs)
            mask, logits = inputs["attention_mask"], []
            for token in steps.T:
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                place = mask.sum(1, keepdim=True) - 1
                step = {"attention_mask": mask, "position_ids": place, KV_CACHE: kv_cache(out)}
                out = model(token[:, None], **step)
                logits.append(out.logits[:, 0])
        for i, row in enumerate(ROWS):
            ref = expect(model, row, rule, steps[i].tolist())
            close(torch.stack(logits)[:, i], ref.logits()[-3:])


@torch.no_grad()
def test_merged_tokens_take_the_first_slots(family, backend):
    model = tiny(family, backend)
    rows = [*ROWS, *SEVERAL]
    references = []
    for row in rows:
        inputs = batch(model, [row])
        embeds = merged_embeddings(model, inputs)[0]
        pieces, end = [], 0
        for place in visual(inputs):
            pieces += [embeds[end : place[0]], pair_mean(embeds[place])]
            end = int(place[-1]) + 1
        short = torch.cat([*pieces, embeds[end:]])[None]
        kept = keep_only(inputs, [torch.arange((len(place) + 1) // 2) for place in visual(inputs)])
        references.append(reference(model, inputs, kept, embeds=short))
    inputs = batch(model, rows)
    for method in (PairMean(), PlacedPairMean()):
        with vlmslim.patch(model, method):
            out = model(**inputs)
        for i, ref in enumerate(references):
            close(out.logits[i][valid(inputs, i)], ref.full_logits())
        assert lengths(kv_cache(out)) == [max(len(ref.origin) for ref in references)] * DEPTH


@torch.no_grad()
def test_position_conventions_differ_and_are_both_seen():
    """Guards the guards: on these models the two conventions give visibly different logits."""
    model = tiny("llava")
    renumbered = expect(model, ROWS[0], Strided()).logits()
    original = expect(model, ROWS[0], StridedOriginal()).logits()
    assert (renumbered - original).abs().max() > 0.1


@pytest.mark.parametrize("rule", [Strided(), Stairs(), Both(), BothOriginal()], ids=name_of)
@torch.no_grad()
def test_one_by_one_equals_the_batch(family, rule):
    model = tiny(family)
    rows = [*LONG_ROWS, *SEVERAL]
    with vlmslim.patch(model, rule):
        logits = greedy(model, batch(model, rows))[1]
        for i, row in enumerate(rows):
            out, single = greedy(model, batch(model, [row]))
            close(single[0], logits[i])


@pytest.mark.parametrize("rule", [Strided(), StridedOriginal(), Halve(), Stairs(), Both()], ids=name_of)
@torch.no_grad()
def test_videos(backend, rule):
    model = tiny("onevision", backend)
    rows = [
        [BOS, Clip(0), *words(0, 5)],
        [BOS, *words(1, 3), Clip(1), *words(2, 6)],
        [BOS, *words(3, 2), Clip(2)],
    ]
    references = [expect(model, row, rule) for row in rows]
    inputs = batch(model, rows)
    with vlmslim.patch(model, rule) as slim:
        out = model(**inputs)
        generated, logits = greedy(model, inputs)
    for i, ref in enumerate(references):
        close(out.logits[i][valid(inputs, i)], ref.full_logits())
    answers = generated.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    for i, row in enumerate(rows):
        close(logits[i], expect(model, row, rule, answers[i]).full_logits()[-7:-1])
    assert slim.receipt.summary()["had_effect"]


@torch.no_grad()
def test_an_image_and_a_video_in_one_row():
    model = tiny("onevision")
    row = [BOS, Clip(0), *words(0, 3), Picture(1), *words(1, 4)]
    for rule in (Strided(), Halve(), BothOriginal()):
        ref = expect(model, row, rule)
        with vlmslim.patch(model, rule):
            out = model(**batch(model, [row]))
        close(out.logits[0], ref.full_logits())


@torch.no_grad()
def test_images_at_either_end_of_the_prompt(family):
    model = tiny(family)
    rows = [[Picture(0), 7], [7, Picture(0)], [Picture(0)], [5, Picture(0), 6]]
    for rule in (Strided(), StridedOriginal(), Halve(), Both()):
        references = [expect(model, row, rule) for row in rows]
        with vlmslim.patch(model, rule):
            together = batch(model, rows)
            out = model(**together)
            for i, (row, ref) in enumerate(zip(rows, references, strict=True)):
                alone = model(**batch(model, [row])).logits[0]
                first = int(ref.origin[ref.alive()][0])  # before it nothing is left to show
                close(alone[first:], ref.full_logits()[first:])
                close(out.logits[i][valid(together, i)][first:], ref.full_logits()[first:])


@pytest.mark.parametrize("change", ["two tower layers", "CLS among the tokens", "mosaic resized"])
@torch.no_grad()
def test_unusual_configurations(change):
    """Two tower layers side by side; CLIP's CLS token kept; a mosaic that OneVision shrinks by interpolation."""
    family = "onevision" if change == "mosaic resized" else "llava"
    model = tiny(family)
    if change == "two tower layers":
        model = _wider(model)
    elif change == "CLS among the tokens":
        model.config.vision_feature_select_strategy = "full"
    else:
        model.config.vision_aspect_ratio = "anyres_max_1"
    rows = [[BOS, Picture(0, (60, 60)), *words(0, 4)], [BOS, *words(1, 2), Picture(1, (60, 60)), *words(2, 2)]]
    singles = [_recounted(model, row) for row in rows]
    inputs = {k: torch.cat([x[k] for x in singles]) for k in singles[0]}
    plain = model(**inputs).logits
    places = [visual(x)[0] for x in singles]
    assert len(places[0]) != len(visual(batch(tiny(family), rows[:1]))[0]) or change == "two tower layers"
    kept = [keep_only(x, [Strided().chosen(len(p), None)]) for x, p in zip(singles, places, strict=True)]
    references = [reference(model, x, k) for x, k in zip(singles, kept, strict=True)]
    with vlmslim.patch(model, Everything()):
        assert torch.equal(model(**inputs).logits, plain)
    with vlmslim.patch(model, Strided()):
        out = model(**inputs).logits
    for i, ref in enumerate(references):
        close(out[i], ref.full_logits())
    for name in METHODS:
        with vlmslim.patch(model, build(name)) as slim:
            assert torch.isfinite(model(**inputs).logits).all()
        if name in ("random", "uniform", "pool", "divprune"):
            assert slim.receipt.summary()["kept"] == 5


def _wider(model):
    """The same model with the features of two tower layers side by side."""
    config = copy.deepcopy(model.config)
    config.vision_feature_layer = [-2, -1]
    wide = type(model)(config).eval()
    state = model.state_dict()
    name = "model.multi_modal_projector.linear_1.weight"
    state[name] = torch.cat([state[name], state[name].flip(1)], 1)
    wide.load_state_dict(state)
    wide.generation_config = model.generation_config
    return wide


def _recounted(model, row: list) -> dict:
    """Inputs of one row, with as many placeholders as this model has tokens for its picture."""
    inputs = batch(model, [row])
    extra = {k: inputs[k] for k in ("image_sizes", "batch_num_images") if k in inputs}
    count = len(model.model.get_image_features(inputs["pixel_values"], **extra).pooler_output[0])
    ids = inputs["input_ids"][0]
    first = int((ids == IMAGE).nonzero()[0])
    ids = torch.cat([ids[:first], ids.new_full((count,), IMAGE), ids[ids != IMAGE][first:]])[None]
    return inputs | dict(input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.mark.parametrize("rule", [Strided(), StridedOriginal(), Both()], ids=name_of)
@torch.no_grad()
def test_other_ways_to_call_forward(family, rule):
    """Embeddings instead of ids, a tuple instead of a record, explicit positions, no cache, no head."""
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    mask = inputs["attention_mask"]
    with vlmslim.patch(model, rule):
        want = model(**inputs).logits
        assert torch.equal(model(**inputs, return_dict=False)[0], want)
        assert torch.equal(model(**inputs, use_cache=False).logits, want)
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        without_ids = {k: v for k, v in inputs.items() if k != "input_ids"}
        close(model(**without_ids, inputs_embeds=embeds).logits, want)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        valid_places = mask.bool()
        close(model(**inputs, position_ids=positions).logits[valid_places], want[valid_places])
        close(model.lm_head(model.model(**inputs).last_hidden_state), want)


@torch.no_grad()
def test_the_language_model_alone_is_not_disturbed(family):
    model = tiny(family)
    lm = model.model.language_model
    ids = torch.tensor([words(0, 9)])
    want = lm(input_ids=ids).last_hidden_state
    with vlmslim.patch(model, Both()):
        assert torch.equal(lm(input_ids=ids).last_hidden_state, want)
        model(**batch(model, ROWS))
        assert torch.equal(lm(input_ids=ids).last_hidden_state, want)


# --- stages ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_stages_compose(family, backend):
    """Strided before, Halve between: the same as one rule that does both."""

    class OneRule(Strided):
        layers = (2,)
        left = Halve.left

    model = tiny(family, backend)
    references = [expect(model, row, OneRule()) for row in LONG_ROWS]
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, [Strided(), Halve()]):
        out = model(**inputs)
    for i, ref in enumerate(references):
        close(out.logits[i][valid(inputs, i)], ref.full_logits())


@torch.no_grad()
def test_stages_by_name_and_by_dictionary():
    model = tiny("llava")
    inputs = batch(model, ROWS)
    outs = []
    for stages in (
        [vlmslim.method("uniform", keep=8), vlmslim.method("fastv", keep=4, layer=2)],
        [{"method": "uniform", "keep": 8}, {"method": "fastv", "keep": 4, "layer": 2}],
        ["none", {"method": "uniform", "keep": 8}, vlmslim.method("fastv", keep=4, layer=2)],
    ):
        with vlmslim.patch(model, stages):
            outs.append(model(**inputs))
    for out in outs[1:]:
        assert torch.equal(out.logits, outs[0].logits)
        assert lengths(kv_cache(out)) == lengths(kv_cache(outs[0]))
    text = max(int((x["input_ids"] != IMAGE).sum()) for x in (batch(model, [row]) for row in ROWS))
    assert lengths(kv_cache(outs[0])) == [text + 8, text + 8, text + 4, text + 4]


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [Strided(), Stairs(), Both()], ids=name_of)
@torch.no_grad()
def test_outside_shapes_never_change(family, backend, rule):
    model = tiny(family, backend)
    inputs = batch(model, LONG_ROWS)
    want = model(**inputs, output_hidden_states=True)
    with vlmslim.patch(model, rule):
        got = model(**inputs, output_hidden_states=True)
        last = model(**inputs, logits_to_keep=1)
        core = model.model(**inputs)
    assert got.logits.shape == want.logits.shape
    assert core.last_hidden_state.shape == want.hidden_states[-1].shape
    assert torch.equal(last.logits[:, 0], got.logits[:, -1])
    assert [h.shape for h in got.hidden_states] == [h.shape for h in want.hidden_states]
    close(model.lm_head(got.hidden_states[-1]), got.logits)
