"""The patched model against an unpatched one that is fed, by hand, what should be left."""

import copy
import importlib.util
from contextlib import ExitStack

import pytest
import torch
from doubles import (
    RULES,
    Both,
    BothOriginal,
    Everything,
    First,
    Halve,
    PairMean,
    Stairs,
    Strided,
    StridedOriginal,
    expect,
    expected_lengths,
    keeping_everything,
    name_of,
    pair_mean,
    patch_or_skip,
    registered,
)
from tiny import (
    BOS,
    DEPTH,
    EQUAL,
    IMAGE,
    LONG_ROWS,
    ROWS,
    SEVERAL,
    Clip,
    Picture,
    anatomy,
    batch,
    close,
    greedy,
    keep_only,
    lengths,
    merged_embeddings,
    reference,
    tiny,
    visual,
    words,
)

import vlmslim

PADDINGS = ["left", "right", "none"]
METHODS = vlmslim.method_names()


def every_method():
    """What to run "under any method" with: rules of every kind, and the registered methods at a budget."""
    return [Both(), Stairs(), [Strided(), Halve()], *METHODS]


def build(method, keep: int | float = 5):
    if method == "none":
        return vlmslim.method("none")
    return registered(method, keep) if isinstance(method, str) else method


def same_cache(a, b) -> None:
    assert lengths(a) == lengths(b)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert torch.equal(x.keys, y.keys)
        assert torch.equal(x.values, y.values)


def valid(inputs: dict, row: int) -> torch.Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"][row], dtype=torch.bool) if mask is None else mask[row].bool()


# --- keeping everything ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", [*METHODS, "everything"])
@torch.no_grad()
def test_keeping_everything_is_bit_identical_in_forward(family, backend, method, padding):
    model = tiny(family, backend)
    inputs = batch(model, EQUAL if padding == "none" else LONG_ROWS, padding)
    want = model(**inputs, output_hidden_states=True)
    with patch_or_skip(model, Everything() if method == "everything" else keeping_everything(method)):
        got = model(**inputs, output_hidden_states=True)
    assert torch.equal(want.logits, got.logits)
    same_cache(want.past_key_values, got.past_key_values)
    assert len(want.hidden_states) == len(got.hidden_states)
    for a, b in zip(want.hidden_states, got.hidden_states, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("method", [*METHODS, "everything"])
def test_keeping_everything_is_bit_identical_in_generate(family, backend, method, padding):
    model = tiny(family, backend)
    inputs = batch(model, EQUAL if padding == "none" else LONG_ROWS, padding)
    want, want_logits = greedy(model, inputs)
    with patch_or_skip(model, Everything() if method == "everything" else keeping_everything(method)):
        got, got_logits = greedy(model, inputs)
    assert torch.equal(want.sequences, got.sequences)
    assert torch.equal(want_logits, got_logits)
    same_cache(want.past_key_values, got.past_key_values)


@pytest.mark.parametrize("method", every_method(), ids=str)
@torch.no_grad()
def test_text_only_prompts_are_bit_identical_under_any_method(family, backend, method):
    model = tiny(family, backend)
    inputs = batch(model, [[BOS, *words(0, 5)], [BOS, *words(1, 9)]])
    want, (out, logits) = model(**inputs).logits, greedy(model, inputs)
    with patch_or_skip(model, build(method)):
        assert torch.equal(model(**inputs).logits, want)
        got, got_logits = greedy(model, inputs)
    assert torch.equal(got.sequences, out.sequences)
    assert torch.equal(got_logits, logits)


# --- leaving no trace ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", every_method(), ids=str)
def test_removing_restores_the_model_exactly(family, backend, method):
    model = tiny(family, backend)
    inputs = batch(model, ROWS)
    with torch.no_grad():
        want = model(**inputs).logits
    before = anatomy(model)
    slim = patch_or_skip(model, build(method))
    greedy(model, inputs)
    slim.remove()
    assert anatomy(model) == before
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, want)
    with vlmslim.patch(model, build(method)):  # and it can be patched again
        model(**inputs)
    assert anatomy(model) == before


def test_an_error_inside_the_block_still_removes(family):
    model = tiny(family)
    inputs = batch(model, ROWS)
    model(**inputs)  # transformers installs its own output-capturing hooks at the first call, for good
    before = anatomy(model)
    with pytest.raises(ZeroDivisionError), vlmslim.patch(model, Both()):
        model(**inputs)
        raise ZeroDivisionError
    assert anatomy(model) == before


