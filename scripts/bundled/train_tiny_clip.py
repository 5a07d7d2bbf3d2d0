"""Train the bundled tiny CLIP on composed scenes, and export its tower for LLaVA.

open_clip builds the model and gives the contrastive loss. In addition, linear heads predict from each patch token of
the penultimate layer, which LLaVA reads, what occupies the patch and where the patch is; the generator knows both. The
export drops the heads. A short second stage freezes the tower up to that layer and trains the rest on the contrastive
loss alone, in larger batches. The export is an open_clip folder (``local-dir:``) with fp16 weights. The same command
resumes an interrupted run.

    python scripts/bundled/train_tiny_clip.py --out runs/tiny-clip [KEY=VALUE ...]
"""

import json
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from open_clip.model import CLIP
from safetensors.torch import save_file
from scenes import GRID, LABELS, caption, make_scene
from torch import nn
from train_common import MEAN, STD, Optimizers, Run, loader, normalise, pixels, start

from vlmslim.training.config import command_line, read_config


@lru_cache
def tokenizer() -> open_clip.SimpleTokenizer:
    """open_clip's BPE tokenizer."""
    return open_clip.SimpleTokenizer()


def sample(seed: int, split: str = "train") -> dict:
    """Picture, caption and dense labels of one scene."""
    scene = make_scene(seed, split)
    text = caption(scene, np.random.default_rng([seed, 2]))
    return {"image": pixels(scene.image), "text": tokenizer()([text])[0], "labels": torch.from_numpy(scene.labels)}


def collate(samples: list[dict]) -> dict:
    """Stack samples to a batch."""
    return {key: torch.stack([s[key] for s in samples]) for key in samples[0]}


class Trainee(nn.Module):
    """The CLIP and its throw-away dense heads."""

    def __init__(self, model: dict):
        super().__init__()
        self.clip = CLIP(**model)
        self.heads = nn.Linear(model["vision_cfg"]["width"], sum(LABELS.values()) + 2)

    def forward(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Image features (B, D) and text features (B, D), normalised, and dense logits (B, 144, classes)."""
        visual = self.clip.visual
        x = visual._embeds(images)
        for block in visual.transformer.resblocks[:-1]:
            x = block(x)
        dense = self.heads(x[:, 1:])
        pooled, _ = visual._pool(visual.transformer.resblocks[-1](x))
        return F.normalize(pooled @ visual.proj, dim=-1), self.clip.encode_text(texts, normalize=True), dense

    def freeze_trunk(self) -> None:
        """Freeze the heads and the tower up to the penultimate layer: LLaVA's features stay what they are."""
        last = f"clip.visual.transformer.resblocks.{len(self.clip.visual.transformer.resblocks) - 1}."
        tail = (last, "clip.visual.ln_post", "clip.visual.proj")
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(tail) or not name.startswith(("heads", "clip.visual")))


def dense_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over label groups of the cross-entropy, empty patches counting for less; and a patch's column and row."""
    line = torch.linspace(-1, 1, GRID, device=logits.device)
    place = torch.stack([line.repeat(GRID), line.repeat_interleave(GRID)], -1)
    total = (logits[..., -2:].float() - place).square().mean()
    for i, group in enumerate(logits[..., :-2].float().split(list(LABELS.values()), -1)):
        target = labels[..., i].long()
        loss = F.cross_entropy(group.flatten(0, 1), target.flatten(), reduction="none")
        weight = torch.where(target.flatten() > 0, 1.0, 0.15)
        total = total + (loss * weight).sum() / weight.sum()
    return total


@torch.no_grad()
def load_weights(trainee: Trainee, run: Path) -> None:
    """Take an earlier run's weights; its heads may be narrower."""
    saved = torch.load(run / "last.pt", map_location="cpu", weights_only=True)["model"]
    for name, parameter in trainee.named_parameters():
        (parameter[: len(saved[name])] if parameter.ndim else parameter).copy_(saved[name])


