"""A checkpoint in the authors' format loads as the model that its weights came from, and nothing is left random."""

import json
import os
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from original_checkpoints import ROWS as VOCABULARY
from original_checkpoints import original, translated
from prompts import ROWS, batch
from safetensors.torch import load_file, save_file
from tiny import DEPTH, tiny
from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPVisionModel

import vlmslim
from vlmslim.loading import Located, load, load_config, load_model, located


@torch.no_grad()
def logits(model, kind: str, source=None):
    """Answers to the prompts of the tiny models, without the logits of tokens that these do not have."""
    inputs = batch(source or tiny(kind), ROWS)
    return model(**translated(inputs, model.config)).logits[..., :VOCABULARY]


@cache
@torch.no_grad()
def wanted(kind: str):
    return tiny(kind)(**batch(tiny(kind), ROWS)).logits


# --- whole checkpoints ------------------------------------------------------------------------------------------------


def test_logits_are_bit_identical(originals, kind):
    model, processor = load(str(originals[kind]))
    assert torch.equal(logits(model, kind), wanted(kind))
    assert not model.training and processor.tokenizer.pad_token == "<pad>"


def test_a_method_in_one_call(originals, kind):
    slim = vlmslim.from_pretrained(originals[kind], "divprune", keep=0.5)
    picture = torch.zeros(60, 30, 3, dtype=torch.uint8).numpy()
    prompt = slim.processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    slim.model.generate(**slim.processor(images=[picture], text=[prompt], return_tensors="pt"), max_new_tokens=2)
    summary = slim.receipt.summary()
    assert summary["kept"] == summary["visual_tokens"] // 2


def test_the_configuration_is_the_files_not_the_default_of_transformers(originals, kind):
    config = load_config(located(str(originals[kind])))
    assert config.text_config.num_hidden_layers == DEPTH
    assert config.model_type == {"llava": "llava", "next": "llava_next", "onevision": "llava_onevision"}[kind]


@pytest.mark.parametrize("form", ["bin", "shards of bin", "shards of safetensors"])
def test_other_files_of_weights(tmp_path, form):
    folder = original("llava", tmp_path / "other", form=form)
    assert torch.equal(logits(load_model(folder), "llava"), wanted("llava"))


class Opens:
    """An object whose pickle makes a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_code_does_not_run(tmp_path):
    folder = original("llava", tmp_path / "evil", form="bin")
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights | {"extra": Opens(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|could not be loaded"):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_weights_keep_their_dtype(tmp_path):
    """`torch_dtype` says float16, as released checkpoints do whatever their weights are."""
    source = tiny("llava", dtype=torch.bfloat16)
    folder = original("llava", tmp_path / "bf16", source)
    model = load_model(folder)
    assert {x.dtype for x in model.parameters()} == {torch.bfloat16}
    assert torch.equal(
        model.model.language_model.norm.weight, tiny("llava", dtype=torch.bfloat16).model.language_model.norm.weight
    )


def test_a_tied_head_is_not_in_the_file(tmp_path):
    source = deepcopy(tiny("onevision"))
    source.config.tie_word_embeddings = source.config.text_config.tie_word_embeddings = True
    source.lm_head.weight = source.model.language_model.embed_tokens.weight
    model = load_model(original("onevision", tmp_path / "tied", source))
    assert model.lm_head.weight is model.get_input_embeddings().weight
    with torch.no_grad():
        want = source(**batch(source, ROWS)).logits
    assert torch.equal(logits(model, "onevision"), want)


def test_buffers_that_old_versions_saved_are_no_mistake(originals, tmp_path):
    folder = original("llava", tmp_path / "old")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    weights["model.vision_tower.vision_tower.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert torch.equal(logits(load_model(folder), "llava"), wanted("llava"))


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def test_the_picture_token_gets_the_first_free_row(originals, kind):
    model, processor = load(str(originals[kind]))
    free = VOCABULARY - 2 * (kind == "onevision")
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == free
    added = 0 if kind == "onevision" else 1  # Qwen's vocabulary has spare rows
    rows = {len(layer.weight) for layer in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert rows == {VOCABULARY + added} == {model.config.text_config.vocab_size}
    if kind == "onevision":
        assert model.config.video_token_id == processor.tokenizer.convert_tokens_to_ids("<video>") == free + 1


def test_two_loads_are_equal_and_the_new_logit_is_that_of_unk(originals):
    one, other = (load_model(originals["llava"]) for _ in range(2))
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    head = one.get_output_embeddings().weight
    assert torch.equal(head[VOCABULARY], head[0])


# --- what the checkpoint lacks ----------------------------------------------------------------------------------------

TOWER = r"vision_tower"


def test_a_frozen_tower_is_loaded_by_its_name(tmp_path):
    folder = original("llava", tmp_path / "frozen", without=TOWER)
    source = tiny("llava")
    tower = CLIPVisionModel(source.config.vision_config)
    tower.load_state_dict(source.model.vision_tower.state_dict())
    tower.save_pretrained(tmp_path / "frozen-tower")
    with pytest.warns(UserWarning, match="holds no vision tower; vlmslim loaded .*frozen-tower"):
        model = load_model(folder)
    assert torch.equal(logits(model, "llava"), wanted("llava"))


@pytest.mark.parametrize(
    "without, message",
    [
        (TOWER, "holds no vision tower, because it was frozen, and .*-tower could not be loaded"),
        (r"vision_tower.*layers\.0\.", "has a part of its vision tower only; it lacks model.vision_tower"),
        (r"model\.layers\.2\.mlp", "lacks model.language_model.layers.2.mlp.*, which would stay random"),
        (r"mm_projector\.2\.bias", "lacks model.multi_modal_projector.linear_2.bias, which would stay random"),
        (r"lm_head", "lacks lm_head.weight, which would stay random"),
    ],
)
def test_nothing_is_left_random(tmp_path, without, message):
    with pytest.raises(ValueError, match=message) as error:
        load_model(original("llava", tmp_path / "part", without=without))
    assert "\n" not in str(error.value)


def test_a_newline_that_is_missing_is_not_left_random(tmp_path):
    with pytest.raises(ValueError, match="lacks model.image_newline, which would stay random"):
        load_model(original("next", tmp_path / "next", without="image_newline"))


def test_a_part_without_a_place_is_named(tmp_path):
    folder = original("llava", tmp_path / "more")
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.mm_projector.4.bias": torch.ones(4)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="mm_projector.4.bias, for which LlavaForConditionalGeneration has no place"):
        load_model(folder)


# --- saved again ------------------------------------------------------------------------------------------------------


def same_after_saving(folder: Path, kind: str) -> None:
    """transformers alone loads a folder as the model that the weights came from."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert torch.equal(logits(model, kind), wanted(kind))


