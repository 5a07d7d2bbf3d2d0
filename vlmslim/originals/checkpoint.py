"""Checkpoints in the authors' format: recognise one, refuse what cannot be loaded, make its configuration.

Such a checkpoint has the configuration of its language model, with keys `mm_*` for everything else. It often says
`model_type: llava`, so that `AutoConfig` would silently return the default 7B configuration of transformers.
"""

import ast
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaNextConfig,
    LlavaOnevisionConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    SiglipVisionConfig,
)
from transformers.utils import cached_file

from vlmslim.io import hub
from vlmslim.io.messages import one_line

_QUIET = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
_WEIGHTS = ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json", "pytorch_model.bin")

#: The part of the architecture's name that says which language model it has.
_TEXT: dict[str, Any] = {"Llama": LlamaConfig, "Mistral": MistralConfig, "Qwen": Qwen2Config}
_OLD_ROPE = {"rope_theta", "rope_scaling"}  # transformers 5 turns them into `rope_parameters`

_CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
_CLIP_L |= {"patch_size": 14, "projection_dim": 768}
_SIGLIP_SO = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}

#: Vision towers of the released checkpoints, by the last part of their names.
TOWERS: dict[str, tuple[Any, dict[str, int]]] = {
    "clip-vit-large-patch14": (CLIPVisionConfig, _CLIP_L | {"image_size": 224}),
    "clip-vit-large-patch14-336": (CLIPVisionConfig, _CLIP_L | {"image_size": 336}),
    "siglip-so400m-patch14-384": (SiglipVisionConfig, _SIGLIP_SO | {"image_size": 384, "patch_size": 14}),
}


@dataclass(frozen=True)
class Original:
    """A checkpoint in the authors' format.

    checkpoint : a folder, or the id of a repository on the hub
    revision   : branch, tag or commit of the repository
    raw        : its `config.json`
    """

    checkpoint: str
    revision: str | None
    raw: dict[str, Any] = field(repr=False)

    @property
    def tower_name(self) -> str:
        """The source of the vision tower: a hub id, or a folder."""
        return self.raw.get("mm_vision_tower") or ""

    @property
    def aspect(self) -> str:
        """The way in which the authors' code fits a picture to the tower: square, pad, anyres or anyres_max_N."""
        return self.raw.get("image_aspect_ratio") or "square"

    @property
    def kind(self) -> Any:
        """The class of the configuration: how pictures are cut decides the model class of transformers."""
        if self.aspect.startswith("anyres_max_"):
            return LlavaOnevisionConfig
        return LlavaNextConfig if self.aspect == "anyres" else LlavaConfig

    @cached_property
    def config(self) -> Any:
        """The configuration for transformers. Loading the weights adds the ids of `<image>` and `<video>`.

        Raises:
            ValueError: transformers has no class for this checkpoint; the message says why.
        """
        _check_parts(self)
        tower = self._tower()
        has_cls = isinstance(tower, CLIPVisionConfig)
        layer = self.raw.get("mm_vision_select_layer", -2)
        if not has_cls:  # the authors' code cuts the last layer off, drops the head and reads what is left
            tower.num_hidden_layers -= 1
            tower.vision_use_head = False
            layer = -1
        select = "default" if has_cls and self.raw.get("mm_vision_select_feature", "patch") == "patch" else "full"
        text = self._text()
        anyres: dict[str, Any] = {}
        if self.kind is not LlavaConfig:
            anyres["image_grid_pinpoints"] = pinpoints(self.raw.get("image_grid_pinpoints"), tower.image_size)
        if self.kind is LlavaOnevisionConfig:
            anyres["vision_aspect_ratio"] = self.aspect
        config = self.kind(
            text_config=text,
            vision_config=tower,
            vision_feature_layer=layer,
            vision_feature_select_strategy=select,
            tie_word_embeddings=text.tie_word_embeddings,
            **anyres,
        )
        config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForConditionalGeneration"]
        config._name_or_path = self.checkpoint
        config._commit_hash = self.raw.get("_commit_hash")
        return config

    def _text(self) -> PreTrainedConfig:
        """Make the configuration of the language model from the keys that its class knows."""
        architecture = (self.raw.get("architectures") or ["no architecture"])[0]
        found = re.fullmatch(r"Llava(\w+)ForCausalLM", architecture)
        kind = _TEXT.get(found[1]) if found else None
        if kind is None:
            known = ", ".join(f"Llava{name}ForCausalLM" for name in _TEXT)
            raise ValueError(f"{self.checkpoint} is a {architecture} in the authors' format; vlmslim loads {known}")
        known_keys = kind().to_dict().keys() | _OLD_ROPE
        left_out = {"architectures", "model_type", "dtype", "transformers_version", "_name_or_path"}
        return kind(**{key: value for key, value in self.raw.items() if key in known_keys - left_out})

    def _tower(self) -> Any:
        """Make the configuration of the vision tower, by name or from the folder that the name is.

        Raises:
            ValueError: it is neither, or no CLIP and no SigLIP.
        """
        name = self.tower_name
        config: Any
        if not Path(name).is_dir() and (short := name.rstrip("/").rpartition("/")[2]) in TOWERS:
            kind, sizes = TOWERS[short]
            config = kind(**sizes)
        else:
            try:
                config = AutoConfig.from_pretrained(name, trust_remote_code=False, **hub.how_to_load(name))
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"{self.checkpoint} has the vision tower {name!r}, which is no folder here, not on the hub and "
                    f"none of {', '.join(TOWERS)}: correct mm_vision_tower in its config.json ({one_line(error)})"
                ) from error
            config = getattr(config, "vision_config", config)
        if not isinstance(config, CLIPVisionConfig | SiglipVisionConfig):
            raise ValueError(f"the vision tower {name} is a {config.model_type}; vlmslim loads CLIP and SigLIP")
        width = self.raw.get("mm_hidden_size", config.hidden_size)
        if width != config.hidden_size:
            raise ValueError(
                f"the projector of {self.checkpoint} reads {width} numbers a token and {name} gives "
                f"{config.hidden_size}: towers of several scales (S2) have no class in transformers"
            )
        return config

    def has(self, file: str) -> bool:
        """Tell whether the checkpoint has a file."""
        return self.file(file) is not None

    def file(self, name: str) -> str | None:
        """Return the path of a file on this machine; None if the checkpoint does not have it."""
        if Path(self.checkpoint).is_dir():
            path = Path(self.checkpoint) / name
            return str(path) if path.is_file() else None
        how = _QUIET | hub.how_to_load(self.checkpoint)
        return cached_file(self.checkpoint, name, revision=self.revision, **how)


