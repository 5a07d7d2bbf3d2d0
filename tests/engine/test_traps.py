"""What went wrong in other tools: one test for each trap that applies here, by its number.

Not here: 4 (every test runs on the installed transformers), 16 (`test_methods.py`: seeds), 21, 23 and 27 (measuring,
harness and FLOPs: with the evaluation's tests), 25 where a method reads text (with that method).
"""

import ast
import warnings
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from doubles import BUDGETED, Both, Everything, First, Halve, Rule, Stairs, Strided, expect, registered
from tiny import (
    BOS,
    DEPTH,
    IMAGE,
    LONG_ROWS,
    ROWS,
    SEVERAL,
    Clip,
    Picture,
    batch,
    close,
    greedy,
    lengths,
    merged_embeddings,
    tiny,
    visual,
    words,
)
from torch.utils._python_dispatch import TorchDispatchMode

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache
from vlmslim.methods.divprune import farthest_points
from vlmslim.registry import method_class

SOURCE = Path(vlmslim.__file__).parent
METHODS = [name for name in vlmslim.method_names() if name != "none"]


class Watch(TorchDispatchMode):
    """Notes the shape of every tensor that is made, and counts operations by name."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        self.calls: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.calls[name] = self.calls.get(name, 0) + 1
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                self.shapes.append(tuple(x.shape))
        return out

    def syncs(self) -> int:
        """Operations that make the host wait for the device."""
        waiting = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim")
        return sum(self.calls.get(name, 0) for name in waiting)


@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_trap_1_no_decoder_layer_runs_twice(family, name):
    model = tiny(family)
    inputs = batch(model, LONG_ROWS)
    runs = [0] * DEPTH
    for i, layer in enumerate(model.model.language_model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: runs.__setitem__(i, runs[i] + 1))
    with vlmslim.patch(model, registered(name, 5)):
        out = model(**inputs)
        assert runs == [1] * DEPTH
        before = lengths(kv_cache(out))
        model(torch.tensor([[5]] * 4), **{KV_CACHE: kv_cache(out)})
    assert runs == [2] * DEPTH
    assert lengths(kv_cache(out)) == [n + 1 for n in before]


@pytest.mark.parametrize("name", [name for name in BUDGETED if name != "aim"])
@torch.no_grad()
def test_traps_2_and_22_no_full_attention_map_is_made(family, name):
    """Attention stays fused, nobody asks for weights, and no (heads, S, S) tensor is made in the language model.

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
def test_trap_3_every_sample_changes_not_only_the_first(family):
    model = tiny(family)
    rows = [[BOS, Picture(i), *words(i, 4)] for i in range(4)]
    inputs = batch(model, rows)
    plain = model(**inputs).logits[:, -1]
    for rule in (Strided(), Halve()):
        with vlmslim.patch(model, rule):
            patched = model(**inputs).logits[:, -1]
        assert ((patched - plain).abs().amax(1) > 1e-2).all()


@torch.no_grad()
def test_trap_5_the_image_may_stand_anywhere(family):
    """Behind 0, 1, 5, 15, 35 and 50 tokens of text; the text always stays."""
    model = tiny(family)
    for name in ("divprune", "fastv", "uniform"):
        for before in (0, 1, 5, 15, 35, 50):
            row = [*words(before, before), Picture(0), *words(99, 4)]
            inputs = batch(model, [row])
            seen = []

            class Spy(Rule):
                layers = (3,)

                def retain(self, tokens, seen=seen):
                    seen.append(tokens)
                    return tokens.mask

            with vlmslim.patch(model, [vlmslim.method(name, keep=5), Spy()]):
                model(**inputs)
            (tokens,) = seen
            ids = inputs["input_ids"][0][tokens.origin[0]]
            assert int((ids == IMAGE).sum()) == 5, "not the image's tokens were dropped"
            assert ids[ids != IMAGE].tolist() == [t for t in inputs["input_ids"][0].tolist() if t != IMAGE]


@torch.no_grad()
def test_trap_6_each_sample_has_its_own_ranking(family):
    """Equal prompts, different pictures: the kept places differ, and are those of each picture alone."""
    model = tiny(family)
    text = words(0, 5)
    rows = [[BOS, Picture(i), *text] for i in range(4)]

    def kept(method, rows):
        seen = []

        class Spy(Rule):
            layers = (3,)

            def retain(self, tokens):
                for origin, image in zip(tokens.origin, tokens.image, strict=True):
                    seen.append(tuple(origin[image > 0].tolist()))
                return tokens.mask

        with vlmslim.patch(model, [method, Spy()]):
            model(**batch(model, rows))
        return seen

    for method in (
        vlmslim.method("divprune", keep=5),
        vlmslim.method("fastv", keep=5),
        vlmslim.method("random", keep=5),
    ):
        together = kept(method, rows)
        assert together == [kept(method, [row])[0] for row in rows]
        assert len(set(together)) > 1


