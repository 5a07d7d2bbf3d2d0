"""Checkpoints in the format of LLaVA's authors, made of the tiny models by renaming their tensors.

Such a checkpoint has the weights of a `tiny` model, so its logits are known. Its tokenizer has one token a character.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import IMAGE, PINPOINTS, SIDE, VIDEO, tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

KINDS = ("llava", "next", "onevision")
ROWS = 100  # of the vocabulary of the tiny models
SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>"]
#: (authors' name, our name), by pattern; the opposite direction of the package's table, written apart from it.
NAMES = (
    (r"^model\.multi_modal_projector\.linear_1", "model.mm_projector.0"),
    (r"^model\.multi_modal_projector\.linear_2", "model.mm_projector.2"),
    (r"^model\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model."),
    (r"^model\.language_model\.", "model."),
)
ARCHITECTURES = {"llava": "LlavaLlama", "next": "LlavaMistral", "onevision": "LlavaQwen"}
PICTURES = {
    "llava": {"image_aspect_ratio": "pad", "mm_patch_merge_type": "flat"},
    "next": {"image_aspect_ratio": "anyres", "mm_patch_merge_type": "spatial_unpad"},
    "onevision": {"image_aspect_ratio": "anyres_max_9", "mm_patch_merge_type": "spatial_unpad"},
}


def original(kind: str, folder: Path, model=None, *, form="safetensors", without=r"(?!)", **changes) -> Path:
    """Write the tiny model of a kind as its authors would; the folder.

    without : tensors that are left out, a pattern over the authors' names
    changes : keys of `config.json`; None takes one out
    """
    model = model or tiny(kind)
    folder.mkdir(parents=True, exist_ok=True)
    tower = folder.parent / f"{folder.name}-tower"
    weights = {authors_name(name): x.detach().clone() for name, x in model.state_dict().items()}
    dropped = re.compile(rf"vision_model\.head\.|{without}")  # the authors' code replaces the head of SigLIP
    weights = {name: x for name, x in weights.items() if not dropped.search(name)}
    if model.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    _write(weights, folder, form)
    config = raw_config(kind, model, str(tower)) | changes
    config = {key: value for key, value in config.items() if key not in changes or value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    write_tower_config(kind, model, tower)
    tokenizer(kind).save_pretrained(folder)
    return folder


def _write(weights: dict, folder: Path, form: str) -> None:
    """Write weights as safetensors or pickled ("bin"), in one file or in "shards of" either."""
    names = sorted(weights)
    stem, ending = ("pytorch_model", "bin") if form.endswith("bin") else ("model", "safetensors")
    files = {f"{stem}.{ending}": names}
    if form.startswith("shards of"):
        files = {f"{stem}-0000{i + 1}-of-00002.{ending}": names[i::2] for i in range(2)}
        where = {name: file for file, own in files.items() for name in own}
        index = {"metadata": {"total_size": sum(x.nbytes for x in weights.values())}, "weight_map": where}
        (folder / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    for file, own in files.items():
        part = {name: weights[name] for name in own}
        if ending == "bin":
            torch.save(part, folder / file)
        else:
            save_file(part, folder / file, {"format": "pt"})


def authors_name(name: str) -> str:
    for pattern, theirs in NAMES:
        if re.search(pattern, name):
            return re.sub(pattern, theirs, name)
    return name


def raw_config(kind: str, model, tower: str) -> dict:
    """Write the keys of an original's `config.json`."""
    text = model.config.text_config
    sizes = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"
    others = (
        "max_position_embeddings rms_norm_eps hidden_act tie_word_embeddings bos_token_id eos_token_id pad_token_id"
    )
    config = {name: getattr(text, name) for name in f"{sizes} {others}".split()}
    return (
        config
        | PICTURES[kind]
        | {
            "architectures": [f"{ARCHITECTURES[kind]}ForCausalLM"],
            "model_type": "llava",
            "rope_theta": 10000.0,
            "sliding_window": None,
            "torch_dtype": "float16",  # whatever the weights are
            "image_grid_pinpoints": [[w, h] for h, w in PINPOINTS],
            "mm_hidden_size": model.config.vision_config.hidden_size,
            "mm_projector_type": "mlp2x_gelu",
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "mm_vision_select_feature": "patch",
            "mm_vision_select_layer": -2,
            "mm_vision_tower": tower,
            "use_mm_proj": True,
            "tune_mm_mlp_adapter": False,
        }
    )


def write_tower_config(kind: str, model, folder: Path) -> None:
    """Write the configuration of the released tower: a SigLIP has one layer more than is used."""
    config = model.config.vision_config.to_dict()
    config["num_hidden_layers"] += kind == "onevision"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Make a tokenizer that fills the vocabulary; Qwen's leaves the last two rows free."""
    letters = [chr(i) for i in range(33, 127)]
    letters = [c for c in letters if c not in "~`^{}$"][: 86 + 2 * (kind != "onevision")]
    listed = [*SPECIAL, "▁", "\n", *letters]
    count = ROWS - 2 * (kind == "onevision")
    listed += [f"<spare_{i}>" for i in range(count - len(listed))]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(listed)}, [], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    assert len(fast) == count
    return fast


def translated(inputs: dict, config) -> dict:
    """Replace the ids of placeholders in the inputs of a tiny model by those of a loaded original."""
    ids = inputs["input_ids"].clone()
    ids[inputs["input_ids"] == IMAGE] = config.image_token_id
    if hasattr(config, "video_token_id"):
        ids[inputs["input_ids"] == VIDEO] = config.video_token_id
    return inputs | {"input_ids": ids}


assert SIDE == 32
