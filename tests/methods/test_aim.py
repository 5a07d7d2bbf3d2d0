"""AIM and its stages against plain loops in float64, and against an unpatched model treated by hand."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from checks import check_a_batch_is_its_rows, kept_of
from compare import close, greedy, lengths
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import LONG_ROWS, ROWS, SEVERAL, Clip, Picture, batch, visual, words
from strategies import cosine, noise, some, thorough
from tiny import BOS, DEPTH, IMAGE, tiny
from unpatched import merged_embeddings, reference
from vector_checks import aim as vectors

import vlmslim
from vlmslim.engine.families import kv_cache
from vlmslim.methods.aim import AIM
from vlmslim.methods.bipartite_merge import BipartiteMerge, match, merge_step, merge_tokens
from vlmslim.methods.pagerank_prune import PageRankPrune, pagerank, previous_attention, scheduled

# --- plain loops -----------------------------------------------------------------------------------------------------


def merge_by_hand(x, metric, k: int):
    """Lists of (vector, key, index) merged step by step; returns vectors and indices."""
    tokens = [(v, m, i) for i, (v, m) in enumerate(zip(x.astype(float), metric.astype(float), strict=True))]
    while len(tokens) > k:
        r = min(len(tokens) - k, len(tokens) // 2)
        even, odd = tokens[::2], tokens[1::2]
        found = []
        for place, (_, key, _) in enumerate(even):
            similarity = [cosine(key, other) for _, other, _ in odd]
            best = max(range(len(odd)), key=lambda j: (similarity[j], -j))
            found.append((-similarity[best], place, best))
        found.sort()
        groups = {j: [odd[j]] for j in range(len(odd))}
        for _, place, best in found[:r]:
            groups[best].append(even[place])
        means = [
            (np.mean([t[0] for t in g], axis=0), np.mean([t[1] for t in g], axis=0), g[0][2]) for g in groups.values()
        ]
        tokens = [even[place] for _, place, _ in found[r:]] + means
    return np.stack([t[0] for t in tokens]), [t[2] for t in tokens]


def rank_by_hand(attention, iterations: int = 5, damping: float = 0.0):
    """attention: (heads, S, S). Every walker taken along by itself."""
    heads, size, _ = attention.shape
    total = np.zeros(size)
    for h in range(heads):
        p = [1 / size] * size
        for _ in range(iterations):
            q = [damping / size] * size
            for i in range(size):
                for j in range(size):
                    q[j] += (1 - damping) * p[i] * attention[h, i, j]
            p = q
        total += np.square(p)
    return np.sqrt(total / heads)


@thorough
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 4), st.data())
def test_merging_agrees_with_plain_loops(seed, n, frames, data):
    k = data.draw(st.integers(1, n))
    x, metric = noise(seed, frames, n, 5), noise(seed + 1, frames, n, 3)
    if data.draw(st.booleans()) and n > 2:
        metric[:, n // 2] = 0  # a zero token is like none
    for key in (None, metric):
        got, slot = merge_tokens(x, key, k)
        for f in range(frames):
            want, index = merge_by_hand(x[f].numpy(), (x if key is None else key)[f].numpy(), k)
            np.testing.assert_allclose(got[f], want, rtol=1e-5, atol=1e-5)
            assert slot[f].tolist() == index


def test_equal_tokens_merge_in_order():
    x = torch.arange(10.0)[:, None]
    order, mate = match(torch.ones(10, 4), 3)
    assert order.tolist() == [0, 1, 2, 3, 4]
    assert mate.tolist() == [0, 0, 0]
    assert merge_step(x, order, mate)[:, 0].tolist() == [6, 8, (1 + 0 + 2 + 4) / 4, 3, 5, 7, 9]


def test_merging_is_done_in_full_precision_and_passes_gradients():
    x = noise(0, 1, 32, 8)
    half = x.bfloat16()
    got, slot = merge_tokens(half, None, 9)
    want, place = merge_tokens(half.float(), None, 9)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want.bfloat16())
    assert torch.equal(slot, place)
    with torch.autocast("cpu", torch.bfloat16):
        inside = merge_tokens(x, None, 9)[0]
    assert torch.equal(inside, merge_tokens(x, None, 9)[0])
    x.requires_grad_()
    merge_tokens(x, None, 9)[0].sum().backward()
    assert (x.grad != 0).all()


@some
@given(
    st.integers(0, 10**6),
    st.integers(1, 14),
    st.integers(1, 3),
    st.integers(1, 6),
    st.booleans(),
    st.data(),
)
def test_importance_agrees_with_plain_loops(seed, size, heads, iterations, damped, data):
    """In blocks of any height, and with padding on either side."""
    rows, damping = data.draw(st.integers(1, size)), 0.15 * damped
    left, right = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    logits = noise(seed, heads, size, size) * 3
    inner = logits.masked_fill(torch.ones(size, size).triu(1).bool(), float("-inf")).double().softmax(-1)
    whole = left + size + right
    padded = torch.eye(whole, dtype=torch.float64).repeat(heads, 1, 1)  # a padding query sees itself
    padded[:, left : left + size, left : left + size] = inner
    real = torch.zeros(1, whole)
    real[:, left : left + size] = 1
    attention = padded.float()[None]
    blocks = [attention[:, :, max(0, end - rows) : end, :end] for end in range(whole, 0, -rows)]
    score = pagerank(real, iter(blocks), iterations=iterations, damping=damping)[0]
    want = rank_by_hand(inner.numpy(), iterations, damping)
    np.testing.assert_allclose(score[left : left + size], want, rtol=1e-4, atol=1e-7)


def test_small_ranks_stay_apart():
    """Their squares would all be zero in fp32."""
    tail = torch.tensor([1e-25, 3e-25, 2e-25])
    row = torch.cat([torch.tensor([1.0]), tail])
    attention = torch.zeros(1, 1, 4, 4)
    attention[..., :, :] = torch.eye(4)
    attention[..., 3, :] = row
    attention[..., 1, :2] = torch.tensor([1.0, 1e-25])
    attention[..., 2, :3] = torch.tensor([1.0, 0, 2e-25])
    score = pagerank(torch.ones(1, 4), [attention], iterations=1)[0]
    assert 0 < score[1] < score[2]


@given(st.integers(0, 3000), st.integers(0, 40), st.integers(0, 30), st.integers(1, 20))
def test_the_schedule_is_the_papers(n, layer, start, width):
    stop = start + width
    share = 1 if layer < start else max(Fraction(0), 1 - Fraction(layer - start, stop - start))
    assert scheduled(n, layer, start, stop) == int(n * share)


# --- in a model ------------------------------------------------------------------------------------------------------


def likeness_by_hand(model, inputs: dict):
    """Compute the tokens that merge and the keys that compare them, of one image, on an unpatched model."""
    core = model.model
    tower = core.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    layer = getattr(core.vision_tower, "vision_model", core.vision_tower).encoder.layers[-1]
    keys = layer.self_attn.k_proj(layer.layer_norm1(tower.hidden_states[-2]))
    x = tower.hidden_states[core.config.vision_feature_layer]
    if core.config.vision_feature_select_strategy == "default":
        x, keys = x[:, 1:], keys[:, 1:]
    return x[0], keys[0]


def entering(model, row: list, k: int, order: str = "raster"):
    """Embeddings of a LLaVA row of one image whose tokens are merged to k, and the caller's positions they take."""
    inputs = batch(model, [row])
    (place,) = visual(inputs)
    x, keys = likeness_by_hand(model, inputs)
    merged, index = merge_by_hand(x.numpy(), keys.numpy(), k)
    if order == "raster":
        merged = merged[np.argsort(index)]
    features = model.model.multi_modal_projector(torch.from_numpy(merged).float()[None])[0]
    kept = torch.arange(inputs["input_ids"].shape[1])
    kept = torch.cat([kept[: place[0]], place[sorted(index)], kept[place[-1] + 1 :]])
    embeds = merged_embeddings(model, inputs)[:, kept]
    there = torch.isin(kept, place)
    embeds[0, there] = features
    return inputs, kept, there, embeds