def test_trap_7_positions_are_stated_by_every_method():
    """A method before the language model says which convention it follows. What each means: test_equivalence.py."""
    for name in METHODS:
        assert method_class(name).positions in ("renumbered", "original")


@torch.no_grad()
def test_trap_7_the_rotary_table_is_not_sized_by_the_short_sequence(family):
    """With original positions the last tokens sit far beyond the number of tokens that are left, in decoding too."""
    model = tiny(family)
    row = [BOS, Picture(0, (64, 64)), *words(0, 3)]
    seen = []

    def note(module, args, kwargs):
        seen.append((args[1] if len(args) > 1 else kwargs["position_ids"]).max().item())

    model.model.language_model.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)
    inputs = batch(model, [row])
    length = inputs["input_ids"].shape[1]
    with vlmslim.patch(model, "uniform", keep=1, positions="original"):
        greedy(model, inputs, max_new_tokens=3)
    assert seen == [length - 1, length, length + 1]
    seen.clear()
    with vlmslim.patch(model, "uniform", keep=1):
        greedy(model, inputs, max_new_tokens=3)
    assert seen == [4, 5, 6]


@pytest.mark.parametrize("rule", [Strided(), Stairs(), Both()], ids=str)
@torch.no_grad()
def test_trap_8_the_callers_tensors_are_not_edited(family, backend, rule):
    model = tiny(family, backend)
    inputs = batch(model, LONG_ROWS)
    copies = {key: value.clone() for key, value in inputs.items()}
    labels = inputs["input_ids"].clone()
    with vlmslim.patch(model, rule):
        model(**inputs, labels=labels)
        greedy(model, inputs)
    assert torch.equal(labels, copies["input_ids"])
    for key, value in copies.items():
        assert torch.equal(inputs[key], value), key


@torch.no_grad()
def test_trap_9_tokens_are_removed_not_masked(family):
    """Fewer tokens pass through the layers, and fewer are cached."""
    model = tiny(family)
    inputs = batch(model, ROWS)
    widths = [0] * DEPTH
    for i, layer in enumerate(model.model.language_model.layers):
        layer.mlp.register_forward_hook(lambda m, a, out, i=i: widths.__setitem__(i, out.shape[1]))
    rows = [expect(tiny(family), row, Both()) for row in ROWS]
    with vlmslim.patch(model, Both()):
        out = model(**inputs)
    want = [max(int(ref.alive(layer).sum()) for ref in rows) for layer in range(DEPTH)]
    assert widths == want == lengths(kv_cache(out))
    assert widths[0] < inputs["input_ids"].shape[1]
    assert widths[3] < widths[2] < widths[0]


@torch.no_grad()
def test_trap_10_the_mosaic_follows_the_unpadded_grid():
    """Sizes that lose rows or columns to unpadding: coordinates are contiguous within what is left, and in order."""
    for family in ("next", "onevision"):
        model = tiny(family)
        for size in ((60, 30), (64, 23), (23, 64), (40, 64), (60, 60), (32, 64)):
            seen = []

            class Spy(First):
                def compress(self, image, seen=seen):
                    seen.append(image)
                    return super().compress(image)

            with vlmslim.patch(model, Spy()):
                model(**batch(model, [[BOS, Picture(0, size), 5]]))
            component, row, column = seen[0].mosaic.unbind(1)
            tiles = component == 1
            height, width = row[tiles].unique(), column[tiles].unique()
            assert (height.diff() == 1).all()
            assert (width.diff() == 1).all()
            assert len(height) * len(width) == int(tiles.sum())
            assert torch.equal(row[tiles], height.repeat_interleave(len(width)))
            assert torch.equal(column[tiles], width.repeat(len(height)))
            assert int((component < 0).sum()) == len(height), "one newline ends each row"


@torch.no_grad()
def test_trap_11_every_image_of_a_prompt_counts(family):
    model = tiny(family)
    row = [BOS, Picture(3), *words(0, 2), Picture(4), *words(1, 2), Picture(5), *words(2, 3)]
    inputs = batch(model, [row])
    text = int((inputs["input_ids"] != IMAGE).sum())
    for name in ("divprune", "uniform", "random", "pool", "fastv"):
        with vlmslim.patch(model, name, keep=4) as slim:
            out = model(**inputs)
        assert lengths(kv_cache(out))[-1] == text + 3 * 4
        assert slim.receipt.summary()["images"] == 3
    features = merged_embeddings(model, inputs)[0]
    alone = [farthest_points(features[place], 4).sort().values for place in visual(inputs)]
    seen = []

    class Spy(Rule):
        layers = (1,)

        def retain(self, tokens):
            seen.append(tokens.origin[0][tokens.image[0] > 0])
            return tokens.mask

    with vlmslim.patch(model, [vlmslim.method("divprune", keep=4), Spy()]):
        model(**inputs)
    want = torch.cat([place[index] for place, index in zip(visual(inputs), alone, strict=True)])
    assert torch.equal(seen[0], want)


