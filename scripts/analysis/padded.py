"""A bundled checkpoint whose decoder heads are 64 wide instead of 48, which vLLM's CPU kernels cannot take.

Zeros at the end of every head change no product. Queries grow by sqrt(64 / 48), because attention divides by the root
of the head's width, and rotary embeddings turn the first three quarters of a head alone.
"""

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

NARROW, WIDE = 48, 64


def pad_heads(source: Path, target: Path, old_names: bool = False) -> Path:
    """Write a padded copy of a checkpoint, in fp32.

    Args:
        source: the checkpoint's folder.
        target: a new folder.
        old_names: name the tower's weights as transformers did before 5.20, which is all that stock vLLM 0.32 reads.
    """
    shutil.copytree(source, target)
    weights = load_file(source / "model.safetensors")
    for name, weight in weights.items():
        weight = weight.float()
        if name.startswith("language_model.") and ".self_attn." in name:
            if ".o_proj." in name:
                weight = _wide(weight.T).T
            else:
                weight = _wide(weight) * (math.sqrt(WIDE / NARROW) if ".q_proj." in name else 1)
        weights[name] = weight.contiguous()
    if old_names:
        weights = {name.replace("vision_tower.", "vision_tower.vision_model."): weights[name] for name in weights}
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["head_dim"] = WIDE
    config["text_config"]["rope_parameters"]["partial_rotary_factor"] = NARROW / WIDE
    config["dtype"] = config["text_config"]["dtype"] = "float32"
    (target / "config.json").write_text(json.dumps(config, indent=2))
    return target


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Append zeros to every head of (heads * 48, d)."""
    return torch.nn.functional.pad(x.unflatten(0, (-1, NARROW)), (0, 0, 0, WIDE - NARROW)).flatten(0, 1)
