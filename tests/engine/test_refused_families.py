"""Models and batches that no patch can take are refused in a sentence that says why."""

from functools import partial
from operator import attrgetter

import pytest
import torch
import transformers as hf
from zoo import Pic, batch, build

import vlmslim
from vlmslim.engine.families import FAMILIES
from vlmslim.engine.unsupported import UNSUPPORTED


def of_class(name: str) -> torch.nn.Module:
    """Make a model of a class that has a name and nothing else."""
    return type(name, (torch.nn.Module,), {})()


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("Qwen2_6_VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration"),
        ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        ("InternVLChatModel", "InternVLForConditionalGeneration"),
        ("LlavaQwenForCausalLM", "LlavaForConditionalGeneration"),
        ("InstructBlipForConditionalGeneration", None),  # the endings of names are alike and tell nothing
    ],
)
def test_an_unsupported_model_is_told_the_nearest_one(name, nearest):
    hint = f"the nearest supported class is {nearest}; " if nearest else ""
    message = f"cannot patch {name}; {hint}vlmslim supports Llava.*; docs/models.md tells how to add a family"
    with pytest.raises(TypeError, match=message):
        vlmslim.patch(of_class(name), "none")


def test_a_wrapped_model_is_told_its_path():
    model = build("qwen2_5_vl")
    peft = pytest.importorskip("peft", reason="the extra vlmslim[train] is not installed")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    wraps = {
        "module": torch.nn.DataParallel(build("qwen2_5_vl")),
        "base_model.model": adapted,
        "module.base_model.model": torch.nn.DataParallel(adapted),
    }
    for path, wrapped in wraps.items():
        with pytest.raises(TypeError, match=f"wraps a model: patch the model inside, `model.{path}`"):
            vlmslim.patch(wrapped, "none")
        vlmslim.patch(attrgetter(path)(wrapped), "none").remove()


def test_a_part_of_a_model_is_told_the_whole():
    core = build("qwen2_5_vl").model
    for part in (core, core.language_model, core.visual):
        with pytest.raises(TypeError, match="a part of a model: pass the whole Qwen2_5_VLForConditionalGeneration"):
            vlmslim.patch(part, "none")


def test_a_name_is_told_what_loads_it():
    with pytest.raises(TypeError, match=r"use vlmslim.from_pretrained\('llava-hf/llava-1.5-7b-hf', method"):
        vlmslim.patch("llava-hf/llava-1.5-7b-hf", "none")


def test_a_family_that_was_tried_is_refused_with_the_reason():
    config = hf.PaliGemmaConfig(
        vision_config=hf.SiglipVisionConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=28),
        text_config=hf.GemmaConfig(
            vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
        ),
        image_token_id=9,
        projection_dim=8,
    )
    with pytest.raises(TypeError, match="cannot patch PaliGemmaForConditionalGeneration: all tokens of its prompt see"):
        vlmslim.patch(hf.PaliGemmaForConditionalGeneration(config), "none")
    assert not UNSUPPORTED.keys() & FAMILIES.keys()


@pytest.mark.parametrize("method", ["none", "divprune"])
def test_pictures_and_videos_of_glm_4v_do_not_go_together(method):
    """They share a placeholder, so the unpatched model refuses both a row and a batch with both."""
    model, picture, video = build("glm4v"), Pic(0, 32, 48), Pic(8, 32, 32, frames=2)
    for rows in ([[1, picture, 7, video, 9]], [[1, picture, 7], [1, video, 9]]):
        inputs = batch("glm4v", model, rows)
        with pytest.raises(ValueError, match="tokens do not match"):
            model(**inputs)
        with vlmslim.patch(model, method):
            for run in (model, partial(model.generate, max_new_tokens=2)):
                with pytest.raises(ValueError, match="one placeholder .* send pictures and videos in separate calls"):
                    run(**inputs)
    with vlmslim.patch(model, "divprune", keep=0.5) as slim:  # one after the other they go
        for rows in ([[1, picture, 7]], [[1, video, 9]]):
            model(**batch("glm4v", model, rows))
        assert slim.receipt.images == 2
