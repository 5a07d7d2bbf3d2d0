"""Vision towers whose layout the engine does not know are refused at the patch, and nothing is attached."""

import pytest
import torch
from decoders import with_weights
from doubles import First, Halve
from snapshots import changes, model_state
from tiny import IMAGE
from transformers import Dinov2Config, LlamaConfig, LlavaConfig, MLCDVisionConfig, PixtralVisionConfig

import vlmslim

SMALL = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, patch_size=8)
TOWERS = {
    "Pixtral": (PixtralVisionConfig(intermediate_size=32, image_size=64, head_dim=8, **SMALL), "full"),
    "Dinov2": (Dinov2Config(image_size=32, mlp_ratio=2, **SMALL), "default"),
    "MLCD": (MLCDVisionConfig(intermediate_size=32, image_size=32, num_key_value_groups=1, **SMALL), "default"),
}


def llava_with(tower: str):
    """A tiny LLaVA with this tower, and inputs of two prompts."""
    vision, strategy = TOWERS[tower]
    text = LlamaConfig(vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4)
    select = dict(vision_feature_layer=-1, vision_feature_select_strategy=strategy)
    model = with_weights(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, **select))
    inputs = dict(input_ids=torch.tensor([[1, *[IMAGE] * 16, 5]] * 2), pixel_values=torch.randn(2, 3, 32, 32))
    if tower == "Pixtral":
        inputs["image_sizes"] = torch.tensor([[32, 32]] * 2)
    return model, inputs


@pytest.mark.parametrize("method", ["divprune", "aim", "todre", "fastv", First(), Halve()], ids=str)
@pytest.mark.parametrize("tower", ["Pixtral", "Dinov2"])
def test_unknown_towers_are_refused_by_name(tower, method):
    model, _ = llava_with(tower)
    before = model_state(model)
    with pytest.raises(TypeError, match=f"vision tower {tower}.*CLIP and SigLIP"):
        vlmslim.patch(model, method, **({"keep": 4} if isinstance(method, str) else {}))
    assert not changes(before, model_state(model))


@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_a_patch_that_only_counts_takes_any_tower(tower):
    model, inputs = llava_with(tower)
    want = model(**inputs).logits
    with vlmslim.patch(model, "none") as slim:
        assert torch.equal(model(**inputs).logits, want)
    assert slim.receipt.summary()["visual_tokens"] == 16


@torch.no_grad()
def test_attention_of_a_tower_that_rotates_is_refused_and_its_features_are_not():
    model, inputs = llava_with("MLCD")
    with pytest.raises(TypeError, match="todre reads the attention of the vision tower.*MLCDVisionModel"):
        vlmslim.patch(model, "todre", keep=4)
    for method in ("divprune", "fastv"):
        with vlmslim.patch(model, method, keep=4) as slim:
            model(**inputs)
        assert slim.receipt.had_effect
