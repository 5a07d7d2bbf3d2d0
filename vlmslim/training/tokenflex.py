"""Train TokenFLEX's projector: one projector for many token counts, or, with a single count, for one count alone.

The projector starts from random weights. A regression onto the model's own projector, with its outputs pooled, first
brings it to where the language model can read it. Then every batch draws one count.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor
from transformers import ProcessorMixin

import vlmslim
from vlmslim.methods.tokenflex import TokenFlex, pool_square
from vlmslim.training.conversations import Collator, Items
from vlmslim.training.finetune import Settings, finetune, load


def train(settings: Settings, data: Items, out: Path, stop: int | None = None) -> int:
    """Train on `data`, see `finetune`; `settings.script["warm_start"]` is the number of pictures of the warm start."""
    model, processor = load(settings)
    options = {"weights": f"random:{settings.seed}", "keep": max(settings.method.get("counts", [256]))}
    slim = vlmslim.patch(model, "tokenflex", **options | settings.method)
    if settings.script.get("warm_start") and not (out / "last.pt").exists():
        warm_start(slim, processor, data, settings, settings.script["warm_start"])
    return finetune(slim, processor, data, settings, out, stop=stop)


def warm_start(
    slim: vlmslim.Slim, processor: ProcessorMixin, data: Items, settings: Settings, pictures: int, steps: int = 300
) -> float:
    """Fit the projector to the model's own projector with pooled outputs; return the share of variance left.

    The warm start replaces the alignment stage on captions. It encodes the first `pictures` pictures of the data once
    and never runs the language model. Counts are drawn as in training.
    """
    core, method, projector = slim.model.model, slim.methods[0], slim.trained["tokenflex"]
    assert isinstance(method, TokenFlex)
    device = PartialState(cpu=settings.device == "cpu").device  # each process has its own
    for module in (core.vision_tower, core.multi_modal_projector, projector):
        module.to(device)
    tower = _tower_features(slim, processor, data, pictures, device)
    torch.manual_seed(settings.seed)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        x = tower[torch.randint(len(tower), (32,))].to(device)
        side = round(method.draw() ** 0.5)
        with torch.no_grad():
            target = pool_square(core.multi_modal_projector(x), side, method.pool).float()
        error = F.mse_loss(projector(pool_square(x.float(), side, method.pool)), target) / target.var()
        error.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    print(f"warm start: {error.item():.3f} of the variance left", flush=True)
    return error.item()


@torch.no_grad()
def _tower_features(
    slim: vlmslim.Slim, processor: ProcessorMixin, data: Items, pictures: int, device: torch.device
) -> Tensor:
    """Encode the first `pictures` pictures: vision-tower features (crops, p, v) as they enter the projector."""
    core, collate = slim.model.model, Collator(processor)
    tower: list[Tensor] = []
    handle = core.multi_modal_projector.register_forward_pre_hook(lambda _, args: tower.append(args[0].cpu()))
    found = 0
    for index in range(len(data)):
        batch = collate([data[index]])
        if "pixel_values" in batch:
            given = {k: batch[k].to(device) for k in ("pixel_values", "image_sizes") if k in batch}
            core.get_image_features(**given | {"pixel_values": given["pixel_values"].to(slim.model.dtype)})
            found += 1
        if found == pictures:
            break
    handle.remove()
    return torch.cat(tower)