@torch.no_grad()
def test_trap_12_log_likelihood_slices_by_the_expanded_prompt():
    """The caller's own count of tokens still finds the continuation. Losses: test_labels.py."""
    model = tiny("llava")
    context, continuation = ROWS[1], words(33, 3)
    start = batch(model, [context])["input_ids"].shape[1]
    inputs = batch(model, [[*context, *continuation]])
    labels = inputs["input_ids"].clone()
    labels[:, :start] = -100
    want = expect(model, [*context, *continuation], Strided()).logits()[-4:-1].log_softmax(-1)
    with vlmslim.patch(model, Strided()):
        out = model(**inputs, labels=labels)
    found = out.logits[0, start - 1 : -1].log_softmax(-1)
    assert found.shape[0] == 3
    close(found, want)
    close(out.loss, -want.gather(1, torch.tensor(continuation)[:, None]).mean())


def test_trap_13_nothing_is_assigned_to_other_libraries():
    """No statement in the package assigns to an attribute of an imported module or class."""
    for path in SOURCE.rglob("*.py"):
        if "evaluation" in path.parts:
            continue
        tree = ast.parse(path.read_text())
        imported = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                imported |= {(a.asname or a.name).split(".")[0] for a in node.names}
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in imported - {"sys"}, (
                        f"{path.name}:{node.lineno} assigns to {target.value.id}"
                    )


@pytest.mark.parametrize("name", BUDGETED)
def test_trap_14_defaults_suit_any_depth(family, name):
    """A method at its defaults attaches to a 3-layer tower and a 4-layer decoder."""
    model = tiny(family)
    with vlmslim.patch(model, registered(name, 5)), torch.no_grad():
        model(**batch(model, ROWS))


@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_trap_15_a_method_that_does_nothing_is_noticed(family, name):
    """Through generate(), which encodes images before it calls forward: the cache is shorter, as the receipt says."""
    model = tiny(family)
    inputs = batch(model, ROWS)
    with vlmslim.patch(model, registered(name, 5)) as slim:
        out = greedy(model, inputs)[0]
    assert lengths(kv_cache(out))[-1] < out.sequences.shape[1] - 1
    assert slim.receipt.summary()["had_effect"] is True
    assert slim.receipt.summary()["images"] == 2
    with vlmslim.patch(model, "none") as slim:
        greedy(model, inputs)
    assert slim.receipt.summary()["had_effect"] is False


