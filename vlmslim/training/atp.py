"""Train ATP's threshold modules for a budget of visual tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.utils import reduce
from torch import Tensor, nn

import vlmslim
from vlmslim.compressor import check_choices
from vlmslim.engine.families import language_model
from vlmslim.methods.atp import ThresholdModules
from vlmslim.methods.atp.losses import depth_loss, mean_tokens, target_loss
from vlmslim.training.conversations import Items
from vlmslim.training.finetune import Answers, Loss, Settings, finetune, load


class Price(nn.Module):
    """The price of visual tokens in the loss, which moves until the mean count is the target: a Lagrange multiplier.

    The distance of a batch's mean from the target (equation 13) is a poor teacher, because a batch of a few images
    misses the target by chance. Its gradient has the same size in every step, larger than that of the answers, and a
    sign that flips with the batch. The price sums up by how much a running mean of the counts is off instead, so chance
    averages out. Its damping depends on the batch, but is small where the batch is near the goal. Counts are shares of
    an image here, so that the same rates suit images of any size.

    Args:
        target: share of an image's visual tokens to keep on average.
        rate: what one image too much adds to the price in each step.
        damping: what one image too much in a batch adds to the price of this batch. Without it the price swings.
        memory: weight of the past in the running mean, in [0, 1).

    Attributes:
        value: () the price of the tokens of one image; negative if the counts have to rise.
        running: () running mean of the share that images keep.
        goal: () share that the price steers to. It goes from the share of the first step to the target.
    """

    value: Tensor
    running: Tensor
    goal: Tensor
    first: Tensor
    started: Tensor

    def __init__(self, target: float, rate: float = 0.4, damping: float = 40.0, memory: float = 0.9):
        super().__init__()
        self.target, self.rate, self.damping, self.memory = target, rate, damping, memory
        for name in ("value", "running", "goal", "first", "started"):
            self.register_buffer(name, torch.zeros(()))
        self._kept: list[Tensor] = []  # of the batches since the last move: (2,), sum of shares and images

    def cost(self, share: Tensor) -> Tensor:
        """Return the term of the loss for a batch, and note the counts for the next move.

        Args:
            share: (N,) share of its tokens that each image keeps; differentiable.
        """
        self._kept.append(torch.stack([share.detach().sum(), share.new_tensor(len(share))]))
        mean = share.mean()
        price = self.value + self.started * self.damping * (mean.detach() - self.goal)
        return price.to(share) * mean

    @torch.no_grad()
    def move(self, left: float) -> None:
        """Move the price by the counts of all processes since the last move. Every process must call this.

        Args:
            left: share of the way from the first share to the target that is left, from 1 to 0.
        """
        kept = torch.stack([torch.zeros(2, device=self.value.device), *self._kept]).sum(0)
        self._kept = []
        total, images = reduce(kept, "sum")
        share = total / images.clamp(min=1)
        running = self.memory * self.running + (1 - self.memory) * share
        first = torch.where(self.started > 0, self.first, share)
        running = torch.where(self.started > 0, running, share)
        goal = self.target + (first - self.target) * left
        moved = {"first": first, "running": running, "goal": goal, "value": self.value + self.rate * (running - goal)}
        for name, new in (moved | {"started": torch.ones_like(self.started)}).items():
            old = getattr(self, name)
            old.copy_(torch.where(images > 0, new, old))  # a step of text alone moves nothing


@dataclass
class BudgetLoss:
    """The loss beside that of the answers, equations 12 to 14 of arXiv 2412.00447.

    Equation 13 is replaced by `Price`; `rule="distance"` is the literal form.

    target        : visual tokens of an image to keep on average
    average       : over the "modules", or over all decoder "layers", including those before the first module
    rule          : "price", or "distance" of the batch's mean from the target
    rate          : of "price", see `Price`
    damping       : of "price", see `Price`
    memory        : of "price", see `Price`
    ramp          : of "price", share of the steps in which its goal falls to the target
    target_weight : of "distance", lambda_target, per token
    depth_weight  : lambda_atp
    temperature   : T of the soft masks at the first step and at the last step; geometric in between
    """

    target: float
    average: str = "modules"
    rule: str = "price"
    rate: float = 0.4
    damping: float = 40.0
    memory: float = 0.9
    ramp: float = 0.3
    target_weight: float = 0.2
    depth_weight: float = 0.05
    temperature: tuple[float, float] = (10.0, 60.0)

    def __post_init__(self):
        check_choices(self, average=("modules", "layers"), rule=("price", "distance"))

    def price(self, patches: int) -> Price:
        """Return the price of tokens at the start of a run, for images of so many patches."""
        return Price(self.target / patches, self.rate, self.damping, self.memory)

    def anneal(self, modules: ThresholdModules, steps: int) -> Callable[[int], None]:
        """Return a function that sets the temperature of a step (from 0)."""
        low, high = self.temperature

        def set_temperature(step: int) -> None:
            modules.temperature = low * (high / low) ** (step / max(1, steps - 1))

        return set_temperature

    def steer(self, price: Price, steps: int) -> Callable[[int], None]:
        """Return a function that moves the price after a step (from 0)."""

        def move(step: int) -> None:
            price.move(max(0.0, 1 - (step + 1) / max(1, self.ramp * steps)))

        return move

    def loss(self, modules: ThresholdModules, depth: int, price: Price) -> Loss:
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
                "spread": hard_mean.std(correction=0),
            }
            numbers |= {f"after_{layer}": hard[:, i].mean() for i, layer in enumerate(modules.layers)}
            if self.rule == "distance":
                return answers.loss + self.depth_weight * deep + self.target_weight * away, numbers
            numbers |= {"price": price.value.clone(), "goal": price.goal * modules.patches}
            return answers.loss + self.depth_weight * deep + price.cost(soft_mean / modules.patches), numbers

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
    price = budget.price(modules.patches)
    return finetune(
        slim,
        processor,
        data,
        settings,
        out,
        loss=budget.loss(modules, len(language_model(model.model).layers), price),
        before_step=budget.anneal(modules, settings.steps),
        after_step=budget.steer(price, settings.steps),
        state=price,
        stop=stop,
    )
