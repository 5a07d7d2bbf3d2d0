"""Recoverable Compression: against plain loops in float64, the prompt's text, its CLIPs, and the engine."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from checks import check_a_batch_is_its_rows
from clip_fixtures import ASSISTANT, LINE, SYS, USER, VOCABULARY, Words, stem_of, word_level
from doubles import watched
from hypothesis import given
from hypothesis import strategies as st
from prompts import Picture, batch, visual_tokens
from recovery_by_hand import recover_by_hand
from strategies import cosine, some, thorough
from tiny import BOS, tiny
from transformers import CLIPModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

import vlmslim
from vlmslim import bundled
from vlmslim.methods.recoverable import Recoverable, clusters, joint_cls_attention, share_of, text_similarity

# --- the parts, against plain loops -----------------------------------------------------------------------------------


@some
@given(seed=st.integers(0, 10**6), p=st.integers(1, 9), heads=st.integers(1, 3))
def test_attention_of_one_wide_head(seed, p, heads):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 2, heads, p + 1, 4, generator=generator)
    got = joint_cls_attention(q, k)
    for c in range(2):
        wide = lambda t, i, c=c: [v for h in range(heads) for v in t[c, h, i].tolist()]  # noqa: E731
        logits = [
            sum(u * v for u, v in zip(wide(q, 0), wide(k, i), strict=True)) / (heads * 4) ** 0.5 for i in range(p + 1)
        ]
        total = sum(map(math.exp, logits))
        np.testing.assert_allclose(got[c].numpy(), [math.exp(v) / total for v in logits[1:]], rtol=2e-5)


@some
@given(seed=st.integers(0, 10**6), p=st.integers(1, 9), d=st.integers(2, 9))
def test_text_similarity(seed, p, d):
    generator = torch.Generator().manual_seed(seed)
    patches, text = torch.randn(p, d, generator=generator), torch.randn(d, generator=generator)
    want = [cosine(row, text.tolist()) / d**0.5 for row in patches.tolist()]
    np.testing.assert_allclose(text_similarity(patches, text).numpy(), want, rtol=1e-4, atol=1e-6)


def method_strategy():
    return st.builds(
        Recoverable,
        preset=st.sampled_from(["corrected", "released", "released_alt"]),
        recovery=st.sampled_from([None, "minimum", "rest", "all"]),
        centres=st.sampled_from([None, "rest", "selected", "image", "width"]),
        extra=st.sampled_from([None, "keep", "drop"]),
        neighbours=st.sampled_from([(20, 20, 10), (4, 4, 3), (7, 5, 2)]),
        cluster=st.sampled_from([1, 5, 32]),
        text_weight=st.sampled_from([0.0, 50.0]),
    )


@thorough
@given(seed=st.integers(0, 10**6), n=st.integers(2, 48), method=method_strategy(), data=st.data())
def test_the_whole_of_it(seed, n, method, data):
    budget = data.draw(st.none() | st.integers(1, n - 1), label="budget")
    generator = torch.Generator().manual_seed(seed)
    x, keys = torch.randn(n, 6, generator=generator), torch.randn(n, 5, generator=generator)
    a = (torch.randn(n, generator=generator) * 1.5).softmax(0)
    t = torch.randn(n, generator=generator) ** 3 * 0.02
    kept, merged = recover_by_hand(x.tolist(), a.tolist(), t.tolist(), keys.tolist(), method, budget)
    got_kept, got_merged = method.recover(x, a, t, keys, budget)
    assert got_kept.tolist() == kept
    assert len(got_merged) == len(merged)
    np.testing.assert_allclose(got_merged.numpy(), np.array(merged).reshape(-1, 6), rtol=1e-4, atol=1e-5)
    if budget:
        assert len(kept) + len(merged) == budget
    assert len(kept) + len(merged) <= n


def test_ties_go_to_the_lower_index():
    method = Recoverable(keep=4, shares=(0.5, 0.5, 0))
    ones = torch.ones(9)
    kept, merged = method.recover(torch.eye(9), ones / 9, ones, torch.eye(9), 4)
    assert kept.tolist() == [0, 1, 2, 3]
    assert len(merged) == 0
    weights = clusters(ones / 9, ones, torch.ones(9, 2), torch.tensor([5, 2]), 3, 50.0)
    assert [row.nonzero()[:, 0].tolist() for row in weights] == [[0, 1, 2], [0, 1, 5]]


def test_a_share_of_the_whole_is_the_count():
    assert all(share_of(count, n, n) == count for n in (1, 49, 100, 576) for count in range(n + 1))
    assert share_of(9, 459, 1024) == 20
    assert share_of(0, 0, 64) == 0


# --- options ---------------------------------------------------------------------------------------------------------


def test_a_template_of_ones_own_has_one_group():
    with pytest.raises(ValueError, match="exactly one group"):
        Recoverable(turn="Q: .*")


def test_presets_fill_in_what_is_not_given():
    assert Recoverable(preset="released").keys == "shifted"
    assert Recoverable(preset="released", keys="own").keys == "own"
    assert "keys='own'" in str(vlmslim.method("recoverable"))


# --- in the engine ---------------------------------------------------------------------------------------------------


def asked(seed: int, question: list[int], image=None, system: int = 0) -> list:
    return [BOS, *[SYS] * system, USER, image or Picture(seed), LINE, *question, LINE, 90, 91, ASSISTANT]


ROWS = [asked(0, [10, 11, 12]), asked(1, [20, 21, 22, 23, 24], system=3)]
SEVERAL = [BOS, USER, Picture(2), Picture(3, (32, 64)), LINE, 30, 31, ASSISTANT]


@pytest.fixture(params=["hf", "open_clip"])
def folder(request):
    return request.getfixturevalue(f"{request.param}_folder")


def method_for(folder: str | None, **options) -> tuple[Recoverable, list]:
    """Make the method, and the list to which it adds (image, result) for every image."""
    return watched(Recoverable, **dict(clip=folder, tokenizer=Words(), neighbours=(3, 3, 3)) | options)


def patched(folder, family="llava", dtype=torch.float32, backend="sdpa"):
    model = tiny(family, backend, dtype)
    if family == "next":  # the fixtures' CLIPs are on the LLaVA's tower
        model.model.vision_tower.load_state_dict(tiny("llava", backend, dtype).model.vision_tower.state_dict())
    return model


READINGS = {  # what the description and the two routines of the release (commit d927594) do
    "corrected": ("question", "eot", "minimum", (20, 20, 10), "rest", "own", "keep"),
    "released": ("system", "last_pad", "minimum", (20, 20, 10), "width", "shifted", "drop"),
    "released_alt": ("system", "last_pad", "all", (10, 10, 10), "image", "shifted", "keep"),
}


@pytest.mark.parametrize("preset", READINGS)
def test_a_preset_is_a_reading_of_the_paper(preset):
    names = ("text_source", "text_pool", "recovery", "neighbours", "centres", "keys", "extra")
    method = vlmslim.method("recoverable", preset=preset)
    assert tuple(getattr(method, name) for name in names) == READINGS[preset]


@pytest.mark.parametrize(
    "options", [{}, dict(preset="released", pad_length=12), dict(preset="released_alt", pad_length=12)]
)
@pytest.mark.parametrize("keep", [None, 1, 7, 0.5])
@torch.no_grad()
def test_it_is_the_paper(hf_folder, keep, options):
    """From pixels to the language model, with every input of the method computed by hand."""
    model = patched(hf_folder)
    method, seen = method_for(hf_folder, keep=keep, **options)
    inputs = batch(model, [ROWS[1]])
    with vlmslim.patch(model, method):
        model(**inputs)
    [(image, result)] = seen
    clip, tower = CLIPModel.from_pretrained(hf_folder).eval(), model.model.vision_tower
    states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
    layer = tower.encoder.layers[-1]
    normed = layer.layer_norm1(states[-2])[0]
    q, k = layer.self_attn.q_proj(normed), layer.self_attn.k_proj(normed)
    a = (k @ q[0] / 16**0.5).softmax(0)[1:]
    if options:
        ids = [100, 1, 2, 2, 2, 3] + [101] * 6  # the first line: "<s>", three words of the system prompt and "USER:"
        text = clip.text_projection(clip.text_model(torch.tensor([ids])).last_hidden_state[0, -1])
    else:
        text = clip.get_text_features(torch.tensor([[100, 20, 21, 22, 23, 24, 101]]))
        text = getattr(text, "pooler_output", text)[0]
    patches = states[-1][0, 1:] @ clip.visual_projection.weight.T
    t = torch.cosine_similarity(patches, text[None]) / 12**0.5
    x = states[-2][0, 1:]
    budget = None if keep is None else keep if isinstance(keep, int) else 8
    kept, merged = recover_by_hand(x.tolist(), a.tolist(), t.tolist(), k[1:].tolist(), method, budget)
    want = model.model.multi_modal_projector(torch.cat([x[kept], torch.tensor(merged).view(-1, 16)]))
    if len(want):
        torch.testing.assert_close(result.vectors(image), want, rtol=1e-4, atol=1e-4)
        drawn = model.model.multi_modal_projector(result.made_of() @ x)
        torch.testing.assert_close(drawn, want, rtol=1e-4, atol=1e-4)
    else:
        assert len(result) == 1


@pytest.mark.parametrize("family", ["llava", "next"])
@pytest.mark.parametrize("keep", [None, 0.4])
def test_a_batch_is_its_rows(folder, family, keep):
    model, rows = patched(folder, family), [*ROWS, SEVERAL]
    summary = check_a_batch_is_its_rows(model, rows, method_for(folder, keep=keep)[0])
    whole = [visual_tokens(family, part.size) for row in rows for part in row if isinstance(part, Picture)]
    if keep is None:
        assert summary["requested"] is None
        assert 1 <= summary["kept"] < summary["visual_tokens"]
    else:
        assert summary["kept"] == summary["requested"] == sum(round(keep * n) for n in whole) / len(whole)


@torch.no_grad()
def test_the_question_decides_and_the_system_prompt_does_not(hf_folder):
    model = patched(hf_folder)
    rows = [asked(0, [10, 11]), asked(0, [10, 11], system=4), *(asked(0, [40 + i, 41 + i]) for i in range(6))]
    answered = [*asked(0, [10, 11]), 70, 71, 72]

    def kept(row, **options):
        method, seen = method_for(hf_folder, keep=4, shares=(0, 1, 0), **options)
        with vlmslim.patch(model, method):
            model(**batch(model, [row]))
        image, result = seen[0]
        return result.vectors(image)

    first, again, *others = map(kept, rows)
    assert torch.equal(first, again)
    assert torch.equal(first, kept(answered)), "the answer being scored leaked into the question"
    assert any(not torch.equal(first, other) for other in others)
    slip = partial(kept, text_source="system")  # trap 25, on request only
    assert all(torch.equal(slip(rows[0]), slip(row)) for row in rows[2:])
    assert not torch.equal(slip(rows[0]), slip(rows[1])) or torch.equal(first, slip(rows[1]))


@torch.no_grad()
def test_anyres_crops_share_the_budget(hf_folder):
    model = patched(hf_folder, "next")
    inputs = batch(model, [asked(0, [10], Picture(0, (60, 30)))])
    n = visual_tokens("next", (60, 30))
    for keep in (1, 2, 3, 10, n - 1, n):
        method, seen = method_for(hf_folder, keep=keep)
        with vlmslim.patch(model, method):
            model(**inputs)
        image, result = seen.pop()
        assert len(result) == keep
        newlines = int((image.grid[:, 0] < 0).sum())
        assert newlines > 0
        if keep == n - 1:  # patches go last
            index = result.index.tolist()
            assert set((image.grid[:, 0] >= 0).nonzero()[:, 0].tolist()) <= set(index)


@torch.no_grad()
def test_an_image_is_never_left_empty(hf_folder):
    model = patched(hf_folder)
    options = dict(preset="released", pad_length=12, neighbours=(20, 20, 10))  # 16 patches: nothing is an outlier
    with vlmslim.patch(model, method_for(hf_folder, **options)[0]) as slim:
        model(**batch(model, [ROWS[0]]))
        assert slim.receipt.summary()["kept"] >= 1


def test_gradients_reach_the_projector(hf_folder):
    model = patched(hf_folder)
    inputs = batch(model, [ROWS[0]])
    with vlmslim.patch(model, method_for(hf_folder, keep=6)[0]):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("keep", [None, 16])
@torch.no_grad()
def test_the_bundled_checkpoint_needs_no_options(keep):
    pytest.importorskip("open_clip")
    from PIL import Image
    from transformers import AutoProcessor

    folder = bundled.resolve("bundled/tiny-llava")
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    question = "Is there a dog in the picture?"
    said = [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": f"{question}\nAnswer yes or no."}]},
    ]
    text = processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8))
    method, seen = watched(Recoverable, keep=keep)
    with vlmslim.patch(model, method) as slim:
        model.generate(**processor(text=text, images=picture, return_tensors="pt"), max_new_tokens=2)
        kept, image = slim.receipt.summary()["kept"], seen[0][0]
        assert slim.stages[0].method.text_of(image) == question
    assert kept == keep or (keep is None and 1 <= kept < len(image.features))


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["siglip", "onevision"])
def test_towers_without_cls_are_refused(hf_folder, family):
    with pytest.raises(ValueError, match="CLS"):
        vlmslim.patch(tiny(family), method_for(hf_folder)[0])


def test_onevision_is_refused_on_any_tower(hf_folder):
    with pytest.raises(ValueError, match="OneVision"):
        method_for(hf_folder)[0].setup(tiny("onevision"))


def test_cls_in_the_language_model_is_refused(hf_folder):
    model = tiny("llava")
    model.config.vision_feature_select_strategy = "full"
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        vlmslim.patch(model, method_for(hf_folder)[0])


def test_a_foreign_clip_is_refused(hf_folder, tmp_path):
    model = tiny("llava")
    with torch.no_grad():
        stem_of(model).normal_()
    with pytest.raises(ValueError, match="vision tower"):
        vlmslim.patch(model, method_for(hf_folder)[0])
    model = tiny("llava")
    with torch.no_grad():
        stem_of(model).mul_(1.05)
    vlmslim.patch(model, method_for(hf_folder)[0]).remove()  # fine-tuned a little


def test_defaults_that_cannot_be_known(hf_folder):
    model = tiny("llava")
    with pytest.raises(ValueError, match="give clip="):
        vlmslim.patch(model, "recoverable", keep=4)
    with pytest.raises(ValueError, match="give tokenizer="):
        vlmslim.patch(model, "recoverable", keep=4, clip=hf_folder)
    with pytest.raises(ValueError, match="pad_length"):
        vlmslim.patch(model, method_for(hf_folder, text_pool="last_pad", pad_length=77)[0])


@torch.no_grad()
def test_the_tokenizer_of_the_checkpoint_is_the_default(hf_folder, tmp_path):
    words = word_level(VOCABULARY, "<pad>")
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", pad_token="<pad>").save_pretrained(tmp_path)
    patched(hf_folder).save_pretrained(tmp_path)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs, found = batch(model, [ROWS[1]]), []
    for tokenizer in (None, Words()):
        method, seen = method_for(hf_folder, keep=5, tokenizer=tokenizer)
        with vlmslim.patch(model, method) as slim:
            model(**inputs)
            ((image, result),) = seen
            assert slim.stages[0].method.text_of(image) == "w20 w21 w22 w23 w24"
            found.append(result.vectors(image))
    assert torch.equal(*found)


@pytest.mark.parametrize("preset", ["released", "released_alt"])
@torch.no_grad()
def test_clip_reads_the_first_line_as_it_was_decoded(hf_folder, preset):
    model = patched(hf_folder)
    method, seen = method_for(hf_folder, preset=preset, pad_length=12)
    with vlmslim.patch(model, method) as slim:
        model(**batch(model, [ROWS[1]]))
        assert slim.stages[0].method.text_of(seen[0][0]) == "<s> SYSTEM SYSTEM SYSTEM USER: "


def test_embeddings_hide_the_question(hf_folder):
    model = tiny("llava")
    inputs = batch(model, [ROWS[0]])
    inputs = dict(inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]), pixel_values=inputs["pixel_values"])
    with vlmslim.patch(model, method_for(hf_folder, keep=1)[0]), pytest.raises(ValueError, match="input_ids"):
        model(**inputs)