def pruned_by_hand(model, inputs, kept, there, embeds, start: int, stop: int, positions: str):
    """A run of the unpatched model in which every layer's survivors follow from the eager attention before it."""
    drops: dict[int, torch.Tensor] = {}
    total = int(there.sum())
    gone = torch.zeros(len(kept), dtype=torch.bool)
    maps: list[torch.Tensor] = []
    layers = model.model.language_model.layers
    hooks = [layer.self_attn.register_forward_hook(lambda m, a, out: maps.append(out[1][0])) for layer in layers]
    for layer in range(start + 1, min(stop, DEPTH - 1) + 1):
        maps.clear()
        reference(model, inputs, kept, embeds=embeds, drops=drops, positions=positions)
        alive = (~gone).nonzero()[:, 0]
        sharp = maps[layer - 1].double()[:, alive][:, :, alive] ** 10  # the softmax at a tenth of the temperature
        score = rank_by_hand((sharp / sharp.sum(-1, keepdim=True)).numpy())
        budget = int(total * Fraction(stop - layer, stop - start)) if layer < stop else 0
        candidates = [(-score[i], int(a)) for i, a in enumerate(alive) if there[a]]
        gone = there.clone()
        gone[[a for _, a in sorted(candidates)[:budget]]] = False
        drops[layer] = gone.clone()
    for hook in hooks:
        hook.remove()
    return reference(model, inputs, kept, embeds=embeds, drops=drops, positions=positions)