def test_a_forward_that_fails_leaves_the_patch_working_and_removable():
    class Grumpy(Strided):
        angry = False

        def chosen(self, n, prompt):
            if Grumpy.angry:
                raise ArithmeticError("no")
            return super().chosen(n, prompt)

    model = tiny("next")
    inputs = batch(model, ROWS)
    model(**inputs)
    before = anatomy(model)
    slim = vlmslim.patch(model, Grumpy())
    want = greedy(model, inputs)[1]
    Grumpy.angry = True
    with pytest.raises(ArithmeticError):
        model(**inputs)
    with pytest.raises(ArithmeticError):
        greedy(model, inputs)
    Grumpy.angry = False
    assert torch.equal(greedy(model, inputs)[1], want)
    slim.remove()
    assert anatomy(model) == before


def test_a_failing_setup_leaves_nothing_behind():
    class Broken(Strided):
        def setup(self, model):
            raise FileNotFoundError("weights.safetensors is missing")

    model = tiny("llava")
    before = anatomy(model)
    with pytest.raises(FileNotFoundError):
        vlmslim.patch(model, Broken())
    assert anatomy(model) == before


def test_another_model_and_all_classes_are_untouched(family):
    model, other = tiny(family), tiny(family)
    inputs = batch(model, ROWS)
    want, want_logits = greedy(other, inputs)
    before = anatomy(other)
    classes = {cls: dict(vars(cls)) for m in model.modules() for cls in type(m).__mro__}
    with vlmslim.patch(model, Both()):
        greedy(model, inputs)
        assert anatomy(other) == before
        for cls, attributes in classes.items():
            assert dict(vars(cls)) == attributes, cls
        got, got_logits = greedy(other, inputs)
        assert torch.equal(got.sequences, want.sequences)
        assert torch.equal(got_logits, want_logits)
        same_cache(got.past_key_values, want.past_key_values)


@torch.no_grad()
def test_two_patched_copies_and_an_unpatched_one_take_turns(family):
    models = [tiny(family) for _ in range(3)]
    inputs = batch(models[0], ROWS)
    methods = [Strided(), Stairs(), None]
    steps = torch.tensor([[5, 6, 7], [8, 9, 10]])

    def decode(model):
        """A generator: prefill, then one token at a time by hand."""
        out = model(**inputs, use_cache=True)
        mask = inputs["attention_mask"]
        yield out.logits
        for token in steps.T:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            out = model(input_ids=token[:, None], attention_mask=mask, past_key_values=out.past_key_values)
            yield out.logits

    alone = []
    for model, method in zip(models, methods, strict=True):
        with ExitStack() as stack:
            if method:
                stack.enter_context(vlmslim.patch(model, method))
            alone.append(list(decode(model)))
    with vlmslim.patch(models[0], methods[0]), vlmslim.patch(models[1], methods[1]):
        together = list(zip(*[decode(model) for model in models], strict=True))
    for i, logits in enumerate(alone):
        for step, want in enumerate(logits):
            assert torch.equal(together[step][i], want)
    assert not torch.equal(alone[0][0], alone[2][0])
    assert not torch.equal(alone[1][0], alone[2][0])


@torch.no_grad()
def test_a_deepcopy_of_a_patched_model_lives_its_own_life(family):
    model = tiny(family)
    inputs = batch(model, ROWS)
    plain = model(**inputs).logits
    slim = vlmslim.patch(model, Both())
    want, want_logits = greedy(model, inputs)
    twin = copy.deepcopy(model)
    slim.reset_receipt()
    got, got_logits = greedy(twin, inputs)
    assert torch.equal(got_logits, want_logits)
    assert lengths(got.past_key_values) == lengths(want.past_key_values)
    assert slim.receipt.summary()["images"] == 0, "the copy writes into the original's receipt"
    slim.remove()
    assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(greedy(twin, inputs)[1], want_logits), "removing the original's patch disturbed the copy"
    with torch.no_grad():  # the copy has its own weights
        twin.model.multi_modal_projector.linear_1.weight.zero_()
    assert torch.equal(model(**inputs).logits, plain)


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
    assert lengths(out.past_key_values) == [max(row[layer] for row in per_row) for layer in range(DEPTH)]


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
    assert lengths(out.past_key_values) == [n + steps - 1 for n in longest]


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
                step = dict(attention_mask=mask, position_ids=place, past_key_values=out.past_key_values)
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
    with vlmslim.patch(model, PairMean()):
        out = model(**inputs)
    for i, ref in enumerate(references):
        close(out.logits[i][valid(inputs, i)], ref.full_logits())
    assert lengths(out.past_key_values) == [max(len(ref.origin) for ref in references)] * DEPTH


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
        with patch_or_skip(model, build(name)) as slim:
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
        assert lengths(out.past_key_values) == lengths(outs[0].past_key_values)
    text = max(int((x["input_ids"] != IMAGE).sum()) for x in (batch(model, [row]) for row in ROWS))
    assert lengths(outs[0].past_key_values) == [text + 8, text + 8, text + 4, text + 4]