def find(checkpoint: str, revision: str | None = None) -> Original | None:
    """Recognise a checkpoint in the authors' format by its `config.json`; return None for any other.

    Raises:
        ValueError: the checkpoint is not whole: adapters of a LoRA, or a projector alone.
    """
    try:
        how = {"revision": revision or "main"} | hub.how_to_load(checkpoint)
        raw, _ = PreTrainedConfig.get_config_dict(checkpoint, **how)
    except (OSError, ValueError):
        return None  # the loaders of transformers say better what is wrong
    if "vision_config" in raw or not raw.keys() & {"mm_vision_tower", "mm_projector_type"}:
        return None
    found = Original(checkpoint, revision, raw)
    if not any(map(found.has, _WEIGHTS)):
        _refuse_parts(found)
    return found


def _refuse_parts(original: Original) -> None:
    """Refuse a folder without a language model, and name the checkpoint that it goes with."""
    name = original.checkpoint
    base = original.raw.get("_name_or_path") or "its base"
    if original.has("adapter_config.json"):
        adapter, _ = PreTrainedConfig.get_config_dict(name, _configuration_file="adapter_config.json")
        base = adapter.get("base_model_name_or_path") or base
        raise ValueError(
            f"{name} holds the adapters of a LoRA, no whole model: merge them into {base} with the authors' code "
            "(scripts/merge_lora_weights.py) and give the result"
        )
    if original.has("mm_projector.bin"):
        raise ValueError(
            f"{name} holds a projector alone (mm_projector.bin), as pre-training leaves it, for {base}: give a "
            "checkpoint that is whole"
        )
    raise ValueError(f"{name} holds no weights: there is none of {', '.join(_WEIGHTS)} in it")


def _check_parts(original: Original) -> None:
    """Refuse parts of the authors' code that no class of transformers has.

    Raises:
        ValueError: which.
    """
    raw, name = original.raw, original.checkpoint
    projector = raw.get("mm_projector_type", "linear")
    if projector != "mlp2x_gelu":
        raise ValueError(f"{name} has the projector {projector!r}; transformers has mlp2x_gelu alone")
    if raw.get("mm_resampler_type") or raw.get("mm_spatial_pool_mode") == "conv":
        raise ValueError(
            f"{name} has a resampler ({raw.get('mm_resampler_type')}), for which transformers has no class"
        )
    if raw.get("mm_use_im_start_end"):
        raise ValueError(
            f"{name} puts <im_start> and <im_end> around pictures (mm_use_im_start_end); transformers does not"
        )
    newlines = raw.get("mm_newline_position", "one_token")
    if original.kind is LlavaOnevisionConfig and newlines != "one_token":
        raise ValueError(
            f"{name} puts newlines into videos by mm_newline_position={newlines!r}; transformers has one_token alone"
        )
    aspect, merge = original.aspect, raw.get("mm_patch_merge_type", "flat")
    if aspect not in ("square", "pad", "anyres") and not re.fullmatch(r"anyres_max_\d+", aspect):
        raise ValueError(
            f"{name} has image_aspect_ratio={aspect!r}; vlmslim knows square, pad, anyres and anyres_max_N"
        )
    if aspect.startswith("anyres") and merge != "spatial_unpad":
        raise ValueError(f"{name} joins tiles by mm_patch_merge_type={merge!r}; transformers has spatial_unpad alone")


def pinpoints(given: Any, side: int) -> list[list[int]]:
    """Return the sizes of mosaics as transformers has them, (height, width).

    The authors write (width, height): as a list, as the text of a list, or as a range of tiles, "(1x1),...,(6x6)". The
    order is kept, because the first of equally good sizes is taken.

    Args:
        given: of the checkpoint.
        side: of a tile, in pixels.

    Raises:
        ValueError: it is none of the three.
    """
    try:
        if isinstance(given, str) and "x" in given:
            (w0, h0), *_, (w1, h1) = ((int(w), int(h)) for w, h in re.findall(r"\((\d+)x(\d+)\)", given))
            return [[h * side, w * side] for w in range(w0, w1 + 1) for h in range(h0, h1 + 1)]
        listed = ast.literal_eval(given) if isinstance(given, str) else given
        return [[int(height), int(width)] for width, height in listed]
    except (SyntaxError, TypeError, ValueError) as error:
        raise ValueError(f"image_grid_pinpoints={given!r}: give [[width, height], ...] or '(1x1),...,(6x6)'") from error
