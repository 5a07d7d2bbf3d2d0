"""The tiny LLaVA before training: its tokenizer, its processor and its first weights."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from scenes import CHARACTERS, GRID, SIZE, TASKS, ask, make_scene
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from train_common import MEAN, STD, normalise, pixels, standardise_inputs
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE, BOS, EOS, PAD = "<image>", "<s>", "</s>", "<pad>"
# LLaVA-1.5's format; the message's content is a string (which may hold <image>) or a list of parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}"
    "{% else %}{{ message['role'] | upper + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{{ '</s>' if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def make_tokenizer(size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE of `size` entries from our questions; digits and capitals stand alone."""
    rng = np.random.default_rng(0)
    texts = [" ".join(CHARACTERS)]
    for seed in range(300):
        scene = make_scene(seed, "train")
        questions = [ask(scene, task, rng) for task in TASKS for _ in range(3)]
        texts += [f"{q.text} {q.answer}" for q in questions if q and q.task != "text"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("[A-Z](?![a-z])|[0-9]"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [PAD, BOS, EOS, IMAGE]
    roles = ["USER:", "ASSISTANT:"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size - len(roles), special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(r, normalized=False) for r in roles])
    bos = (BOS, tokenizer.token_to_id(BOS))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[bos]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, padding_side="left",
        extra_special_tokens={"image_token": IMAGE}, model_max_length=2048, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Build the processor: 192 px, 144 image tokens."""
    side = {"height": SIZE, "width": SIZE}
    image = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=side, image_mean=MEAN, image_std=STD)
    return LlavaProcessor(
        image, tokenizer, patch_size=SIZE // GRID, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=CHAT_TEMPLATE, image_token=IMAGE,
    )  # fmt: skip


def tower_from_open_clip(folder: Path) -> tuple[CLIPVisionConfig, dict[str, torch.Tensor]]:
    """Convert the vision tower of an open_clip folder to a Hugging Face CLIPVisionModel's config and weights (fp32)."""
    vision = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    width = vision["width"]
    config = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=vision["layers"], hidden_act="gelu",
        num_attention_heads=width // vision["head_width"], image_size=vision["image_size"],
        patch_size=vision["patch_size"], projection_dim=128,
    )  # fmt: skip
    state = load_file(folder / "open_clip_model.safetensors")
    ours = {k.removeprefix("visual."): v.float() for k, v in state.items() if k.startswith("visual.")}
    names = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
             "attn.out_proj": "self_attn.out_proj"}  # fmt: skip
    out = {"embeddings.class_embedding": ours["class_embedding"],
           "embeddings.position_embedding.weight": ours["positional_embedding"],
           "embeddings.patch_embedding.weight": ours["conv1.weight"]}  # fmt: skip
    for kind in ("weight", "bias"):
        out[f"pre_layrnorm.{kind}"], out[f"post_layernorm.{kind}"] = ours[f"ln_pre.{kind}"], ours[f"ln_post.{kind}"]
        for i in range(vision["layers"]):
            theirs, own = f"encoder.layers.{i}", f"transformer.resblocks.{i}"
            for a, b in names.items():
                out[f"{theirs}.{b}.{kind}"] = ours[f"{own}.{a}.{kind}"]
            for part, value in zip("qkv", ours[f"{own}.attn.in_proj_{kind}"].chunk(3), strict=True):
                out[f"{theirs}.self_attn.{part}_proj.{kind}"] = value
    return config, out


def make_model(config: dict, tokenizer: PreTrainedTokenizerFast, clip: Path) -> LlavaForConditionalGeneration:
    """Build the model before training: the tiny CLIP's frozen tower, fresh projector and decoder."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    vision, tower = tower_from_open_clip(clip)
    text = LlamaConfig(vocab_size=config["vocabulary"], tie_word_embeddings=True, **config["decoder"], **ids)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
            image_seq_length=GRID * GRID, tie_word_embeddings=True, dtype="float32", **ids,
        )
    )  # fmt: skip
    model.set_attn_implementation("eager")  # short sequences on a CPU: faster than sdpa, backward above all
    model.model.vision_tower.load_state_dict(tower)
    model.model.vision_tower.requires_grad_(False)
    centre_projector(model)
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=16)
    return model


@torch.no_grad()
def centre_projector(model: LlavaForConditionalGeneration, n: int = 16) -> None:
    """Let the projector train on standardised tower features; `export` folds the standardisation into its weights."""
    images = normalise(torch.stack([pixels(make_scene(seed, "train").image) for seed in range(n)]))
    features = model.model.vision_tower(images, output_hidden_states=True).hidden_states[-2][:, 1:].flatten(0, 1)
    standardise_inputs(model.model.multi_modal_projector, features, fresh=True)


@torch.no_grad()
def load_weights(model: LlavaForConditionalGeneration, run: Path, adapter: bool) -> None:
    """Take an earlier run's weights; as an adapter only projector and word embeddings, the layers staying fresh."""
    saved = torch.load(run / "last.pt", map_location="cpu", weights_only=True)["model"]
    for name, parameter in model.named_parameters():
        if name in saved and (not adapter or "multi_modal_projector" in name or "embed_tokens" in name):
            parameter.copy_(saved[name])
