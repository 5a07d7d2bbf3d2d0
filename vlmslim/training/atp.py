"""Train ATP's threshold modules for a budget of visual tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

import vlmslim
from vlmslim.compressor import check_choices
from vlmslim.methods.atp import ThresholdModules
from vlmslim.methods.atp.losses import depth_loss, mean_tokens, target_loss
from vlmslim.training.conversations import Items
from vlmslim.training.finetune import Answers, Loss, Settings, finetune, load


@dataclass
class BudgetLoss:
    """The loss beside that of the answers, equations 12 to 14 of arXiv 2412.00447.

    target        : visual tokens of an image to keep on average
    average       : over the "modules", or over all decoder "layers", including those before the first module
    depth_weight  : lambda_atp
    target_weight : lambda_target, per token
    temperature   : T of the soft masks at the first step and at the last step; geometric in between
    """

    target: float
    average: str = "modules"
    depth_weight: float = 0.05
    target_weight: float = 0.2
    temperature: tuple[float, float] = (10.0, 60.0)

    def __post_init__(self):
        check_choices(self, average=("modules", "layers"))

    def anneal(self, modules: ThresholdModules, steps: int) -> Callable[[int], None]:
        """Return a function that sets the temperature of a step (from 0)."""
        low, high = self.temperature

        def set_temperature(step: int) -> None:
            modules.temperature = low * (high / low) ** (step / max(1, steps - 1))

        return set_temperature

    def loss(self, modules: ThresholdModules, depth: int) -> Loss:
        """Return the whole loss, which logs soft and hard counts and how much the hard counts differ between rows."""
        over = {"layers": depth, "modules": None}[self.average]

        def total(answers: Answers, batch: dict, step: int) -> tuple[Tensor, dict[str, float | Tensor]]:
            if not modules.decisions:  # a batch of text alone
                return answers.loss, {}
            soft, hard = modules.counts("soft"), modules.counts("hard").float()
            modules.decisions = []
            soft_mean, hard_mean = (
                mean_tokens(counts, modules.layers, modules.patches, over) for counts in (soft, hard)
            )
            away = target_loss(soft_mean, self.target)
            deep = depth_loss(soft, modules.layers, modules.patches)
            numbers: dict[str, float | Tensor] = {
                "away": away,
                "deep": deep,
                "soft": soft_mean.mean(),
                "hard": hard_mean.mean(),
            }
            numbers["spread"] = hard_mean.std(correction=0)
            numbers |= {f"after_{layer}": hard[:, i].mean() for i, layer in enumerate(modules.layers)}
            return answers.loss + self.depth_weight * deep + self.target_weight * away, numbers

        return total


def train(settings: Settings, data: Items, out: Path, stop: int | None = None) -> int:
    """Train on `data`, see `finetune`; `settings.script` holds the options of `BudgetLoss`.

    Raises:
        ValueError: `settings.steps` is 0.
    """
    if not settings.steps:
        raise ValueError("steps=0: the temperature rises over a known number of steps, so give steps=...")
    model, processor = load(settings)
    slim = vlmslim.patch(model, "atp", **{"weights": f"random:{settings.seed}"} | settings.method)
    modules, budget = slim.trained["atp"], BudgetLoss(**settings.script)
    assert isinstance(modules, ThresholdModules)
    loss = budget.loss(modules, len(model.model.language_model.layers))
    before_step = budget.anneal(modules, settings.steps)
    return finetune(slim, processor, data, settings, out, loss, before_step, stop)