@torch.no_grad()
def evaluate(trainee: Trainee, accelerator: Accelerator, n: int = 128) -> dict:
    """On held-out scenes: accuracy of each dense label where it is not empty, and picture-to-caption retrieval."""
    batch = collate([sample(10**6 + i, "test") for i in range(n)])
    device = accelerator.device
    trainee.eval()
    with accelerator.autocast():
        image, text, dense = trainee(normalise(batch["image"].to(device)), batch["text"].to(device))
    trainee.train()
    out = {"retrieval": float(((image @ text.T).argmax(-1) == torch.arange(n, device=device)).float().mean())}
    for i, (name, group) in enumerate(zip(LABELS, dense[..., :-2].split(list(LABELS.values()), -1), strict=True)):
        target = batch["labels"][..., i].long().to(device)
        out[name] = float((group.argmax(-1) == target)[target > 0].float().mean())
    return out


def export(clip: CLIP, model: dict, folder: Path) -> None:
    """Write the open_clip folder: open_clip.create_model_and_transforms("local-dir:" + folder) loads it."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest", "size": 192}
    preprocess["size"] = model["vision_cfg"]["image_size"]
    text = json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}, indent=2)
    (folder / "open_clip_config.json").write_text(text + "\n")
    state = {k: v.half().contiguous().cpu() for k, v in clip.state_dict().items() if v.is_floating_point()}
    state.pop("attn_mask", None)
    save_file(state, folder / "open_clip_model.safetensors", metadata={"format": "pt"})
    (folder / "open_clip_model.safetensors").chmod(0o644)


def train(trainee: Trainee, config: dict, out: Path, export_to: Path, stop: int, accelerator: Accelerator) -> None:
    """Train what requires gradients up to step `stop`, going on from the last checkpoint in `out`."""
    by_adamw = ("embedding", "heads", "visual.proj", "projection")
    optimizers = Optimizers(dict(trainee.named_parameters()), config, by_adamw)
    clip_loss = open_clip.loss.ClipLoss()
    run = Run(out, config, trainee, optimizers)
    step = run.resume()
    test = partial(evaluate, trainee, accelerator)
    write = partial(export, trainee.clip, config["model"], export_to)
    for batch in loader(sample, config, step, stop, collate):
        batch = {k: v.to(accelerator.device) for k, v in batch.items()}
        with accelerator.autocast():
            image, text, dense = trainee(normalise(batch["image"]), batch["text"])
        contrast = clip_loss(image.float(), text.float(), trainee.clip.logit_scale.exp().clamp(max=100))
        local = dense_loss(dense, batch["labels"])
        loss = config["dense_weight"] * local + config["contrast_weight"] * contrast
        accelerator.backward(loss)
        nn.utils.clip_grad_norm_(trainee.parameters(), 2.0)
        optimizers.step(step)
        step += 1
        run.report(step, stop, {"loss": loss, "dense": local, "contrast": contrast}, test, write)


def main() -> None:
    """Train both stages, evaluate, export."""
    parser = command_line(
        __doc__,
        Path(__file__).with_name("tiny_clip.yaml"),
        "the export is OUT/tiny-clip; --stop counts the first stage",
    )
    parser.add_argument("--start", type=Path, help="start from this run folder's weights, with a new schedule")
    args = parser.parse_intermixed_args()
    config = read_config(args.config, args.overrides)
    second = config | config.pop("second_stage")
    accelerator = start(config)
    trainee = Trainee(config["model"]).to(accelerator.device)
    if args.start:
        load_weights(trainee, args.start)
    print(f"{sum(p.numel() for p in trainee.clip.visual.parameters()) / 1e6:.2f} M vision parameters", flush=True)
    stop = min(args.stop or config["steps"], config["steps"])
    train(trainee, config, args.out, args.out / "tiny-clip", stop, accelerator)
    if stop == config["steps"]:
        trainee.freeze_trunk()
        train(trainee, second, args.out / "second", args.out / "tiny-clip", second["steps"], accelerator)


if __name__ == "__main__":
    main()
