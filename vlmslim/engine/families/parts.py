"""The parts of a model, wherever its family keeps them.

Models are typed `Any`, because `nn.Module` declares every submodule as `Tensor | Module`.
"""

import inspect
from operator import attrgetter
from typing import Any

from torch import nn

from vlmslim.engine.families.rows import row_of
from vlmslim.ops.attention import tower_attention, tower_norm


def language_model(core: Any) -> Any:
    """Return the decoder."""
    return getattr(core, row_of(core).language_model)


def final_norm(core: Any) -> Any:
    """Return the norm between the last decoder layer and the LM head."""
    lm = language_model(core)
    return next(getattr(lm, name) for name in ("norm", "final_layernorm", "final_layer_norm") if hasattr(lm, name))


def tower(core: Any) -> Any:
    """Return the vision tower."""
    return attrgetter(row_of(core).tower)(core)


def encoder(core: Any) -> Any:
    """Return the module that holds the vision tower and what stands between it and the projector."""
    return getattr(core, row_of(core).tower.partition(".")[0])


def projector(core: Any) -> Any:
    """Return what maps the tower's features to the language model's width."""
    return attrgetter(row_of(core).projector)(core)


def encoder_layers(core: Any) -> nn.ModuleList:
    """Return the encoder layers of the vision tower, wherever this version of transformers keeps them."""
    return attrgetter(row_of(core).layers)(bare_tower(core))


def bare_tower(core: Any) -> Any:
    """Return the vision tower without the wrapper that some versions of transformers put around it."""
    outer = tower(core)
    return getattr(outer, "vision_model", outer)


def merge(core: Any) -> int:
    """Return how many patches along each side make one visual token."""
    given = row_of(core).merge
    return given if isinstance(given, int) else attrgetter(given)(core.config)


def has_cls(core: Any) -> bool:
    """Tell whether the vision tower has a CLS token."""
    embeddings = getattr(bare_tower(core), "embeddings", None)
    return hasattr(embeddings, "class_embedding") or hasattr(embeddings, "cls_token")


def feature_layers(config: Any) -> tuple[int, ...]:
    """Return which hidden states of the tower the projector reads side by side; none where it reads the tower's output.

    Hidden state i is the output of layer i - 1, and -1 is that of the last layer.
    """
    names = ("vision_feature_layer", "vision_feature_layers")  # VipLlava's, before transformers 5.25
    given = next((x for name in names if (x := getattr(config, name, None)) is not None), ())
    return (given,) if isinstance(given, int) else tuple(given)


def has_plain_heads(layer: nn.Module) -> bool:
    """Tell whether queries and keys of a tower layer depend on its input alone, as in CLIP, and not on positions."""
    attention = tower_attention(layer)
    plain = attention is not None and all(hasattr(attention, name) for name in ("num_heads", "q_proj", "k_proj"))
    turns = "position_embeddings" in inspect.signature(type(attention).forward).parameters if plain else True
    return plain and not turns and tower_norm(layer) is not None


def attending_layer(core: Any, layer: int) -> int:
    """Return the first layer of the tower from `layer` on in which all patches of a picture see each other.

    In the other layers of Qwen2.5-VL's tower patches see their window only, which tells nothing of the picture.
    """
    depth = len(encoder_layers(core))
    everywhere = getattr(core.config.vision_config, "fullatt_block_indexes", None) or range(depth)
    return min((i for i in everywhere if i >= layer % depth), default=max(everywhere))


def sees_whole(core: Any, layer: int) -> bool:
    """Tell whether all patches of a picture see each other in a layer of the tower."""
    return attending_layer(core, layer) == layer % len(encoder_layers(core))


def projects_patches(core: Any) -> bool:
    """Tell whether visual tokens are single patches of the tower, which the projector maps one by one."""
    family = row_of(core)
    return family.units in ("crops", "anyres") and family.merge == 1


def added_layers(core: Any) -> int:
    """Count the decoder layers after which the model adds features of its tower to visual tokens (DeepStack)."""
    return min(len(getattr(tower(core), "deepstack_visual_indexes", ())), len(language_model(core).layers))
