"""Train TokenFLEX's projector: one for many token counts, or, with a single count, a fixed one.

The backbone is frozen. The projector starts from scratch, and is first brought to where the language model can read it:
a regression onto the model's own projector, pooled. Then every micro-batch draws one count.

    python scripts/train_tokenflex.py --out runs/tokenflex
    python scripts/train_tokenflex.py --out runs/fixed-36 'method={counts: [36], probabilities: [1.0]}'
    accelerate launch --num_processes 8 scripts/train_tokenflex.py --config my.yaml --out runs/tokenflex-7b
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "bundled"))

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import ProcessorMixin

import vlmslim
from vlmslim.methods.tokenflex import pool_square
from vlmslim.training.conversations import Collator
from vlmslim.training.finetune import Settings, finetune, load, parse


def warm_start(
    slim: vlmslim.Slim, processor: ProcessorMixin, data: Dataset, settings: Settings, pictures: int, steps: int = 300
) -> float:
    """Fit the fresh projector to the model's own one, whose outputs are pooled; returns the share left unexplained.

    It takes the place of the alignment stage on captions, at the cost of encoding the first `pictures` of the data
    once: the language model is not run. Counts are drawn as in training.
    """
    core, method, projector = slim.model.model, slim.methods[0], slim.trained["tokenflex"]
    device = PartialState(cpu=settings.device == "cpu").device  # each process has its own
    core.vision_tower.to(device), core.multi_modal_projector.to(device), projector.to(device)
    tower, handle = (
        [],
        core.multi_modal_projector.register_forward_pre_hook(lambda m, args: tower.append(args[0].cpu())),
    )
    collate, found = Collator(processor), 0
    with torch.no_grad():
        for index in range(len(data)):
            batch = collate([data[index]])
            if "pixel_values" in batch:
                given = {k: batch[k].to(device) for k in ("pixel_values", "image_sizes") if k in batch}
                core.get_image_features(**given | {"pixel_values": given["pixel_values"].to(slim.model.dtype)})
                found += 1
            if found == pictures:
                break
    handle.remove()
    tower = torch.cat(tower)  # (crops, p, v)
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
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    print(f"warm start on {found} pictures: {error.item():.3f} of the variance left", flush=True)
    return error.item()


def main() -> None:
    """Train; a run that was interrupted goes on."""
    settings, args = parse(__doc__, Path(__file__).with_name("tokenflex.yaml"))
    model, processor, data = load(settings)
    options = {"weights": f"random:{settings.seed}", "keep": max(settings.method.get("counts", [256]))}
    slim = vlmslim.patch(model, "tokenflex", **options | settings.method)
    if not (args.out / "last.pt").exists() and settings.script.get("warm_start"):
        warm_start(slim, processor, data, settings, settings.script["warm_start"])
    finetune(slim, processor, data, settings, args.out, stop=args.stop)


if __name__ == "__main__":
    main()
