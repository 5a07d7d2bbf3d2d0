"""Optimizers, schedule, seeded and resumable loader, log and export for the scripts that train the bundled models."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, ProcessorMixin

from vlmslim.io.files import atomically

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


def start(config: dict) -> Accelerator:
    """Seed everything and return the accelerator (bf16 autocast on CPU and GPU when the config says so)."""
    set_seed(config["seed"])
    return Accelerator(mixed_precision=config["precision"], cpu=config.get("device") == "cpu")


def pixels(image) -> torch.Tensor:
    """Convert a PIL picture to uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 (B, 3, H, W) to what CLIP's image processor gives."""
    shape = (1, 3, 1, 1)
    mean, std = (torch.tensor(v, device=images.device).view(shape) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


@torch.no_grad()
def standardise_inputs(projector: torch.nn.Module, features: torch.Tensor, fresh: bool) -> None:
    """Let a projector train on standardised tower features (N, width); `export` folds that into its weights.

    A projector that is not `fresh` has its first layer rewritten, so that it still computes the same.
    """
    projector.mean, projector.std = features.mean(0), features.std(0)
    linear = projector.linear_1
    if not fresh:
        linear.bias += linear.weight @ projector.mean
        linear.weight *= projector.std
    linear.register_forward_pre_hook(
        lambda _, x: ((x[0] - projector.mean.to(x[0].device)) / projector.std.to(x[0].device),)
    )


@torch.no_grad()
def export(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Write the checkpoint: fp16 on disk, fp32 when loaded without a dtype (CPUs are slow in fp16)."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    projector, name = model.model.multi_modal_projector, "model.multi_modal_projector.linear_1."
    mean, std = (v.to(projector.linear_1.weight.device) for v in (projector.mean, projector.std))
    weight = projector.linear_1.weight / std
    state[name + "weight"], state[name + "bias"] = weight.half(), (projector.linear_1.bias - weight @ mean).half()
    model.save_pretrained(folder, state_dict=state)
    processor.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


class Seeds(Dataset):
    """Samples `first` ... `last` - 1, each made from its own number: resuming needs no saved data state."""

    def __init__(self, make: Callable[[int], dict], first: int, last: int):
        self.make, self.first, self.last = make, first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict:
        return self.make(self.first + index)


def loader(make: Callable[[int], dict], config: dict, step: int, stop: int, collate: Callable) -> DataLoader:
    """Batches of the steps `step` up to `stop` - 1, in order, rendered in worker processes."""
    first, batch = config["first_scene"], config["batch"]
    data = Seeds(make, first + step * batch, first + max(step, stop) * batch)
    workers = config["workers"]
    return DataLoader(data, batch, collate_fn=collate, num_workers=workers, prefetch_factor=4 if workers else None)


class Optimizers:
    """Muon for the hidden matrices, AdamW for the rest, one warm-up + cosine schedule for both."""

    def __init__(self, named: dict[str, torch.nn.Parameter], config: dict, adamw: tuple[str, ...]):
        """`adamw`: name parts of matrices that AdamW takes (embeddings, output heads)."""
        trained = {n: p for n, p in named.items() if p.requires_grad}
        hidden = [p for n, p in trained.items() if p.ndim == 2 and not any(a in n for a in adamw)]
        rest = [p for n, p in trained.items() if p.ndim != 2 or any(a in n for a in adamw)]
        self.config = config
        self.all = [
            torch.optim.Muon(
                hidden, lr=config["lr_muon"], weight_decay=config["decay"], adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(rest, lr=config["lr_adamw"], weight_decay=0.0, betas=(0.9, 0.98)),
        ]

    def step(self, step: int) -> float:
        """Take step number `step` (from 0); returns the schedule's factor."""
        warm, last = self.config["warmup"], self.config["steps"]
        factor = min((step + 1) / warm, 0.5 * (1 + math.cos(math.pi * min(1, step / last))) * 0.98 + 0.02)
        for optimizer, key in zip(self.all, ("lr_muon", "lr_adamw"), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = self.config[key] * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return factor


class Run:
    """A training run's folder: log.jsonl, and a checkpoint that replaces the last one atomically."""

    def __init__(self, folder: str | Path, config: dict, model: torch.nn.Module, optimizers: Optimizers):
        self.folder, self.config, self.model, self.optimizers = Path(folder), config, model, optimizers
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started, self.before = time.time(), 0.0

    @property
    def seconds(self) -> float:
        """Training seconds so far, interruptions not counted."""
        return self.before + time.time() - self.started

    def log(self, **values: float) -> None:
        """Append to the log and print."""
        values = {k: round(v, 4) if isinstance(v, float) else v for k, v in values.items()}
        line = json.dumps({**values, "seconds": round(self.seconds)})
        print(line, flush=True)
        with (self.folder / "log.jsonl").open("a") as file:
            file.write(line + "\n")

    def report(
        self,
        step: int,
        stop: int,
        losses: dict[str, torch.Tensor],
        evaluate: Callable[[], dict[str, float]],
        export: Callable[[], None],
    ) -> None:
        """After `step` steps: log the losses, evaluate, checkpoint and export, each when it is due and after `stop`."""
        if step % self.config["log_every"] == 0 or step == stop:
            self.log(step=step, **{name: loss.item() for name, loss in losses.items()})
        if step % self.config["eval_every"] == 0 or step == stop:
            self.log(step=step, **evaluate())
            self.save(step)
            export()

    def save(self, step: int) -> None:
        """Checkpoint after `step` steps."""
        state = {"step": step, "seconds": self.seconds, "config": self.config,
                 "model": dict(self.model.named_parameters()),
                 "optimizers": [o.state_dict() for o in self.optimizers.all]}  # fmt: skip
        with atomically(self.folder / "last.pt") as part:
            torch.save(state, part)

    def resume(self) -> int:
        """Load the last checkpoint if there is one; returns the number of steps done."""
        path = self.folder / "last.pt"
        if not path.exists():
            return 0
        state = torch.load(path, map_location="cpu", weights_only=True)
        differs = [k for k, v in self.config.items() if k not in ("workers", "device") and state["config"].get(k) != v]
        if differs:
            raise ValueError(f"{path} was trained with other values of {', '.join(differs)}: use another --out")
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in state["model"].items():
                own[name].copy_(value)
        for optimizer, saved in zip(self.optimizers.all, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.before = state["seconds"]
        return state["step"]