@pytest.mark.parametrize(
    "positions,order", [("renumbered", "raster"), ("original", "raster"), ("renumbered", "released")]
)
@pytest.mark.parametrize("kind", ["llava", "siglip"])
@torch.no_grad()
def test_both_stages_equal_doing_them_by_hand(kind, positions, order):
    row, k, start, stop = ROWS[1], 7, 0, 4
    model = tiny(kind, "eager")
    ref = pruned_by_hand(model, *entering(model, row, k, order), start, stop, positions)
    inputs = batch(model, [row])
    with vlmslim.patch(model, "aim", keep=k, start=start, stop=stop, order=order, positions=positions) as slim:
        out = model(**inputs)
    text = len(row) - 1
    assert slim.receipt.summary()["visual_tokens_per_layer"] == [7, 5, 3, 1]
    assert lengths(kv_cache(out)) == [text + v for v in (7, 5, 3, 1)]
    close(out.logits[0], ref.full_logits())


@torch.no_grad()
def test_attention_in_blocks_is_the_models_own(family):
    """Whole rows, the last first, whatever the height of a block; then the scores do not depend on it."""
    model = tiny(family, "eager")
    found = {}

    class Spy(PageRankPrune):
        def retain(self, tokens):
            for rows in (1, 5, 1000):
                blocks = list(previous_attention(tokens, 1.0, rows))
                size = tokens.hidden.shape[1]
                joined = torch.cat([torch.nn.functional.pad(b, (0, size - b.shape[-1])) for b in reversed(blocks)], 2)
                found.setdefault("maps", []).append(joined)
                found.setdefault("scores", []).append(pagerank(tokens.mask, iter(blocks)))
            found.setdefault("mask", tokens.mask)
            return super().retain(tokens)

    inputs = batch(model, ROWS)
    own = []
    hook = model.model.language_model.layers[0].self_attn.register_forward_hook(lambda m, a, out: own.append(out[1]))
    with vlmslim.patch(model, Spy(start=0, stop=2)):
        model(**inputs)
    hook.remove()
    real = found["mask"]
    for joined, score in list(zip(found["maps"], found["scores"], strict=True))[:3]:
        for i in range(len(real)):
            close(joined[i][:, real[i]], own[0][i][:, real[i]])
        close(score, found["scores"][0], 1e-5)


@pytest.mark.parametrize("rows", [LONG_ROWS, SEVERAL], ids=["long", "several"])
def test_a_batch_is_its_rows_with_drops_before_every_layer(family, rows):
    check_a_batch_is_its_rows(tiny(family), rows, AIM(keep=0.4, start=0, stop=4))


@torch.no_grad()
def test_tiles_merge_by_their_own_keys():
    """LLaVA-NeXT: every tile for itself, unpadded as the model does; newlines go."""
    model = tiny("next")
    _, _, ((image, out),), _ = kept_of(model, ROWS[0], BipartiteMerge, keep=9)
    crop, line, column = image.grid.unbind(1)
    keys = image.qk(-1)[1].transpose(1, 2).flatten(2)[:, 1:]
    assert (crop[out.index] >= 0).all()
    for c in range(len(image.tower)):
        index = (crop == c).nonzero()[:, 0]
        mine = [i for i in out.index.tolist() if crop[i] == c]
        assert abs(len(mine) - 9 * len(index) / (crop >= 0).sum()) < 1
        if not mine:
            continue
        patch = line[index] * image.side + column[index]
        want, place = merge_by_hand(image.tower[c, patch].numpy(), keys[c, patch].numpy(), len(mine))
        want = model.model.multi_modal_projector(torch.from_numpy(want[np.argsort(place)]).float())
        assert sorted(index[place].tolist()) == mine
        close(out.features[torch.isin(out.index, index)], want)


