"""The backbone that a trained part was trained for: its name and sizes, and samples of its weights to know it again."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from vlmslim import bundled
from vlmslim.engine.families import encoder_layers

SAMPLES = 8  # values of each tensor in a signature
#: Relative distance of samples beyond which two checkpoints are different trainings. Largest on the tiny LLaVA: 0.002
#: after a cast to bfloat16; 0.008 and 0.13 after 20 steps of fine-tuning at learning rates of 1e-4 and 1e-3; 0.39
#: between two lengths of its own training; 1.1 between two initialisations, of which the norm of the final RMSNorm
#: differs by 0.2 %: sums over a tensor tell less than a few of its values.
TOLERANCE = 0.2


def describe(model: nn.Module, signed: bool) -> dict:
    """What to write down about the model under a patch: name, commit, sizes, and its signature if it shall be `signed`.

    Only trained parts need the signature: every other method suits any checkpoint.
    """
    name = getattr(model, "name_or_path", "") or ""
    if name and Path(name).is_dir():
        name = bundled.name_of(name) or str(Path(name).resolve())
    base = {"name": name, "commit": getattr(model.config, "_commit_hash", None), "shape": shape_of(model)}
    return base | ({"signature": signature(model)} if signed else {})


def check(part: str, base: dict, model: nn.Module) -> None:
    """Make sure that a model is the one that a trained part was trained for.

    Args:
        part: the part, for messages.
        base: what `describe` made of that model; without a signature (older files) sizes alone are compared.
        model: the model to load it onto.

    Raises:
        ValueError: sizes differ, or the weights are those of another training.
    """
    trained_for = f"{part} was trained for another backbone ({base['name'] or 'without a name'})"
    theirs = base["shape"]
    differs = [f"{k} {theirs.get(k)} there, {v} here" for k, v in shape_of(model).items() if theirs.get(k) != v]
    if differs:
        raise ValueError(f"{trained_for}: {'; '.join(differs)}")
    if not (signed := base.get("signature")):
        return
    ours = signature(model)
    distances = {k: _distance(signed[k], ours[k]) for k in signed.keys() & ours.keys()}
    if not distances:
        warnings.warn(
            f"{part}: no weights of this model can be read here (quantised or offloaded), so that it is the backbone "
            "that the part was trained for goes unchecked",
            stacklevel=2,
        )
    differs = [f"{k} by {distance:.0%}" for k, distance in sorted(distances.items()) if distance > TOLERANCE]
    if differs:
        raise ValueError(
            f"{trained_for} of the same sizes: weights differ here, {', '.join(differs)}. Load the checkpoint that it "
            "was trained for, or train the part again for this one"
        )


def shape_of(model: nn.Module) -> dict:
    """What a trained part depends on in a checkpoint: its family and the sizes of its tower and language model."""
    core, text, vision = model.model, model.config.get_text_config(), model.config.vision_config
    return {
        "model_type": model.config.model_type,
        "tower_width": vision.hidden_size,
        "tower_layers": len(encoder_layers(core)),
        "tower_grid": vision.image_size // vision.patch_size,
        "tower_feature_layer": model.config.vision_feature_layer,
        "hidden_size": text.hidden_size,
        "layers": len(core.language_model.layers),
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "vocabulary": text.vocab_size,
    }


def signature(model: nn.Module) -> dict[str, list[float]]:
    """A few values of a few weights: the embedding, the projector, and a norm of the tower.

    Quantisation leaves most of them as they are. What cannot be read here (packed, sharded, on the meta device without
    a copy to load) is left out.
    """
    core = model.model
    owners = {
        "embed_tokens": core.language_model.embed_tokens,
        "projector": getattr(core.multi_modal_projector, "linear_1", None),
        "tower_norm": getattr(encoder_layers(core)[0], "layer_norm1", None),
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
    """Values at fixed places, spread by the golden ratio so that they share no row or column; None if unreadable."""
    values = getattr(owner, kind, None)
    if isinstance(values, Tensor) and values.is_meta and hasattr(owner, "_hf_hook"):  # offloaded by accelerate
        from accelerate.utils import align_module_device

        with align_module_device(owner):
            return _values(getattr(owner, kind))
    return _values(values)


def _values(tensor: Tensor | None) -> list[float] | None:
    plain = type(tensor) in (Tensor, nn.Parameter)  # subclasses are packed or sharded
    if not plain or tensor.is_meta or not tensor.numel():
        return None
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        return None
    places = [int(tensor.numel() * ((i + 1) * 0.6180339887498949 % 1)) for i in range(SAMPLES)]
    return [float(f"{x:.4g}") for x in tensor.flatten()[places].tolist()]


def _distance(a: list[float], b: list[float]) -> float:
    """Norm of the difference, relative to the larger of the two; 0 if both are zero."""
    a, b = torch.tensor(a, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)
    larger = max(a.norm(), b.norm())
    return float((a - b).norm() / larger) if larger else 0.0