# --- shapes and attention ---------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("rule", [Everything(), Stairs(), Both(), BothOriginal()], ids=name_of)
@torch.no_grad()
def test_recomputed_attention_equals_the_models_own(family, backend, rule):
    """`LayerInput.attention` of some rows, under any back end, against the maps that eager attention returns."""
    eager = tiny(family, "eager")
    seen = {}

    class Looking(type(rule)):
        layers = (1, 2, 3)

        def retain(self, tokens):
            rows = torch.stack([tokens.last, (tokens.last - 3)], 1)
            seen[tokens.layer] = tokens.attention(rows), tokens.origin, tokens.mask, rows
            return super().retain(tokens)

        def left(self, layer, n, text):
            return super().left(layer, n, text) if layer in type(rule).layers else torch.arange(n)

    model = tiny(family, backend)
    rows = [*LONG_ROWS[:3], SEVERAL[0]]
    with vlmslim.patch(model, Looking()):
        inputs = batch(model, rows)
        model(**inputs)
    assert set(seen) == {1, 2, 3}
    for i, row in enumerate(rows):
        maps = {}
        hooks = [
            layer.self_attn.register_forward_hook(lambda m, a, out, n=n, maps=maps: maps.__setitem__(n, out[1]))
            for n, layer in enumerate(eager.model.language_model.layers)
        ]
        ref = expect(eager, row, rule)
        for hook in hooks:
            hook.remove()
        start = int(valid(inputs, i).nonzero()[0])
        for layer, (got, origin, mask, asked) in seen.items():
            assert got.dtype == torch.float32
            assert got.shape == (len(rows), 4, 2, origin.shape[1])
            own = maps[layer - 1][0]  # (heads, S, S) over the reference's tokens
            places = torch.searchsorted(ref.origin, origin[i][mask[i]] - start)
            for q in range(2):
                at = int(torch.searchsorted(ref.origin, origin[i][asked[i, q]] - start))
                close(got[i, :, q][:, mask[i]], own[:, at, places], 1e-4)
                assert torch.all(got[i, :, q][:, ~mask[i]] == 0)


