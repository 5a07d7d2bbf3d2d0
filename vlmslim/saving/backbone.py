"""The checkpoint that a trained part was trained for: its name and sizes, and samples of its weights."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vlmslim import bundled
from vlmslim.cost.vision import TowerShape
from vlmslim.engine.families import encoder_layers, language_model, projector
from vlmslim.ops.attention import tower_norm

SAMPLES = 8  # values of each tensor in a signature
#: Largest relative distance between the samples of two copies of one training. Measured on the tiny LLaVA: 0.002 after
#: a cast to bfloat16; 0.008 and 0.13 after 20 steps of fine-tuning at learning rates of 1e-4 and 1e-3; 0.39 between two
#: lengths of its own training; 1.1 between two initialisations. Single values, because sums over a tensor tell less:
#: the norm of the final RMSNorm differs by 0.2 % between two initialisations.
TOLERANCE = 0.2


def describe(model: Any, signed: bool) -> dict[str, Any]:
    """Record the model under a patch: name, commit, sizes, and its signature if it is to be `signed`.

    Only trained parts need the signature, because every other method suits any checkpoint.
    """
    name = getattr(model, "name_or_path", "") or ""
    if name and Path(name).is_dir():
        name = bundled.name_of(name) or str(Path(name).resolve())
    base = {"name": name, "commit": getattr(model.config, "_commit_hash", None), "shape": shape_of(model)}
    return base | ({"signature": signature(model)} if signed else {})


def check(part: str, base: dict[str, Any], model: Any) -> None:
    """Refuse a model that is not the one that a trained part was trained for.

    Args:
        part: the part, for messages.
        base: what `describe` recorded of that model. Without a signature (older files) only sizes are compared.
        model: the model to load the part onto.

    Raises:
        ValueError: sizes differ, or the weights are those of another training.
    """
    trained_for = f"{part} was trained for another backbone ({base['name'] or 'without a name'})"
    theirs = base["shape"]
    sizes = [f"{k} {theirs.get(k)} there, {v} here" for k, v in shape_of(model).items() if theirs.get(k) != v]
    if sizes:
        raise ValueError(f"{trained_for}: {'; '.join(sizes)}")
    if not (signed := base.get("signature")):
        return
    ours = signature(model)
    if any(len(values) != SAMPLES for values in signed.values()):
        raise ValueError(f"{part}: the signature of its backbone is damaged, because it has not {SAMPLES} values each")
    distances = {k: _distance(signed[k], ours[k]) for k in signed.keys() & ours.keys()}
    if not distances:
        warnings.warn(
            f"{part}: no weights of this model can be read (they are quantised or offloaded), so vlmslim cannot check "
            "that this is the backbone that the part was trained for",
            stacklevel=2,
        )
    differ = [f"{k} by {distance:.0%}" for k, distance in sorted(distances.items()) if distance > TOLERANCE]
    if differ:
        raise ValueError(
            f"{trained_for} of the same sizes: weights differ here, {', '.join(differ)}. Load the checkpoint that it "
            "was trained for, or train the part again for this one"
        )


def shape_of(model: Any) -> dict[str, Any]:
    """Return what a trained part depends on in a checkpoint: its family, and the sizes of tower and language model."""
    core, text = model.model, model.config.get_text_config()
    tower = TowerShape.from_config(model.config)
    return {
        "model_type": model.config.model_type,
        "tower_width": tower.hidden,
        "tower_layers": len(encoder_layers(core)),
        "tower_grid": None if tower.grid is None else tower.grid[1],  # None: pictures of any size
        "tower_feature_layer": getattr(model.config, "vision_feature_layer", None),
        "hidden_size": text.hidden_size,
        "layers": len(language_model(core).layers),
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "vocabulary": text.vocab_size,
    }


def signature(model: Any) -> dict[str, list[float]]:
    """Return a few values of a few weights: of the embedding, the projector's first layer, and a norm of the tower.

    Quantisation leaves most of these weights as they are. A weight that cannot be read is left out: one that is packed,
    sharded, or on the meta device without a copy to load.
    """
    core = model.model
    owners = {
        "embed_tokens": language_model(core).embed_tokens,
        "projector": next((m for m in projector(core).modules() if isinstance(m, nn.Linear | nn.Embedding)), None),
        "tower_norm": tower_norm(encoder_layers(core)[0]),
    }
    samples = {}
    for name, owner in owners.items():
        for kind in ("weight", "bias"):
            values = None if owner is None else _sample(owner, kind)
            if values is not None:
                samples[f"{name}.{kind}"] = values
    return samples


@torch.no_grad()
def _sample(owner: nn.Module, kind: str) -> list[float] | None:
    """Return values at fixed places of a weight; None if it cannot be read."""
    tensor = getattr(owner, kind, None)
    if isinstance(tensor, Tensor) and tensor.is_meta and hasattr(owner, "_hf_hook"):  # offloaded by accelerate
        from accelerate.utils import align_module_device

        with align_module_device(owner):
            return _values(getattr(owner, kind))
    return _values(tensor)


def _values(tensor: Any) -> list[float] | None:
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():  # subclasses are packed
        return None
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return None
    # Multiples of the golden ratio, because such places share no row and no column.
    places = [int(tensor.numel() * ((i + 1) * 0.6180339887498949 % 1)) for i in range(SAMPLES)]
    return [float(f"{x:.4g}") for x in tensor.flatten()[places].tolist()]


def _distance(theirs: list[float], ours: list[float]) -> float:
    """Return the norm of the difference, relative to the larger of the two norms; 0 if both are zero."""
    a, b = torch.tensor(theirs, dtype=torch.float64), torch.tensor(ours, dtype=torch.float64)
    larger = float(max(a.norm(), b.norm()))
    return float((a - b).norm()) / larger if larger else 0.0
