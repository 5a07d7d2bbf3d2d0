"""Recomputed attention, of the tower and of the decoder, against the models' own maps."""

import pytest
import torch
from compare import close, lengths
from doubles import BUDGETED, Both, BothOriginal, Everything, First, Stairs, expect, name_of, registered
from prompts import LONG_ROWS, ROWS, SEVERAL, Picture, batch, valid, words
from tiny import BOS, DEPTH, tiny
from watch import Watch

import vlmslim
from vlmslim.engine.families import kv_cache


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


@torch.no_grad()
def test_a_look_at_attention_projects_only_what_it_reads(family):
    """A tower layer is read, not run again; a decoder layer makes queries of the rows asked for, and keys once."""

    class Look(First):
        tower_layers, layers = (1,), (2,)

        def compress(self, image):
            assert image.qk(1)[0].isfinite().all()
            return super().compress(image)

        def retain(self, tokens):
            for attention in (tokens.attention, tokens.coming_attention):
                assert attention(tokens.last[:, None]).isfinite().all()
            return tokens.mask

    model = tiny(family, "sdpa")
    core = model.model
    encoder = getattr(core.vision_tower, "vision_model", core.vision_tower).encoder
    watched = {
        "tower": encoder.layers[1],
        "before": core.language_model.layers[1],
        "coming": core.language_model.layers[2],
    }
    lengths = {(place, part): [] for place in watched for part in "qkv"}
    for (place, part), seen in lengths.items():
        projection = getattr(watched[place].self_attn, f"{part}_proj")
        projection.register_forward_hook(lambda module, args, out, seen=seen: seen.append(out.shape[1]))
    with vlmslim.patch(model, Look()):
        model(**batch(model, [ROWS[0]]))
    patches, whole = lengths["tower", "v"][0], lengths["before", "v"][0]
    assert lengths == {
        **{("tower", part): [patches] for part in "qkv"},
        **{("before", "q"): [whole, 1], ("before", "k"): [whole], ("before", "v"): [whole]},
        **{("coming", "q"): [1, whole], ("coming", "k"): [whole, 0], ("coming", "v"): [whole]},
    }


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
def test_keys_of_the_kv_cache_serve_as_recomputed_ones(family, backend):
    model, seen = tiny(family, backend), {}

    class Looking(Stairs):
        def retain(self, tokens):
            seen.setdefault(tokens.layer, []).append((tokens.in_cache is None, tokens.attention(tokens.last[:, None])))
            return super().retain(tokens)

    inputs = batch(model, LONG_ROWS)
    with vlmslim.patch(model, Looking()):
        model(**inputs, use_cache=True)
        model(**inputs, use_cache=False)
    assert seen
    for (cached, ours), (recomputed, want) in seen.values():
        assert recomputed and not cached
        assert torch.equal(ours, want)


@pytest.mark.parametrize("name", [name for name in BUDGETED if name != "aim"])
@torch.no_grad()
def test_no_full_attention_map_is_made(family, name):
    """Attention stays fused, the engine asks for no weights, and no (heads, S, S) tensor is made in the language model.

    AIM reads every row, block by block, and a block of a tiny prompt looks like a map: see test_aim.
    """
    model = tiny(family)
    row = [BOS, Picture(0, (64, 64)), *words(0, 7)]
    inputs = batch(model, [row])
    weights = []
    for layer in model.model.language_model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, out: weights.append(out[1]))
    length = inputs["input_ids"].shape[1]
    with vlmslim.patch(model, registered(name, 5)), Watch() as watch:
        out = model(**inputs)
    assert weights == [None] * DEPTH
    assert out.attentions is None
    assert model.config.get_text_config()._attn_implementation == "sdpa"
    sizes = {length, *lengths(kv_cache(out))} - {16, 17}  # the tower's own maps are 16 or 17 wide
    heads = model.config.get_text_config().num_attention_heads
    full = [s for s in watch.shapes if len(s) >= 3 and s[-1] == s[-2] in sizes and heads in s[:-2]]
    assert not full, f"made a full attention map: {full[0]}"


@torch.no_grad()
def test_attention_of_padding_is_finite_in_half_precision(backend):
    model = tiny("llava", backend, torch.float16)
    seen = []

    class Look(Everything):
        def retain(self, tokens):
            everywhere = torch.arange(tokens.mask.shape[1]).expand(tokens.mask.shape)
            seen.append(tokens.attention(everywhere))
            return tokens.mask

    rows = [[BOS, Picture(0), 5], [BOS, *words(0, 60), Picture(1), *words(1, 9)]]
    with vlmslim.patch(model, Look()):
        model(**batch(model, rows))
    for attention in seen:
        assert torch.isfinite(attention).all()