def test_trap_17_selection_is_not_done_in_half_precision():
    """Near duplicates in 4096 dimensions: as many distinct picks as asked for, and those of fp32 on the same values."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(24, 4096, generator=generator)
    x = centres[torch.arange(256) % 24] + 0.05 * torch.randn(256, 4096, generator=generator)
    for dtype in (torch.float16, torch.bfloat16):
        half = x.to(dtype)
        picks = farthest_points(half, 58).tolist()
        assert len(set(picks)) == 58
        assert picks == farthest_points(half.float(), 58).tolist()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert farthest_points(half, 58).tolist() == picks
    zero = torch.randn(32, 16, generator=generator)
    zero[5] = 0
    assert len(set(farthest_points(zero, 8).tolist())) == 8
    copies = torch.randn(16, 8, generator=generator).repeat(4, 1)
    picks = farthest_points(copies, 32).tolist()
    assert len(set(picks)) == 32
    assert len({p % 16 for p in picks[:16]}) == 16, "a copy was taken before every distinct token was"


@torch.no_grad()
def test_trap_18_kept_tokens_are_in_reading_order(family):
    for name in ("divprune", "random", "uniform", "pool"):
        model = tiny(family)
        seen = []
        cls = method_class(name)

        class Spy(cls):
            def compress_images(self, images, seen=seen):
                results = super().compress_images(images)
                seen += results
                return results

        with vlmslim.patch(model, Spy(keep=6)):
            model(**batch(model, [*LONG_ROWS, *SEVERAL]))
        assert len(seen) == 6
        for result in seen:
            assert (result.index.diff() > 0).all()


def test_traps_19_and_20_selection_does_not_wait_for_the_device():
    """The greedy loop makes no host synchronisation, however many tokens it picks, and is O(k n)."""
    x = torch.randn(2, 300, 32)
    for k in (2, 100):
        with Watch() as watch:
            farthest_points(x, k)
        assert watch.syncs() == 0
    largest = max(torch.tensor(shape).prod().item() for shape in watch.shapes)
    assert largest <= 2 * 300 * 300
    big = [shape for shape in watch.shapes if torch.tensor(shape).prod().item() > 2 * 300 * 32]
    assert len(big) < 10, "a matrix is made at every step"


@pytest.mark.parametrize("name", ["random", "uniform", "pool", "fastv", "divprune"])
@torch.no_grad()
def test_trap_20_synchronisations_do_not_grow_with_tokens(name):
    counts = []
    for keep in (3, 12):
        model = tiny("llava")
        inputs = batch(model, ROWS)
        with vlmslim.patch(model, name, keep=keep), Watch() as watch:
            model(**inputs)
        counts.append(watch.syncs())
    assert counts[0] == counts[1]


@torch.no_grad()
def test_trap_24_videos_of_one_batch_and_their_placeholders():
    model = tiny("onevision")
    rows = [[BOS, Clip(i), *words(i, 3 + i)] for i in range(2)]
    with vlmslim.patch(model, "divprune", keep=0.5) as slim:
        out = model(**batch(model, rows))
    assert slim.receipt.summary()["kept"] == 6  # 13 tokens; 6.5 rounds to even
    assert lengths(kv_cache(out)) == [1 + 6 + 4] * DEPTH


@torch.no_grad()
def test_trap_25_a_method_is_shown_the_text_of_its_own_prompt(family):
    """The whole prompt, the question behind the image included; nothing of a neighbour's, no padding."""
    model = tiny(family)
    seen = []

    class Spy(First):
        def compress(self, image):
            seen.append(image.prompt.tolist())
            return super().compress(image)

    for use in ("forward", "generate"):
        seen.clear()
        with vlmslim.patch(model, Spy()):
            inputs = batch(model, ROWS)
            model(**inputs) if use == "forward" else model.generate(**inputs, num_beams=2, max_new_tokens=2)
        wanted = [[t for t in row if isinstance(t, int)] for row in ROWS]
        assert [text for i, text in enumerate(seen) if i == 0 or text != seen[i - 1]] == wanted


def test_trap_26_saving_a_patched_model_says_that_the_patch_is_not_saved(tmp_path):
    """The weights are the plain model's, and the user is told that the checkpoint is unpatched."""
    model = tiny("llava")
    keys = set(model.state_dict())
    with vlmslim.patch(model, "divprune", keep=4):
        assert set(model.state_dict()) == keys
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert set(again.state_dict()) == keys
    inputs = batch(again, ROWS)
    with torch.no_grad():
        close(again(**inputs).logits, tiny("llava")(**inputs).logits)
    assert any("patch" in str(w.message) for w in caught), "a patched model was saved without a word"


def test_trap_28_keep_means_kept_everywhere():
    for name in METHODS:
        options = {f.name for f in fields(method_class(name))}
        assert not options & {
            "rate",
            "ratio",
            "keep_ratio",
            "retention_ratio",
            "reduction_ratio",
            "prune_ratio",
            "drop",
        }
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    text = int((inputs["input_ids"] != IMAGE).sum())
    for name in ("divprune", "uniform", "random", "pool", "fastv"):
        for keep, kept in ((3, 3), (0.25, 4), (1.0, 16), (1, 1)):
            with vlmslim.patch(model, name, keep=keep), torch.no_grad():
                assert lengths(kv_cache(model(**inputs)))[-1] == text + kept


@torch.no_grad()
def test_trap_29_one_token_is_not_taken_for_a_decode_step(family):
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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", BUDGETED)
@torch.no_grad()
def test_trap_30_left_padding_is_finite_in_half_precision(backend, name, dtype):
    """One row of a few tokens beside one of many: most of the first is padding."""
    model = tiny("llava", backend, dtype)
    rows = [[BOS, Picture(0), 5], [BOS, *words(0, 60), Picture(1), *words(1, 9)], [BOS, 7]]
    with vlmslim.patch(model, registered(name, 2)):
        inputs = batch(model, rows)
        logits = model(**inputs).logits[inputs["attention_mask"].bool()]
        steps = greedy(model, inputs)[1]
    assert torch.isfinite(logits).all()
    assert torch.isfinite(steps[:, :, 2:90]).all()


@torch.no_grad()
def test_trap_30_attention_rows_of_padded_samples_are_finite(backend):
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