@torch.no_grad()
def test_a_cls_token_among_the_features_merges_like_a_patch():
    model = tiny("llava")
    model.config.vision_feature_select_strategy = "full"
    inputs = batch(model, [ROWS[0]])
    ids = inputs["input_ids"][0].tolist()
    ids.insert(ids.index(IMAGE), IMAGE)  # one more placeholder, for CLS
    inputs |= dict(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
    merge, shown = watched(BipartiteMerge, keep=6)
    with vlmslim.patch(model, merge):
        model(**inputs)
    ((_, got),) = shown
    x, keys = likeness_by_hand(model, inputs)
    want, index = merge_by_hand(x.numpy(), keys.numpy(), 6)
    assert got.index.tolist() == sorted(index)
    close(got.features, model.model.multi_modal_projector(torch.from_numpy(want[np.argsort(index)]).float()))


@pytest.mark.parametrize("newline", ["within", "extra"])
@torch.no_grad()
def test_videos_merge_within_frames_and_keep_their_last_token(newline):
    model = tiny("onevision")
    inputs = batch(model, [[BOS, Clip(0, 3), *words(0, 4)], [BOS, Clip(1, 3), *words(1, 4)]])
    merge, shown = watched(BipartiteMerge, keep=0.5, newline=newline)
    with vlmslim.patch(model, [merge, PageRankPrune(start=0, stop=4)]) as slim:
        out = model(**inputs)
    kept = 7 if newline == "extra" else 6  # 3 frames of 4 tokens, and the newline
    assert slim.receipt.summary()["visual_tokens_per_layer"] == [kept, kept * 3 // 4, kept // 2, kept // 4]
    assert torch.isfinite(out.logits).all()
    for image, got in shown:
        x = image.features[:-1].view(3, 4, -1)
        assert torch.equal(got.features[-1], image.features[-1])
        for frame, k in enumerate([2, 2, 2] if newline == "extra" else [2, 2, 1]):
            mine = got.index // 4 == frame
            mine &= got.index < 12
            want, place = merge_by_hand(x[frame].numpy(), x[frame].numpy(), k)
            assert (got.index[mine] - 4 * frame).tolist() == sorted(place)
            close(got.features[mine], torch.from_numpy(want[np.argsort(place)]).float())


@torch.no_grad()
def test_images_share_the_budget_of_their_prompt():
    model = tiny("llava")
    with vlmslim.patch(model, PageRankPrune(start=0, stop=4)) as slim:
        model(**batch(model, SEVERAL[:1]))
    assert slim.receipt.summary()["visual_tokens_per_layer"] == [32, 24, 16, 8]


@torch.no_grad()
def test_a_prompt_that_ends_in_an_image_keeps_its_last_token(family):
    model = tiny(family)
    for row in ([BOS, *words(0, 3), Picture(0)], [Picture(0)]):
        inputs = batch(model, [row])
        with vlmslim.patch(model, "aim", keep=0.5, start=0, stop=2):
            out, logits = greedy(model, inputs)
        assert torch.isfinite(logits).all()
        assert lengths(kv_cache(out))[-1] == len(row) - 1 + 1 + 5


@pytest.mark.parametrize(
    "prune",
    [PageRankPrune(start=1, stop=3), {"method": "pagerank_prune", "start": 1, "stop": 3}],
    ids=["object", "name"],
)
@torch.no_grad()
def test_composes_with_another_method_before_it(prune):
    model = tiny("llava")
    with vlmslim.patch(model, [vlmslim.method("divprune", keep=8), prune]) as slim:
        model(**batch(model, ROWS))
    assert slim.receipt.summary()["visual_tokens_per_layer"] == [8, 8, 4, 0]
    with pytest.raises(ValueError, match="before the language model"):
        vlmslim.patch(model, [vlmslim.method("divprune", keep=8), AIM()])
    vlmslim.patch(model, "none").remove()


@torch.no_grad()
def test_its_stages_by_name_are_the_method(family):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, "aim", keep=5, start=0, stop=4):
        want = model(**inputs).logits
    stages = [{"method": "bipartite_merge", "keep": 5}, {"method": "pagerank_prune", "start": 0, "stop": 4}]
    with vlmslim.patch(model, stages):
        assert torch.equal(model(**inputs).logits, want)


def test_default_layers():
    for depth, span in {28: (14, 22), 32: (13, 21), 24: (12, 19), 40: (20, 31), 4: (2, 3)}.items():
        prune = PageRankPrune()
        prune.setup(vectors._Depth(depth))
        assert prune.span == span
        assert prune.layers == tuple(range(span[0] + 1, span[1] + 1))
    late = PageRankPrune(start=28, stop=29)  # the paper's ablation without pruning
    late.setup(vectors._Depth(28))
    assert late.layers == ()
    for depth in range(1, 13):  # shares never fall on one layer
        start, stop = PageRankPrune(start=0.5, stop=0.6).span_of(depth)
        assert start < stop <= depth
    assert PageRankPrune(start=3).span_of(4) == (3, 4)
    share = PageRankPrune(start=0.25, stop=1.0)
    share.setup(vectors._Depth(28))
    assert (share.span, share.layers[-1]) == ((7, 28), 27)


def test_a_schedule_that_ends_before_it_begins_is_refused():
    model = tiny("llava")
    with pytest.raises(ValueError, match="stop after the start"):
        vlmslim.patch(model, "aim", start=3, stop=3)
    with pytest.raises(ValueError, match="larger than the image"), vlmslim.patch(model, "aim", keep=17):
        model(**batch(model, ROWS))
    vlmslim.patch(model, "none").remove()