def test_saving_writes_the_names_of_transformers(originals, kind, tmp_path):
    model = load_model(originals[kind])
    model.save_pretrained(tmp_path / "whatever")
    same_after_saving(tmp_path / "whatever", kind)


def test_a_patch_saved_with_its_base(originals, kind, tmp_path):
    slim = vlmslim.from_pretrained(originals[kind], "divprune", keep=0.5)
    slim.processor = None  # it is made again
    slim.save_pretrained(tmp_path, with_base=True)
    same_after_saving(tmp_path / "base", kind)
    assert AutoProcessor.from_pretrained(tmp_path / "base").image_token == "<image>"
    again = vlmslim.from_pretrained(tmp_path)
    assert str(again) == str(slim)


def test_with_base_of_a_model_that_remembers_its_old_names(originals, tmp_path):
    """Whoever loads an original by hand, with `key_mapping`, has a model that would write the old names."""
    model = load_model(originals["llava"])
    from transformers.core_model_loading import WeightRenaming

    old = WeightRenaming(r"^model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1.")
    model._weight_conversions = [old]
    with vlmslim.patch(model, "none") as slim:
        slim.save_pretrained(tmp_path, with_base=True)
    same_after_saving(tmp_path / "base", "llava")


def test_a_patch_beside_its_original(originals, tmp_path):
    with vlmslim.from_pretrained(originals["llava"], "divprune", keep=4) as slim:
        slim.save_pretrained(tmp_path)
    place = located(tmp_path)
    assert place == Located(str(originals["llava"].resolve()), None, place.stages)
    assert str(vlmslim.from_pretrained(tmp_path)) == str(slim)


def test_sampling_options_of_released_checkpoints_can_be_saved(tmp_path):
    """LLaVA-1.5 has a temperature without sampling, which transformers refuses to save."""
    folder = original("llava", tmp_path / "hot")
    options = {"eos_token_id": 2, "temperature": 0.9, "top_p": 0.6, "max_length": 4096}
    (folder / "generation_config.json").write_text(json.dumps(options))
    model = load_model(folder)
    model.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == 2 and "temperature" not in saved


def test_an_answer_of_qwen_ends_with_its_turn(originals):
    model, processor = load(str(originals["onevision"]))
    assert processor.tokenizer.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id
    assert os.path.samefile(model.name_or_path, originals["onevision"])
