"""The differences between model families, and between versions of transformers, in one place.

rows.py      one row for each family; a new family is a new row
family.py    the record that a row fills in
parts.py     the parts of a model: language model, tower, projector
checks.py    the models that the engine refuses
prompts.py   pictures in prompts and in outputs of the encoder
decoder.py   masks, rotary positions and the KV cache
"""

from vlmslim.engine.families.checks import (
    check_decoder,
    check_patches,
    check_tower,
    check_tower_layers,
    family_of,
)
from vlmslim.engine.families.decoder import (
    KV_CACHE,
    blocks_of,
    cached_keys,
    causal_mask,
    kv_cache,
    layer_type,
    rotary,
)
from vlmslim.engine.families.family import Family
from vlmslim.engine.families.parts import (
    added_layers,
    attending_layer,
    encoder,
    encoder_layers,
    feature_layers,
    final_norm,
    has_cls,
    has_plain_heads,
    language_model,
    merge,
    projector,
    projects_patches,
    sees_whole,
    tower,
)
from vlmslim.engine.families.prompts import (
    anyres_tiles,
    images_of_prompts,
    placeholders,
    window_order,
    with_newlines,
)
from vlmslim.engine.families.rows import FAMILIES, one_apart, same_mosaic, touching

__all__ = [
    "FAMILIES",
    "KV_CACHE",
    "Family",
    "added_layers",
    "anyres_tiles",
    "attending_layer",
    "blocks_of",
    "cached_keys",
    "causal_mask",
    "check_decoder",
    "check_patches",
    "check_tower",
    "check_tower_layers",
    "encoder",
    "encoder_layers",
    "family_of",
    "feature_layers",
    "final_norm",
    "has_cls",
    "has_plain_heads",
    "images_of_prompts",
    "kv_cache",
    "language_model",
    "layer_type",
    "merge",
    "one_apart",
    "placeholders",
    "projector",
    "projects_patches",
    "rotary",
    "same_mosaic",
    "sees_whole",
    "touching",
    "tower",
    "window_order",
    "with_newlines",
]
