"""ToDRE: the search against plain loops in float64, and both stages against models that know nothing of vlmslim."""

import numpy as np
import pytest
import torch
from checks import check_a_batch_is_its_rows, check_changes_nothing
from compare import close, greedy, lengths
from doubles import name_of, watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, ROWS, SEVERAL, Clip, Picture, batch, words
from strategies import cosine, thorough
from tiny import BOS, DEPTH, IMAGE, tiny
from unpatched import keep_only, merged_embeddings, reference

import vlmslim
from vlmslim.engine.families import kv_cache
from vlmslim.methods.divprune import DivPrune
from vlmslim.methods.drop_visual import DropVisual
from vlmslim.methods.todre import Diversify, ToDRE, at_tokens, diverse, similarity_to_mean

OBJECTIVES = ("max_sum", "k_center")

# --- the search, against plain loops ---------------------------------------------------------------------------------


def closeness(tokens: list, chosen: list[int], v: int, objective: str) -> float:
    likeness = [cosine(tokens[v], tokens[c]) for c in chosen]
    return sum(likeness) if objective == "max_sum" else max(likeness)


def plain(tokens: list, k: int, pivot: int, objective: str) -> list[int]:
    chosen = [pivot]
    while len(chosen) < k:
        rest = [v for v in range(len(tokens)) if v not in chosen]
        chosen.append(min(rest, key=lambda v: (closeness(tokens, chosen, v, objective), v)))
    return chosen


