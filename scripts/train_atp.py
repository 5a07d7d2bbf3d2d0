"""Train ATP's threshold modules for a budget of visual tokens; the backbone is frozen unless --train-decoder.

python scripts/train_atp.py --out runs/atp-36
python scripts/train_atp.py --out runs/atp-16 'script={target: 16}'
accelerate launch --num_processes 8 scripts/train_atp.py --config my.yaml --out runs/atp-7b
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent / "bundled"))

from collections.abc import Callable
from dataclasses import dataclass

import vlmslim
from vlmslim.compressor import check_choices
from vlmslim.methods.atp import Modules, depth_loss, mean_tokens, target_loss
from vlmslim.training.finetune import Answers, Loss, finetune, load, parse


@dataclass
class Budget:
    """The loss beside that of the answers, equations 12 to 14 of arXiv 2412.00447.

    target         : visual tokens of an image to keep on average
    average        : over the "modules", or over all decoder "layers", those before the first module included
    depth_weight   : lambda_atp
    target_weight  : lambda_target, per token
    temperature    : T of the soft masks, at the first step and at the last; geometric in between
    """

    target: float
    average: str = "modules"
    depth_weight: float = 0.05
    target_weight: float = 0.2
    temperature: tuple[float, float] = (10.0, 60.0)

    def __post_init__(self):
        check_choices(self, average=("modules", "layers"))

    def anneal(self, modules: Modules, steps: int) -> Callable[[int], None]:
        """What sets the temperature before each step."""
        low, high = self.temperature

        def set_temperature(step: int) -> None:
            modules.temperature = low * (high / low) ** (step / max(1, steps - 1))

        return set_temperature

    def loss(self, modules: Modules, depth: int) -> Loss:
        """The whole loss; logs soft and hard counts, and how much the hard ones differ between rows."""
        over = {"layers": depth, "modules": None}[self.average]

        def total(answers: Answers, batch: dict, step: int):
            if not modules.decisions:  # a batch of text alone
                return answers.loss, {}
            soft, hard = modules.counts("soft"), modules.counts("hard").float()
            modules.decisions = []
            kept, really = (mean_tokens(counts, modules.layers, modules.patches, over) for counts in (soft, hard))
            away = target_loss(kept, self.target)
            deep = depth_loss(soft, modules.layers, modules.patches)
            numbers = {"away": away, "deep": deep, "soft": kept.mean(), "hard": really.mean()}
            numbers["spread"] = really.std(correction=0)
            numbers |= {f"after_{layer}": hard[:, i].mean() for i, layer in enumerate(modules.layers)}
            return answers.loss + self.depth_weight * deep + self.target_weight * away, numbers

        return total


def main() -> None:
    """Train; a run that was interrupted goes on."""
    settings, args = parse(__doc__, Path(__file__).with_name("atp.yaml"))
    if not settings.steps:
        raise ValueError("the temperature rises over a known number of steps: give steps=...")
    model, processor, data = load(settings)
    slim = vlmslim.patch(model, "atp", **{"weights": f"random:{settings.seed}"} | settings.method)
    modules, budget = slim.trained["atp"], Budget(**settings.script)
    loss = budget.loss(modules, len(model.model.language_model.layers))
    before_step = budget.anneal(modules, settings.steps)
    finetune(slim, processor, data, settings, args.out, loss, before_step, args.stop)


if __name__ == "__main__":
    main()