@torch.no_grad()
def test_what_a_method_is_shown(family):
    """The records' shapes, orders and contents, image by image."""
    model = tiny(family)
    rows = [*LONG_ROWS, SEVERAL[0]]
    features = [merged_embeddings(model, x)[0][place] for x in (batch(model, [r]) for r in rows) for place in visual(x)]
    texts = []
    for row in rows:
        ids = batch(model, [row])["input_ids"][0]
        texts += [ids[ids != IMAGE]] * len(visual(dict(input_ids=ids[None])))
    images, layer_inputs = [], []

    class Spy(Both):
        def compress(self, image):
            images.append(image)
            return super().compress(image)

        def retain(self, tokens):
            layer_inputs.append(tokens)
            return super().retain(tokens)

    inputs = batch(model, rows)
    with vlmslim.patch(model, Spy()):
        model(**inputs)
    assert len(images) == len(features)
    for image, want, text in zip(images, features, texts, strict=True):
        close(image.features, want, 1e-5)
        assert torch.equal(image.prompt, text)
        assert not image.video
        assert image.grid.shape == (len(want), 3)
        assert image.tower.shape[1:] == (16, 16)
        assert image.pixels.shape[0] == image.tower.shape[0]
    for tokens, layer in zip(layer_inputs, (2, 3), strict=True):
        assert tokens.layer == layer
        assert tokens.hidden.shape[:2] == tokens.mask.shape == tokens.image.shape == tokens.origin.shape
        for i, row in enumerate(rows):
            x = batch(model, [row])
            expected = [(len(p) + 1) // 2 for p in visual(x)]
            assert list(tokens.entered[i]) == expected
            ids = inputs["input_ids"][i][tokens.origin[i][tokens.mask[i]]]
            assert torch.equal(ids == IMAGE, tokens.image[i][tokens.mask[i]] > 0)
            assert int(tokens.origin[i][tokens.last[i]]) == len(inputs["input_ids"][i]) - 1
            assert not tokens.image[i][~tokens.mask[i]].any(), "padding counted as visual"


@torch.no_grad()
def test_the_grid_locates_every_token(family):
    """Project the tower's features by hand at (crop, row, column): that must be the token."""
    model = tiny(family)
    rows = [*LONG_ROWS, SEVERAL[0], [BOS, Picture(9, (40, 64)), 5], [BOS, Picture(10, (64, 23)), 5]]
    seen = []

    class Spy(First):
        def compress(self, image):
            seen.append(image)
            return super().compress(image)

    newline = getattr(model.model, "image_newline", None)
    with vlmslim.patch(model, Spy()):
        model(**batch(model, rows))
    for image in seen:
        projected = model.model.multi_modal_projector(image.tower)
        crop, row, column = image.grid.unbind(1)
        patch = crop >= 0
        close(image.features[patch], projected[crop[patch], row[patch] * 4 + column[patch]], 1e-4)
        if (~patch).any():
            close(image.features[~patch], newline.expand(int((~patch).sum()), -1))
        assert bool((~patch).any()) == (family in ("next", "onevision"))


@torch.no_grad()
def test_the_grid_of_a_video_locates_every_token():
    model = tiny("onevision")
    seen = []

    class Spy(First):
        def compress(self, image):
            seen.append(image)
            return super().compress(image)

    with vlmslim.patch(model, Spy()):
        model(**batch(model, [[BOS, Clip(0, 3), 5, 6]]))
    (image,) = seen
    assert image.video
    frame, row, column = image.grid.unbind(1)
    assert (frame[:12].view(3, 4) == torch.arange(3)[:, None]).all()
    assert frame[12] == -1
    projected = model.model.multi_modal_projector(image.tower).view(3, 4, 4, -1)
    for token in range(12):
        r, c = int(row[token]), int(column[token])
        block = projected[frame[token], 2 * r : 2 * r + 2, 2 * c : 2 * c + 2].mean((0, 1))
        close(image.features[token], block, 1e-4)


@pytest.mark.parametrize("layer", [0, 1, -1])
@torch.no_grad()
def test_tower_queries_and_keys_give_the_towers_own_attention(family, layer):
    eager = tiny(family, "eager")
    inputs = batch(eager, [ROWS[0]])
    maps = []
    encoder = getattr(eager.model.vision_tower, "vision_model", eager.model.vision_tower).encoder
    hook = encoder.layers[layer].self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1]))
    eager(**inputs)
    hook.remove()
    seen = []

    class Look(First):
        tower_layers = (layer,)

        def compress(self, image):
            q, k = image.qk(layer)
            seen.append((q @ k.transpose(-1, -2) / 8**0.5).softmax(-1))
            return super().compress(image)

    model = tiny(family, "sdpa")
    with vlmslim.patch(model, Look()):
        model(**inputs)
    close(seen[0], maps[0][: len(seen[0])], 1e-5)


# --- dtypes, devices, back ends --------------------------------------------------------------------------------------


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
        assert lengths(got.past_key_values) == lengths(want.past_key_values)


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
    try:
        model(**inputs)
    except Exception as error:  # the unpatched model cannot do it here: not ours to test
        pytest.skip(f"{implementation} does not run on this machine without a patch: {type(error).__name__}: {error}")
    mask = inputs["attention_mask"].bool()
    for rule in rules:
        with vlmslim.patch(model, rule):
            got = greedy(model, inputs)
            assert torch.isfinite(model(**inputs).logits[mask]).all()
        close(got[1], wanted[name_of(rule)], 2e-2 if dtype == torch.float16 else 1e-3)
