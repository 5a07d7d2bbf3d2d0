"""Checkpoints in the authors' format are recognised, described to transformers, or refused in a sentence."""

import json

import pytest
import torch
from original_checkpoints import original
from tiny import tiny

from vlmslim.loading import load_config, load_model, located
from vlmslim.originals.checkpoint import Original, find, pinpoints

SEVEN_B = {  # LLaVA-1.5-7B, as released
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "image_aspect_ratio": "pad",
    "intermediate_size": 11008,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "vocab_size": 32000,
}


VIDEO = {  # LLaVA-Video puts a newline after each row of each frame
    "image_aspect_ratio": "anyres_max_9",
    "mm_newline_position": "grid",
    "mm_patch_merge_type": "spatial_unpad",
}


def config_of(**changes):
    return Original("folder", None, SEVEN_B | changes).config


def test_the_forms_of_transformers_are_no_originals(tmp_path):
    tiny("llava").save_pretrained(tmp_path)
    assert find(str(tmp_path)) is None
    assert find("bundled/nothing") is None


def test_the_released_7b():
    config = config_of()
    assert type(config).__name__ == "LlavaConfig" and config.architectures == ["LlavaForConditionalGeneration"]
    text, tower = config.text_config, config.vision_config
    assert (text.model_type, text.hidden_size, text.num_hidden_layers, text.vocab_size) == ("llama", 4096, 32, 32000)
    sizes = (tower.hidden_size, tower.num_hidden_layers, tower.image_size, tower.patch_size, tower.hidden_act)
    assert sizes == (1024, 24, 336, 14, "quick_gelu")
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-2, "default")


def test_the_released_onevision():
    """SigLIP has no CLS token to drop, and the authors' code cuts off its last layer, whatever `config.json` says."""
    config = config_of(
        architectures=["LlavaQwenForCausalLM"],
        image_aspect_ratio="anyres_max_9",
        image_grid_pinpoints="(1x1),(1x2),(6x6)",
        mm_hidden_size=1152,
        mm_patch_merge_type="spatial_unpad",
        mm_vision_tower="google/siglip-so400m-patch14-384",
        rope_theta=1000000.0,
        sliding_window=131072,
        use_sliding_window=False,
    )
    assert config.architectures == ["LlavaOnevisionForConditionalGeneration"]
    tower = config.vision_config
    assert (tower.num_hidden_layers, tower.vision_use_head, tower.image_size) == (26, False, 384)
    assert (config.vision_feature_layer, config.vision_feature_select_strategy) == (-1, "full")
    assert config.text_config.model_type == "qwen2" and config.text_config.sliding_window is None
    assert config.text_config.rope_parameters["rope_theta"] == 1e6
    assert len(config.image_grid_pinpoints) == 36 and config.vision_aspect_ratio == "anyres_max_9"


def test_the_class_token_stays_where_the_authors_keep_it():
    assert config_of(mm_vision_select_feature="cls_patch").vision_feature_select_strategy == "full"


def test_another_layer_of_the_tower():
    assert config_of(mm_vision_select_layer=-1).vision_feature_layer == -1


@pytest.mark.parametrize(
    "given",
    [[[64, 32], [32, 64]], "[(64, 32), (32, 64)]", "[[64,32],[32,64]]"],
    ids=["list", "tuples", "text"],
)
def test_sizes_of_mosaics_are_turned_round(given):
    """(width, height) there, (height, width) here; the order stays, because it decides between equals."""
    assert pinpoints(given, 32) == [[32, 64], [64, 32]]


def test_a_range_of_tiles():
    assert pinpoints("(1x1),...,(2x3)", 10) == [[10, 10], [20, 10], [30, 10], [10, 20], [20, 20], [30, 20]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"mm_projector_type": "linear"}, "has the projector 'linear'; transformers has mlp2x_gelu alone"),
        ({"mm_projector_type": None}, "has the projector 'linear'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "has the projector 'mlp3x_gelu'"),
        ({"mm_resampler_type": "spatial_pool"}, r"has a resampler \(spatial_pool\)"),
        (VIDEO, "newlines into videos by mm_newline_position='grid'; transformers has one_token"),
        ({"mm_use_im_start_end": True}, "puts <im_start> and <im_end> around pictures"),
        ({"mm_hidden_size": 48}, r"reads 48 numbers a token and .* gives 16: towers of several scales"),
        ({"image_aspect_ratio": "highres"}, "image_aspect_ratio='highres'; vlmslim knows square, pad"),
        ({"image_aspect_ratio": "anyres"}, "mm_patch_merge_type='flat'; transformers has spatial_unpad alone"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "is a LlavaMptForCausalLM in the authors' format; vlmslim loads"),
        ({"mm_vision_tower": "/gone/tower"}, "has the vision tower '/gone/tower', which is no folder here"),
    ],
)
def test_what_transformers_has_no_class_for(tmp_path, changes, message):
    folder = original("llava", tmp_path / "odd", **changes)
    for loader in (load_model, lambda name: load_config(located(str(name)))):
        with pytest.raises(ValueError, match=message) as error:
            loader(folder)
        assert "\n" not in str(error.value)


def test_a_projector_alone(tmp_path):
    folder = original("llava", tmp_path / "pretrained", _name_or_path="lmsys/vicuna-7b-v1.5")
    (folder / "model.safetensors").rename(folder / "mm_projector.bin")
    with pytest.raises(ValueError, match="a projector alone .*for lmsys/vicuna-7b-v1.5: give"):
        load_model(folder)


def test_adapters_of_a_lora(tmp_path):
    folder = original("llava", tmp_path / "lora")
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    torch.save({}, folder / "non_lora_trainables.bin")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "lmsys/vicuna-13b-v1.5"}))
    with pytest.raises(ValueError, match="adapters of a LoRA, no whole model: merge them into lmsys/vicuna-13b-v1.5"):
        load_model(folder)


def test_no_weights(tmp_path):
    folder = original("llava", tmp_path / "empty")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds no weights: there is none of model.safetensors"):
        load_model(folder)


def test_no_tokenizer(tmp_path):
    folder = original("llava", tmp_path / "mute")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="^.*mute holds no tokenizer: there is none of tokenizer.json, "):
        load_model(folder)


def test_a_file_that_is_cut_off(tmp_path):
    folder = original("llava", tmp_path / "short")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="short could not be loaded: .*not fully covered"):
        load_model(folder)


@pytest.mark.parametrize(
    "file, message",
    [("adapter_config.json", "holds the adapters of a LoRA"), ("mm_projector.bin", "holds a projector alone")],
)
def test_a_part_without_a_configuration(tmp_path, file, message):
    (tmp_path / file).touch()
    with pytest.raises(ValueError, match=f"{message}.* and no model: there is no config.json"):
        load_model(str(tmp_path))