@st.composite
def clouds(draw):
    """Tokens (n, d) of random geometry, a budget and a pivot."""
    n, d = draw(st.integers(1, 24)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    x = rng.normal(size=(n, d)) + draw(st.sampled_from([0, 0, 3, 100])) * rng.normal(size=d)
    if draw(st.booleans()):  # near duplicates
        x = x[rng.integers(0, max(1, n // 3), n)] + 1e-3 * rng.normal(size=(n, d))
    x *= 10.0 ** rng.uniform(-3, 3, size=(n, 1))
    return x.astype(np.float32), draw(st.integers(1, n)), draw(st.integers(0, n - 1))


@given(clouds(), st.sampled_from(OBJECTIVES))
@thorough
def test_search_agrees_with_plain_loops(cloud, objective):
    x, k, pivot = cloud
    got = diverse(torch.from_numpy(x), k, torch.tensor(pivot), objective).tolist()
    assert got[0] == pivot
    assert len(set(got)) == k
    tokens = x.astype(np.float64).tolist()
    for i in range(1, k):  # each pick is the best that remains, as far as fp32 can tell
        scores = {v: closeness(tokens, got[:i], v, objective) for v in range(len(tokens)) if v not in got[:i]}
        ranked = sorted(scores.values())
        assert scores[got[i]] <= ranked[0] + 1e-5 * i
        if len(ranked) > 1 and ranked[1] - ranked[0] > 1e-5 * i:
            assert got[i] == min(scores, key=scores.get)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-1, 1]), st.integers(-4, 4)), min_size=1, max_size=20),
    st.sampled_from(OBJECTIVES),
    st.data(),
)
@thorough
def test_ties_go_to_the_lower_index(signed, objective, data):
    """Signed unit vectors times powers of two: every similarity is exactly -1, 0 or 1, and most are tied."""
    x = torch.zeros(len(signed), 4)
    for row, (axis, sign, power) in zip(x, signed, strict=True):
        row[axis] = sign * 2.0**power
    pivot = data.draw(st.integers(0, len(signed) - 1))
    got = diverse(x, len(signed), torch.tensor(pivot), objective).tolist()
    assert got == plain(x.tolist(), len(signed), pivot, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_search_properties(objective, monkeypatch):
    x = torch.randn(3, 40, 16)
    pivot = torch.tensor([0, 17, 39])
    order = diverse(x, 40, pivot, objective)
    assert order.shape == (3, 40)
    assert torch.equal(order.sort().values, torch.arange(40).expand(3, -1))
    for k in (1, 7, 39):
        assert torch.equal(diverse(x, k, pivot, objective), order[:, :k])
    assert torch.equal(diverse(x * 2.0 ** torch.randint(-9, 9, (3, 40, 1)), 40, pivot, objective), order)
    for i in range(3):  # alone as in a batch
        assert torch.equal(diverse(x[i], 40, pivot[i], objective), order[i])
    monkeypatch.setattr("vlmslim.methods.todre.MATRIX_LIMIT", 39)  # too many for a matrix of all pairs
    assert torch.equal(diverse(x, 40, pivot, objective), order)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(diverse(x, 40, pivot, objective), order)
    half = x.bfloat16()
    assert torch.equal(diverse(half, 40, pivot, objective), diverse(half.float(), 40, pivot, objective))


def test_zero_tokens_are_like_nothing():
    x = torch.zeros(5, 4)
    assert diverse(x, 5, torch.tensor(3)).tolist() == [3, 0, 1, 2, 4]


def test_maps_are_read_at_tokens_of_the_given_crops():
    maps = torch.arange(8.0).view(2, 2, 2)
    grid = torch.tensor([[0, 0, 0], [0, 1, 0], [1, 1, 1], [2, 0, 0], [-1, -1, -1], [0, -1, -1]])
    inf = float("inf")
    assert at_tokens(maps, grid).tolist() == [0, 2, 7, -inf, -inf, -inf]
    assert at_tokens(maps[:1], grid).tolist() == [0, 2, -inf, -inf, -inf, -inf]


# --- stage 1 in a model ----------------------------------------------------------------------------------------------


def crops_of(inputs: dict, family: str, i: int) -> torch.Tensor:
    """The crops of the i-th image, as many as the model takes up: (c, 3, h, w)."""
    pixels = inputs["pixel_values"][i]
    if family in ("llava", "siglip"):
        return pixels[None]
    rows, columns = {(60, 30): (2, 1), (32, 64): (1, 2), (60, 60): (2, 2), (64, 64): (2, 2)}[
        tuple(inputs["image_sizes"][i].tolist())
    ]
    return pixels[: 1 + rows * columns]


def expected_tokens(model, inputs: dict, objective="max_sum", keep=5) -> list[list[int]]:
    """Select what stage 1 keeps of each image of a CLIP model, by brute force on the tower's own attention maps."""
    family = "next" if "image_sizes" in inputs else "llava"
    extra = {"image_sizes": inputs["image_sizes"]} if family == "next" else {}
    features = model.model.get_image_features(inputs["pixel_values"], **extra).pooler_output
    kept = []
    for i, x in enumerate(features):
        thumbnail = crops_of(inputs, family, i)[:1]
        maps = model.model.vision_tower(thumbnail, output_attentions=True).attentions[-1]
        pivot = int(maps[0, :, 0, 1:].mean(0).argmax())  # the thumbnail comes first, its patches in order
        newline = [False] * len(x)
        if family == "next":
            newline = [torch.equal(token, model.model.image_newline) for token in x]
        patches = [j for j in range(len(x)) if not newline[j]]
        order = plain(x[patches].double().tolist(), keep, patches.index(pivot), objective)
        chosen = []
        for token in (patches[j] for j in order):
            if len(chosen) < keep:
                chosen.append(token)
            end = next((j for j in range(token, len(x)) if newline[j]), None) if token >= 16 else None
            if len(chosen) < keep and end is not None and end not in chosen:
                chosen.append(end)
        kept.append(sorted(chosen))
    return kept


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("family", ["llava", "next"])
@torch.no_grad()
def test_stage_one_equals_the_packed_prompt(family, objective):
    model = tiny(family, "eager")
    for row in (*ROWS, SEVERAL[0]):
        inputs = batch(model, [row])
        kept = expected_tokens(model, inputs, objective, keep=9)
        alive = keep_only(inputs, [torch.tensor(index) for index in kept])
        want = reference(model, inputs, alive, positions="original")
        with vlmslim.patch(model, "todre", keep=9, objective=objective, layer=None):
            out = model(**inputs)
        close(out.logits[0], want.full_logits())
        assert lengths(kv_cache(out)) == [len(alive)] * DEPTH


def kept_by(model, inputs: dict, **options):
    """Each image with the indices of the tokens it keeps in stage 1."""
    method, seen = watched(Diversify, **options)
    with vlmslim.patch(model, method), torch.no_grad():
        model(**inputs)
    return [(image, result.index) for image, result in seen]


@pytest.mark.parametrize("options", [{}, {"objective": "k_center"}, {"pivot": "random"}, {"pivot": "center"}], ids=str)
def test_an_image_keeps_the_same_tokens_in_any_batch(family, options):
    model = tiny(family)
    # OneVision packs the only image of a row otherwise than one of several: keep to one
    rows = LONG_ROWS if family == "onevision" else [*LONG_ROWS, *SEVERAL]
    together = kept_by(model, batch(model, rows), keep=5, **options)
    alone = [found for row in rows if any(isinstance(x, Picture) for x in row)
             for found in kept_by(model, batch(model, [row]), keep=5, **options)]  # fmt: skip
    assert [index.tolist() for _, index in together] == [index.tolist() for _, index in alone]
    for image, index in together:
        assert len(index) == 5
        assert index.tolist() == sorted(set(index.tolist()))
        assert index.max() < len(image.features)


@pytest.mark.parametrize("keep", [1, 2, 7, 0.5, 0.97])
@pytest.mark.parametrize("newline", ["rows", "drop", "pool"])
def test_the_budget_is_met_exactly(family, newline, keep):
    model = tiny(family)
    for image, index in kept_by(model, batch(model, LONG_ROWS), keep=keep, newline=newline):
        n = len(image.features)
        assert len(index.unique()) == (keep if isinstance(keep, int) else round(keep * n))
        crop = image.grid[index, 0]
        if newline == "drop" and len(index) <= (image.grid[:, 0] >= 0).sum():
            assert (crop >= 0).all()
        if newline == "rows":  # a newline only after tokens of its row
            previous = torch.cat([torch.tensor([-1]), crop[:-1]])
            assert not ((crop < 0) & (previous < 0)).any()


def test_towers_without_cls_take_a_random_pivot():
    for family in ("siglip", "onevision"):
        model = tiny(family)
        with pytest.raises(ValueError, match="'random'"):
            vlmslim.patch(model, "todre", pivot="cls")
        inputs = batch(model, LONG_ROWS)
        found = {s: [i.tolist() for _, i in kept_by(model, inputs, keep=3, seed=s)] for s in range(4)}
        assert found[0] == [i.tolist() for _, i in kept_by(model, inputs, keep=3, seed=0, pivot="random")]
        assert len({str(f) for f in found.values()}) > 1


@pytest.mark.parametrize("pivot", ["center", "farthest"])
def test_pivots_by_the_mean(pivot):
    model = tiny("llava")
    ((image, index),) = kept_by(model, batch(model, [ROWS[0]]), keep=1, pivot=pivot)
    unit = torch.nn.functional.normalize(image.features.double(), dim=-1)
    likeness = torch.nn.functional.cosine_similarity(unit, unit.mean(0), dim=-1)
    assert index.item() == (likeness.argmax() if pivot == "center" else likeness.argmin())
    torch.testing.assert_close(similarity_to_mean(image.features).argsort(), likeness.argsort())


def test_clips_are_searched_as_one(monkeypatch):
    model = tiny("onevision")
    inputs = batch(model, [[BOS, Clip(0), *words(0, 4)], [BOS, Clip(1), *words(1, 4)]])
    for image, index in kept_by(model, inputs, keep=6):
        assert len(index) == 6
        assert index[-1] == len(image.features) - 1, "the newline at the end of the clip belongs to all of it"
    out, logits = _greedy_under(model, inputs, "todre", keep=6, tau=None)
    assert torch.isfinite(logits).all()
    text = inputs["input_ids"].shape[1] - 13
    assert lengths(kv_cache(out)) == [text + 6 + 5] * 3 + [text + 5]


def test_a_clip_of_a_clip_tower_starts_from_its_best_frame():
    """No such checkpoint is bundled with transformers, but the tower is the user's choice."""
    from tiny import PINPOINTS, TEXT, TOWER, VIDEO
    from transformers import CLIPVisionConfig, LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration, Qwen2Config

    config = LlavaOnevisionConfig(
        text_config=Qwen2Config(**TEXT),
        vision_config=CLIPVisionConfig(**TOWER, projection_dim=16),
        image_grid_pinpoints=PINPOINTS,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_feature_select_strategy="default",
        vision_feature_layer=-2,
    )
    config._attn_implementation = "eager"
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    for p in model.model.vision_tower.parameters():
        torch.nn.init.normal_(p, 0, 0.5)
    inputs = batch(model, [[BOS, Clip(3), *words(0, 4)]])
    ((image, index),) = kept_by(model, inputs, keep=1)
    maps = model.model.vision_tower(image.pixels, output_attentions=True).attentions[-1]
    maps = maps[:, :, 0, 1:].mean(1).view(-1, 4, 4)
    pooled = maps.view(-1, 2, 2, 2, 2).mean((2, 4))  # 2 x 2 pooling, as of the features
    assert index.item() == pooled.argmax()


# --- both stages, and with others ------------------------------------------------------------------------------------


def _greedy_under(model, inputs, method, **options):
    with vlmslim.patch(model, method, **options):
        return greedy(model, inputs)


def test_both_stages_are_their_composition(family, backend):
    model = tiny(family, backend)
    inputs = batch(model, LONG_ROWS)
    whole, logits = _greedy_under(model, inputs, "todre", keep=5, layer=2, tau=0.2)
    for stages in (
        [Diversify(keep=5), DropVisual(layer=2, tau=0.2)],
        [{"method": "todre", "keep": 5, "layer": None}, {"method": "drop_visual", "layer": 2, "tau": 0.2}],
        [ToDRE(keep=5, layer=None), DropVisual(layer=2, tau=0.2)],
    ):
        parts, same = _greedy_under(model, inputs, stages)
        assert torch.equal(whole.sequences, parts.sequences)
        assert torch.equal(logits, same)


@pytest.mark.parametrize("tau", [0.3, None], ids=str)
def test_a_batch_is_its_rows(family, tau):
    # OneVision packs the only image of a row otherwise than one of several: keep to one
    rows = LONG_ROWS if family == "onevision" else [*LONG_ROWS, *SEVERAL]
    check_a_batch_is_its_rows(tiny(family), rows, ToDRE(keep=5, layer=2, tau=tau))


@pytest.mark.parametrize("method", [ToDRE(keep=1.0, tau=0.0), DropVisual(tau=0.0)], ids=name_of)
def test_a_threshold_that_nothing_falls_below_keeps_everything(family, backend, method):
    model = tiny(family, backend)
    check_changes_nothing(model, batch(model, [*LONG_ROWS, *SEVERAL]), method)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_selects_in_full_precision(family, dtype):
    model = tiny(family, dtype=dtype)
    inputs = batch(model, LONG_ROWS)
    for image, index in kept_by(model, inputs, keep=5, newline="drop", pivot="center"):
        x = image.features.double()
        pool = (image.grid[:, 0] >= 0).nonzero()[:, 0]
        start = int(similarity_to_mean(x[pool].float()).argmax())
        assert index.tolist() == sorted(pool[plain(x[pool].tolist(), 5, start, "max_sum")].tolist())
    out, logits = _greedy_under(model, inputs, "todre", keep=5, layer=2, tau=0.3)
    assert torch.isfinite(logits).all()
    assert lengths(kv_cache(out))[0] < out.sequences.shape[1] - 1


def test_the_receipt_tells_both_stages():
    model = tiny("llava")
    with vlmslim.patch(model, "todre", keep=5, tau=None) as slim:
        greedy(model, batch(model, ROWS))
    summary = slim.receipt.summary()
    assert summary["visual_tokens"] == 16
    assert summary["requested"] == summary["kept"] == 5
    assert summary["visual_tokens_per_layer"] == [5, 5, 5, 0]
    assert "ToDRE(keep=5" in summary["method"]


def test_embeddings_of_the_reference_are_what_the_spy_sees():
    """Guards the tests above: the tokens a method is shown are those an unpatched model would read."""
    model = tiny("next")
    inputs = batch(model, [ROWS[0]])
    with torch.no_grad():
        merged = merged_embeddings(model, inputs)[0][inputs["input_ids"][0] == IMAGE]
    ((image, _),) = kept_by(model, inputs, keep=5)
    assert torch.equal(image.features, merged)


def test_bad_combinations_are_errors():
    model = tiny("llava")
    for stages, message in (
        ([DivPrune(keep=4), ToDRE(keep=4)], "both work before"),
        ([ToDRE(keep=4, layer=3), DropVisual(layer=0.75)], "both drop tokens before"),
        (DropVisual(layer=DEPTH), "no decoder layer"),
        (DropVisual(layer=[0.75, 0.76]), "both drop tokens before"),
        (ToDRE(cls_layer=-4), "no layer -4"),
        (ToDRE(keep=17), "larger than the image"),
    ):
        with pytest.raises(ValueError, match=message), vlmslim.patch(model, stages):
            model(**batch(model, [ROWS[0]]))
