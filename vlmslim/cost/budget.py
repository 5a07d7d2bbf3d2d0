"""Equal budgets: find the option of each method with which all of them cost the same.

    solved = solve(model, "fastv", prompts, equivalent_tokens=64, layer=3)
    vlmslim.patch(model, solved.stages)

`keep` alone is no fair budget: FastV that keeps 64 tokens from layer 2 on, DivPrune that keeps 64 from the start and
ToDRE that drops its 64 near the end cost differently. A cost is stated in one of two currencies:

equivalent_tokens : visual tokens of an image, averaged over the decoder layers. For a method that works before the
                    language model it is the count it keeps.
flops_ratio      : prefill FLOPs of the language model, over those of the unpatched model on the same prompts. Text
                    tokens count on both sides; a multiply-add is 2, the MLP has three matrices, attention is counted
                    in full. Left out: vision tower, projector, LM head and the method's own work. It is the ratio of
                    the mean prompt, as in the leaderboard.

Both are read off the receipt of a prefill of sample prompts, so what a method decides itself, sample by sample, is in.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import nn

from vlmslim.compressor import Compressor
from vlmslim.cost.flops import DecoderShape, equivalent_tokens, prefill_flops
from vlmslim.engine.families import family_of
from vlmslim.patching import patch
from vlmslim.registry import build, method_class, options_of

CURRENCIES = ("equivalent_tokens", "flops_ratio")
TOLERANCE = 0.02
SHARE_STEPS = 100_000  # steps of a share
MAX_PREFILLS = 12  # prefills of the sample, at most

Part = dict | Compressor


class BudgetError(ValueError):
    """No value of the option meets the cost; the message names the nearest."""


@dataclass(frozen=True)
class Solution:
    """A method that costs what it was told to.

    stages   : for `vlmslim.patch`
    option   : the option that was solved, and its `value`
    target   : the cost asked for: currency -> number
    achieved : what the sample prompts cost, in the same currency
    prompts  : how many sample prompts with images there were
    """

    stages: tuple[Part, ...]
    option: str
    value: int | float
    target: dict[str, float]
    achieved: float
    prompts: int

    def record(self) -> dict:
        """All but the stages, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stages"}


def solve(model: nn.Module, method: str | Part | Sequence, prompts: Iterable[Mapping], **options) -> Solution:
    """Find the option of a method that makes it cost `equivalent_tokens=...` or `flops_ratio=...`.

    For several methods or budgets on the same prompts make one `Solver`.

    Args:
        model: a loaded, unpatched model.
        method: as for `vlmslim.patch`, without the option to be solved; see `free_option`.
        prompts: model inputs of one prompt each, on the model's device. Where images differ in size (anyres) take
            enough of them: `keep` is then solved as a share, and meets the budget on average.
        **options: the budget; and options of the method, if it is given by name.

    Raises:
        ValueError: no budget or two, or one out of range; no option left to solve; no prompt with an image.
        BudgetError: the nearest that the method can do is off by more than 2 %.
    """
    target = {name: options.pop(name) for name in CURRENCIES if name in options}
    if isinstance(method, str):
        method = {"method": method} | options
    elif options:
        raise ValueError(f"options go with a method's name only; {sorted(options)} came with {method!r}")
    return Solver(model, prompts).solve(method, **target)


