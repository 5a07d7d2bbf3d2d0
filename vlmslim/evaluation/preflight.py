"""Checks of a run before it loads the checkpoint."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vlmslim.cost.flops import DecoderShape, tower_flops
from vlmslim.cost.vision import TowerShape, crop_tokens
from vlmslim.engine.families import FAMILIES
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.schema import ModelConfig
from vlmslim.io import provenance
from vlmslim.io.messages import one_line
from vlmslim.loading import check_checkpoint, load_config, located
from vlmslim.registry import build


def describe_checkpoint(model: ModelConfig) -> dict:
    """Return what is known of a checkpoint before it is loaded.

    Returns:
        Its `identity`, the `shape` of its decoder, the FLOPs of its vision tower for one crop, the visual tokens of an
        image, None if those depend on the size of the image, and the baselines that it cannot have, with the reason.

    Raises:
        ConfigError: there is no such checkpoint, or it takes no pictures.
    """
    try:
        check_checkpoint(model.pretrained)
        place = located(model.pretrained, revision=model.revision)
        name = check_checkpoint(place.checkpoint)
        loaded = load_config(place)
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pretrained: {one_line(error)}") from error
    if loaded.model_type not in FAMILIES:
        raise ConfigError(
            f"model.pretrained: {model.pretrained} is a {loaded.model_type}; vlmslim supports {', '.join(FAMILIES)}"
        )
    square = TowerShape.from_config(loaded).grid is not None  # other towers see pictures of any size
    described = {
        "shape": asdict(DecoderShape.from_config(loaded)),
        "tower_flops": tower_flops(loaded) if square else None,
    }
    identity = provenance.fingerprint(name) or getattr(loaded, "_commit_hash", None)
    family = FAMILIES[loaded.model_type]
    shrinks = square and family.units in ("crops", "anyres") and family.merge == 1
    why = f"it shrinks pictures for a tower of single patches and one size, which {family.name} does not have"
    undefined = {} if shrinks else {"downsample": why}
    return {"identity": identity, **described, "visual_tokens": visual_tokens(loaded), "undefined": undefined}


def visual_tokens(config: Any) -> int | None:
    """Return the visual tokens of every image by the configuration of a checkpoint; None if the image's size counts."""
    return crop_tokens(config) if config.model_type in ("llava", "vipllava", "gemma3") else None


def check_counts(stages: Sequence[dict], tokens: int) -> None:
    """Refuse a stage that is to keep more tokens than an image has.

    Raises:
        ValueError: the message says how many there are.
    """
    for stage in stages:
        build(stage).requested(tokens)
