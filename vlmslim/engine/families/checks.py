"""Checks that refuse a model or a method on it, in a sentence that says what to do instead."""

import re
from difflib import get_close_matches
from operator import attrgetter
from typing import Any

from torch import nn

from vlmslim.engine.attention import attention_of
from vlmslim.engine.families.family import Family
from vlmslim.engine.families.parts import (
    bare_tower,
    encoder_layers,
    has_plain_heads,
    language_model,
    projects_patches,
    tower,
)
from vlmslim.engine.families.rows import FAMILIES, row_of
from vlmslim.engine.unsupported import UNSUPPORTED

_WRAPPED = ("module", "base_model.model", "module.base_model.model")  # DataParallel and DDP, PEFT, and both
_ENDING = re.compile(r"For[A-Z]\w*$|(Text|Vision|Chat)?Model$")


def family_of(model: Any) -> Family:
    """Return the family of a loaded model.

    Raises:
        TypeError: the model is not one of the supported classes, or its language model uses sliding windows.
    """
    family = _supported(model)
    if family is None:
        raise _refusal(model)
    text = model.config.get_text_config()
    types = getattr(text, "layer_types", None) or ()
    if "chunked_attention" in types:
        raise TypeError(
            f"the language model of this {family.name} attends within chunks of the prompt, whose cache forgets by "
            "position; use a checkpoint with full attention"
        )
    if not family.slides and ("sliding_attention" in types or (getattr(text, "sliding_window", None) and not types)):
        raise TypeError(
            f"the language model of this {family.name} uses sliding-window attention, whose cache forgets by position; "
            "set `config.text_config.sliding_window = None` if the prompts are shorter than the window"
        )
    return family


def _supported(model: Any) -> Family | None:
    """Return the family of a model; None if the model is of none, is a part of one or is wrapped."""
    family = FAMILIES.get(_model_type(model))
    whole = family is not None and hasattr(model, "lm_head") and hasattr(model, "model")
    return family if family is not None and whole and hasattr(model.model, family.language_model) else None


def _model_type(model: Any) -> str:
    return getattr(getattr(model, "config", None), "model_type", "")


def _refusal(model: Any) -> TypeError:
    """Say why a model cannot be patched, and what to do instead."""
    if isinstance(model, str):
        return TypeError(f"patch takes a loaded model; use vlmslim.from_pretrained({model!r}, method)")
    name, model_type = type(model).__name__, _model_type(model)
    for path in _WRAPPED:
        try:
            inside = attrgetter(path)(model)
        except AttributeError:
            continue
        if _supported(inside):
            return TypeError(f"cannot patch {name}, which wraps a model: patch the model inside, `model.{path}`")
    names = [family.name for family in FAMILIES.values()]
    supported = f"vlmslim supports {', '.join(names)}; docs/models.md tells how to add a family"
    if whole := FAMILIES.get(re.sub("_(text|vision)$", "", model_type)):
        return TypeError(f"cannot patch {name}, which is a part of a model: pass the whole {whole.name}; {supported}")
    reason = f": {UNSUPPORTED[model_type]}" if model_type in UNSUPPORTED else ""
    stems = {_ENDING.sub("", known).lower(): known for known in names}
    nearest = get_close_matches(_ENDING.sub("", name).lower(), stems, n=1)
    hint = f"the nearest supported class is {stems[nearest[0]]}; " if nearest else ""
    return TypeError(f"cannot patch {name}{reason}; {hint}{supported}")


def check_decoder(core: Any, between_layers: str | None = None) -> None:
    """Refuse a language model into which the engine cannot look.

    Args:
        core: the model without its head.
        between_layers: a method that drops tokens between decoder layers, as messages name it; None without one.

    Raises:
        TypeError: the language model has no list of layers with rotary positions; or it has a layer whose attention
            cannot be recomputed, and a method drops tokens between layers.
    """
    lm = language_model(core)
    name = type(lm).__name__
    if not isinstance(getattr(lm, "layers", None), nn.ModuleList) or not hasattr(lm, "rotary_emb"):
        raise TypeError(
            f"cannot patch a {name}: vlmslim needs a language model with `layers` and rotary positions, such as Llama, "
            "Mistral, Qwen2, Qwen3, Gemma, Phi-3, GLM, OLMo-2 or Cohere"
        )
    if between_layers is None:
        return
    for i, layer in enumerate(lm.layers):
        if attention_of(layer) is None:
            raise TypeError(
                f"{between_layers} drops tokens between the layers of {name}, and layer {i} does not attend through "
                "transformers' attention interface, so its attention cannot be recomputed; use a method that works "
                "before the language model"
            )


def check_tower(core: Any) -> None:
    """Refuse a vision tower that does not cut a picture into a square grid of patches, in layers as CLIP's.

    Raises:
        TypeError: the message names the tower.
    """
    family, config = row_of(core), core.config.vision_config
    if family.layers != Family.layers or family.units not in ("crops", "anyres"):
        return  # a family with a tower of its own kind
    found = bare_tower(core)
    layers = getattr(getattr(found, "encoder", None), "layers", None)
    embeddings = getattr(found, "embeddings", None)
    sides = getattr(config, "image_size", None), getattr(config, "patch_size", None)
    square = all(isinstance(side, int) for side in sides)
    if not isinstance(layers, nn.ModuleList) or embeddings is None or not square:
        raise TypeError(
            f"cannot patch a model with the vision tower {type(tower(core)).__name__}: vlmslim needs one that sees a "
            "square picture as a grid of patches in `encoder.layers`, as CLIP and SigLIP towers do"
        )


def check_tower_layers(core: Any, method: str) -> None:
    """Refuse a tower whose queries and keys `vlmslim.ops.attention.tower_qk` cannot compute.

    Args:
        core: the model without its head.
        method: the method that reads them, as messages name it.

    Raises:
        TypeError: the message names the tower and the method.
    """
    for layer in encoder_layers(core):
        probed = row_of(core).units == "packed" and attention_of(layer) is not None
        if not probed and not has_plain_heads(layer):
            raise TypeError(
                f"{method} reads the attention of the vision tower, and vlmslim cannot recompute it for "
                f"{type(tower(core)).__name__}; use a method without it, such as divprune or fastv"
            )


def check_patches(core: Any, method: str) -> None:
    """Refuse a family whose visual tokens are not single patches of the tower, projected one by one.

    Raises:
        TypeError: the message names the family and the method.
    """
    if not projects_patches(core):
        raise TypeError(
            f"{method} works on patches of the vision tower that the projector maps one by one, and in "
            f"{row_of(core).name} several patches make a visual token; use another method, such as divprune or fastv"
        )
