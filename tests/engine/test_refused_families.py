"""Models and batches that no patch can take are refused in a sentence that says why."""

from functools import partial

import pytest
import transformers as hf
from zoo import Pic, batch, build

import vlmslim
from vlmslim.engine.families import FAMILIES
from vlmslim.engine.unsupported import UNSUPPORTED


def test_an_unsupported_model_is_told_the_nearest_one():
    text = hf.Qwen2ForCausalLM(hf.Qwen2Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    with pytest.raises(TypeError, match=r"cannot patch Qwen2ForCausalLM; .*docs/models.md tells"):
        vlmslim.patch(text, "none")
    near = type("Qwen2_6_VLForConditionalGeneration", (hf.Qwen2ForCausalLM,), {})(text.config)
    with pytest.raises(TypeError, match="the nearest supported class is Qwen2_5_VLForConditionalGeneration"):
        vlmslim.patch(near, "none")


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