class Solver:
    """Solves budgets of many methods on the same sample prompts, whose sizes it reads off one unpatched prefill."""

    def __init__(self, model: nn.Module, prompts: Iterable[Mapping]):
        self.model, self.prompts = model, list(prompts)
        self.shape = DecoderShape.from_config(model.config)
        self.sizes: list[tuple[int, int]] = []  # images of each prompt, and their tokens
        text = 0.0
        with patch(model, "none") as slim:
            for inputs in self.prompts:
                slim.reset_receipt()
                self._prefill(inputs)
                seen = slim.receipt.summary()
                if seen["prompts"] > 1:
                    raise ValueError("each sample prompt is a batch of its own: give inputs of one row")
                if seen["images"]:
                    self.sizes.append((seen["images"], round(seen["visual_tokens"])))
                    text += seen["text_tokens"]
        if not self.sizes:
            raise ValueError("no sample prompt brings an image, so nothing can be solved; give prompts with images")
        self.text = text / len(self.sizes)

    def solve(self, method: str | Part | Sequence[str | Part], **target: float) -> Solution:
        """As `solve`; options of a method stand in its dictionary."""
        currency, wanted = check_target(target)
        parts = [method] if isinstance(method, str | dict | Compressor) else list(method)
        place, option = free_option(parts)
        values = self._values(parts[place], option)

        def stages(i: int) -> list[Part]:
            return [*parts[:place], _with_option(parts[place], option, values[i]), *parts[place + 1 :]]

        def planned(i: int) -> float:
            try:
                return self._planned(stages(i))[currency]
            except ValueError:  # too little for another stage, as 4 tokens of which FastV is to keep 16
                return -math.inf

        def measured(i: int) -> float:
            return cost_of(self._measure(stages(i)), self.shape)[currency]

        guess, expected = search_nearest(planned, len(values), wanted)
        cost = measured(guess)
        if abs(cost - expected) > 1e-6 * expected:  # the method decides something itself
            near = abs(cost - wanted) <= TOLERANCE / 4 * wanted
            if not near:
                guess, cost = search_nearest(measured, len(values), wanted, guess, MAX_PREFILLS, TOLERANCE / 4)
        if abs(cost - wanted) > TOLERANCE * wanted:
            names = "+".join(map(_name, parts))
            raise BudgetError(
                f"{names} cannot cost {currency}={wanted:g} to within {TOLERANCE:.0%}: the nearest is "
                f"{option}={values[guess]} with {cost:.4g}. Change another option of it, or its budget"
            )
        return Solution(tuple(stages(guess)), option, values[guess], target, cost, len(self.sizes))

    def _values(self, part: str | Part, option: str) -> Sequence[int | float]:
        """List the values that an option can take, cheapest first."""
        if option == "keep" and family_of(self.model).anyres:  # images differ in size
            return [i / SHARE_STEPS for i in range(1, SHARE_STEPS + 1)]
        most = max(n for _, n in self.sizes) if option == "keep" else self.shape.layers - 1
        build(_with_option(part, option, 1))  # one of anything is a setting, so this fails for other reasons only
        return [value for value in range(1, most + 1) if _accepts(part, option, value)]

    def _planned(self, stages: list[Part]) -> dict[str, float]:
        """What the sample should cost by the methods' own account."""
        built = [stage for part in stages for stage in build(part).stages()]
        built.sort(key=lambda stage: not stage.acts_before_llm)
        depth, prompts = self.shape.layers, len(self.sizes)
        total = [0] * depth
        for images, n in self.sizes:
            tokens = [n] * depth
            for stage in built:
                tokens = list(map(min, tokens, stage.visual_tokens(tokens[0], depth)))
            total = [t + images * count for t, count in zip(total, tokens, strict=True)]
        images = sum(count for count, _ in self.sizes)
        receipt = {
            "images": images,
            "prompts": prompts,
            "visual_tokens": sum(count * n for count, n in self.sizes) / images,
            "visual_tokens_per_layer": [t / prompts for t in total],
            "text_tokens": self.text,
        }
        return cost_of(receipt, self.shape)

    def _measure(self, stages: list[Part]) -> dict:
        """The receipt's summary of the sample."""
        with patch(self.model, stages) as slim:
            for inputs in self.prompts:
                self._prefill(inputs)
            return slim.receipt.summary()

    @torch.inference_mode()
    def _prefill(self, inputs: Mapping) -> None:
        self.model(**inputs, logits_to_keep=1, use_cache=False)


