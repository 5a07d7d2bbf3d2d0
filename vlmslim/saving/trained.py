"""Trained parts of methods: filled with saved weights, or with random ones for training."""

import re
from typing import Any

import torch
from torch import nn

from vlmslim.compressor import Compressor
from vlmslim.engine.families import language_model
from vlmslim.io.messages import shown
from vlmslim.registry import name_of
from vlmslim.saving import backbone
from vlmslim.saving.folder import CONFIG, read


def load_part(method: Compressor, part: nn.Module, model: nn.Module) -> None:
    """Fill the trained part of a method, move it to the model's device, and put it into evaluation mode.

    The option `weights` of the method says with what: a folder that `Slim.save_pretrained` wrote, `bundled/NAME`, or a
    repository on the hub, whose values take the dtype of the model; or "random" or "random:SEED", which initialises the
    part in fp32 for training with the `reset_parameters` of its modules, without touching the global generator.

    Args:
        method: the method.
        part: its trained part, which may be on the meta device.
        model: the model that it goes with.

    Raises:
        ValueError: no weights are given or there, or they belong to another backbone or to other options.
    """
    name, weights = name_of(method), str(getattr(method, "weights", ""))
    if any(p.is_meta for p in part.parameters()):
        part.to_empty(device="cpu")
    if not weights:
        raise ValueError(
            f"{name} has to be trained: give weights=DIR, a folder that Slim.save_pretrained wrote after a training "
            "(docs/training.md), or weights='random' to start one"
        )
    kind, _, seed = weights.partition(":")
    if kind == "random":
        if not re.fullmatch(r"\d{0,18}", seed):
            raise ValueError(f"weights={shown(weights)}: after 'random:' give a seed, an integer from 0 on")
        _initialise(part, int(seed or 0))
    else:
        _fill(part, weights, name, model)
    llava: Any = model
    device = next(language_model(llava.model).parameters()).device
    part.to("cpu" if device.type == "meta" else device).eval()


def _initialise(part: nn.Module, seed: int) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in part.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def _fill(part: nn.Module, weights: str, name: str, model: Any) -> None:
    saved = read(weights)
    if saved is None:
        raise ValueError(f"weights={weights!r}: there is no {CONFIG}; give a folder that save_pretrained wrote")
    backbone.check(f"{saved.folder} ({name})", saved.base, model)
    own, state = part.state_dict(), saved.tensors(name)
    wrong = sorted(own.keys() ^ state.keys()) + [k for k in own if k in state and own[k].shape != state[k].shape]
    if wrong:
        raise ValueError(
            f"{saved.folder}: the weights were made with other options of the method; {', '.join(wrong)} differ"
        )
    part.load_state_dict(state)
    part.to(dtype=model.dtype)