def check_target(target: Mapping[str, float]) -> tuple[str, float]:
    """The currency of a budget and its number.

    Raises:
        ValueError: not exactly one known currency, or a number out of range.
    """
    if len(target) != 1 or not set(target) <= set(CURRENCIES):
        raise ValueError(f"a budget is one of equivalent_tokens=64 and flops_ratio=0.15, not {dict(target)}")
    ((currency, wanted),) = target.items()
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not wanted > 0:
        raise ValueError(f"{currency}={wanted!r}: give a positive number")
    if currency == "flops_ratio" and wanted > 1:
        raise ValueError(f"flops_ratio={wanted}: a share of the unpatched model's FLOPs lies in (0, 1]")
    return currency, wanted


def free_option(parts: Sequence[str | Part]) -> tuple[int, str]:
    """Which stage, and which option of it, a budget solves: the first of its `budget_options` that is not given.

    The default is `keep`. FastV's are `keep` and `layer`: without `keep` that is solved at its layer, and with
    `keep=16` the layer is. A method object has all its options, so there the first one is solved.

    Raises:
        ValueError: every option is given, or the method has none.
    """
    for i, part in enumerate(parts):
        given = part if isinstance(part, dict) else {}
        cls = type(part) if isinstance(part, Compressor) else method_class(_name(part))
        for option in cls.budget_options:
            if option in options_of(cls) and option not in given:
                return i, option
    names = "+".join(map(_name, parts))
    raise ValueError(f"{names}: nothing is left to solve; leave out the option that the budget shall decide, as 'keep'")


def cost_of(receipt: Mapping, shape: DecoderShape) -> dict[str, float]:
    """What the mean prompt of a receipt's summary cost, in every currency.

    Args:
        receipt: `Receipt.summary()`, in which some image was seen.
        shape: of the language model.
    """
    visual, text = receipt["visual_tokens_per_layer"], receipt["text_tokens"]
    images = receipt["images"] / receipt["prompts"]
    whole = prefill_flops(shape, receipt["visual_tokens"] * images + text)
    return {
        "equivalent_tokens": equivalent_tokens(visual) / images,
        "flops_ratio": prefill_flops(shape, [count + text for count in visual]) / whole,
    }


def search_nearest(
    cost: Callable[[int], float],
    size: int,
    target: float,
    start: int | None = None,
    tries: int | None = None,
    enough: float = 0.0,
) -> tuple[int, float]:
    """The index whose cost is nearest to a target, by interpolation and then bisection.

    Args:
        cost: of an index 0 .. size - 1; it does not fall as the index grows.
        size: how many indices there are.
        target: the cost wanted.
        start: first guess; by default the middle.
        tries: calls of `cost`, at most.
        enough: relative error at which the search ends early.

    Returns:
        The index and its cost. Without `tries` and `enough` none is nearer; of equals, the lowest that was tried.
    """
    low, high = 0, size - 1
    guess = (low + high) // 2 if start is None else start
    seen: dict[int, float] = {}
    while low <= high and (tries is None or len(seen) < tries):
        seen[guess] = found = cost(guess)
        if abs(found - target) <= enough * target:
            break
        low, high = (guess + 1, high) if found < target else (low, guess - 1)
        below, above = low - 1, high + 1
        guess = (low + high) // 2
        if len(seen) < 6 and -math.inf < seen.get(below, math.inf) < seen.get(above, -math.inf):
            slope = (above - below) / (seen[above] - seen[below])
            guess = min(max(round(below + (target - seen[below]) * slope), low), high)
    best = min(sorted(seen), key=lambda i: abs(seen[i] - target))
    return best, seen[best]


def _with_option(part: str | Part, option: str, value: int | float) -> Part:
    """The part with its option at a value."""
    if isinstance(part, Compressor):
        return replace(part, **{option: value})
    return ({"method": part} if isinstance(part, str) else part) | {option: value}


def _accepts(part: str | Part, option: str, value: int) -> bool:
    """Whether the method takes this value: some take squares only."""
    try:
        build(_with_option(part, option, value))
    except ValueError:
        return False
    return True


def _name(part: str | Part) -> str:
    if isinstance(part, Compressor):
        return type(part).__name__
    return part["method"] if isinstance(part, dict) else part
