"""Equal budgets: find the option of each method with which all of them cost the same.

    solved = solve(model, "fastv", prompts, equivalent_tokens=64, layer=3)
    vlmslim.patch(model, solved.stages)

The same `keep` is no fair budget: FastV that keeps 64 tokens from layer 2 on, DivPrune that keeps 64 from the start and
ToDRE that drops its 64 near the end cost differently. A budget is a cost in one of three currencies:

equivalent_tokens : visual tokens of an image, averaged over the decoder layers. For a method that acts before the
                    language model this is the number of tokens it keeps.
flops_ratio       : prefill FLOPs of the language model, over those of the unpatched model on the same prompts. Text
                    tokens count on both sides. A multiply-add is 2 FLOPs, the MLP has three matrices, and attention
                    counts in full. Vision tower, projector, LM head and the method's own work do not count. This is the
                    ratio of the mean prompt, as in the leaderboard.
ttft_ratio        : time to first token over the unpatched model's, measured on this machine with the vision tower and
                    the method's own work; the median over sample prompts and repetitions.

The first two are read off the receipt of a prefill of sample prompts, so they include what a method decides by itself.

A fourth budget is no cost, but is solved in the same way:

auto              : the mean of budgets that each image has for itself, by the effective rank of its features. The rank
                    of an average image is solved so that the mean is met: `keep={"auto": 64, "average": 31.5}`.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch

from vlmslim.compressor import Compressed, Compressor, ImageTokens, Keep, check_keep, resolve_keep
from vlmslim.cost.flops import DecoderShape, equivalent_tokens, prefill_flops
from vlmslim.cost.search import search_nearest
from vlmslim.cost.timing import measure_together, summarise
from vlmslim.engine.families import family_of
from vlmslim.ops.effective_rank import adapted, solve_average
from vlmslim.patching import patch
from vlmslim.registry import Spec, build, method_class, options_of

CURRENCIES = ("equivalent_tokens", "flops_ratio", "ttft_ratio", "auto")
TOLERANCE = 0.02  # of the cost
TIME_TOLERANCE = 0.05  # of a cost that is a time, which is never the same twice
MAX_PREFILLS = 12  # prefills of all sample prompts, for a method that decides by itself
TIMED_PROMPTS, TIMED_ROUNDS = 4, 3  # for a cost that is a time
SHARE_STEPS = 100_000  # values of `keep` between 0 and 1

Solved: TypeAlias = dict[str, Any] | Compressor


class BudgetError(ValueError):
    """No value of the option meets the cost; the message names the nearest value."""


@dataclass(frozen=True)
class Solution:
    """A method that meets a cost.

    stages   : the method, for `vlmslim.patch`
    option   : the option that was solved, and its `value`
    target   : the cost asked for: currency -> number
    achieved : the cost of the sample prompts, in the same currency
    prompts  : number of sample prompts with images
    """

    stages: tuple[Solved, ...]
    option: str
    value: Keep
    target: dict[str, float]
    achieved: float
    prompts: int

    def record(self) -> dict[str, Any]:
        """Return all fields except the stages, ready for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "stages"}


def solve(model: Any, method: "Spec | Sequence[Spec]", prompts: Iterable[Mapping], **options: Any) -> Solution:
    """Find the option of a method with which it costs `equivalent_tokens=...`, `flops_ratio=...` or `ttft_ratio=...`.

    With `auto=64` or `auto=0.25`, find the budgets of each image's own that have this mean.

    For several methods or budgets on the same prompts, make one `Solver`.

    Args:
        model: a loaded, unpatched model.
        method: as for `vlmslim.patch`, without the option to solve; see `free_option`.
        prompts: model inputs of one prompt each, on the model's device. If images differ in size (anyres), give enough
            of them, because `keep` is then solved as a share that meets the budget on average.
        **options: the budget, and options of a method that is given by name.

    Raises:
        ValueError: no budget or two, or one out of range; no option left to solve; no prompt with an image.
        BudgetError: the nearest cost of the method is off by more than 2 %, or 5 % of a time.
    """
    target = {name: options.pop(name) for name in CURRENCIES if name in options}
    if isinstance(method, str):
        method = {"method": method} | options
    elif options:
        raise ValueError(f"options go with a method's name only; {sorted(options)} came with {method!r}")
    return Solver(model, prompts).solve(method, **target)


class Solver:
    """Solves budgets of many methods on the same sample prompts; one unpatched prefill gives the sizes of the images.

    Args:
        model: a loaded, unpatched model.
        prompts: model inputs of one prompt each.
        time: takes stages and returns the time to first token over the unpatched model's; by default it is measured.

    Raises:
        ValueError: no sample prompt has an image, or one is a batch of several rows.
    """

    def __init__(self, model: Any, prompts: Iterable[Mapping], time: Callable[[list[Solved]], float] | None = None):
        self.model, self.prompts = model, list(prompts)
        self._time = time or self._measure_time
        self._pictured: list[Mapping] = []
        self.shape = DecoderShape.from_config(model.config)
        self.sizes: list[tuple[int, int]] = []  # of each prompt with images: images, and visual tokens of an image
        text = 0.0
        with patch(model, "none") as slim:
            for inputs in self.prompts:
                slim.reset_receipt()
                self._prefill(inputs)
                summary = slim.receipt.summary()
                if summary["prompts"] > 1:
                    raise ValueError("a sample prompt has several rows: give inputs of one row each")
                if summary["images"]:
                    self._pictured.append(inputs)
                    self.sizes.append((summary["images"], round(summary["visual_tokens"])))
                    text += summary["text_tokens"]
        if not self.sizes:
            raise ValueError("no sample prompt has an image, so nothing can be solved; give prompts with images")
        self.text = text / len(self.sizes)

    def solve(self, method: "Spec | Sequence[Spec]", **target: float) -> Solution:
        """Find the option of a method with which it meets a cost, see `solve`; options are in the method's dictionary.

        The methods' own account of their tokens gives a first value, without a prefill. If a prefill shows another
        cost, the method decides something by itself, and the search goes on with prefills.
        """
        currency, wanted = check_target(target)
        methods = [method] if isinstance(method, str | dict | Compressor) else method
        specs = [{"method": spec} if isinstance(spec, str) else spec for spec in methods]
        solved, option = free_option(specs)
        if currency == "auto":
            return self._solve_auto(specs, solved, option, wanted)
        values = self._values(specs[solved], option)

        def stages(i: int) -> list[Solved]:
            changed = _with_option(specs[solved], option, values[i])
            return [*specs[:solved], changed, *specs[solved + 1 :]]

        def planned(i: int) -> float:
            try:
                return self._planned(stages(i))["flops_ratio" if currency == "ttft_ratio" else currency]
            except ValueError:  # too few tokens for another stage: FastV cannot keep 16 of 4
                return -math.inf

        def measured(i: int) -> float:
            return cost_of(self._measure(stages(i)), self.shape)[currency]

        def timed(i: int) -> float:
            return -math.inf if planned(i) == -math.inf else self._time(stages(i))

        guess, expected = search_nearest(planned, len(values), wanted)
        tolerance = TIME_TOLERANCE if currency == "ttft_ratio" else TOLERANCE
        if currency == "ttft_ratio":  # the FLOPs of the language model are a first guess
            guess, cost = search_nearest(timed, len(values), wanted, guess, MAX_PREFILLS, tolerance / 4)
        else:
            cost = measured(guess)
            decides = abs(cost - expected) > 1e-6 * expected
            if decides and abs(cost - wanted) > tolerance / 4 * wanted:
                guess, cost = search_nearest(measured, len(values), wanted, guess, MAX_PREFILLS, tolerance / 4)
        if abs(cost - wanted) > tolerance * wanted:
            raise BudgetError(
                f"{_names(specs)} cannot cost {currency}={wanted:g} to within {tolerance:.0%}: the nearest is "
                f"{option}={values[guess]} with {cost:.4g}. Change another option of it, or its budget"
            )
        return Solution(tuple(stages(guess)), option, values[guess], target, cost, len(self.sizes))

    def _solve_auto(self, specs: list[dict | Compressor], solved: int, option: str, mean: Keep) -> Solution:
        """Find the effective rank of an average image, with which each image's own budgets have a mean.

        Raises:
            ValueError: the budget that is free is not `keep`, or the method cannot have budgets of each image's own.
            BudgetError: the mean is that of no budgets between half and twice of it.
        """
        if option != "keep":
            raise ValueError(
                f"{_names(specs)}: auto={mean} is a budget of 'keep', and {option!r} is what is left to solve"
            )
        images = self._ranks
        budgets, sizes = [resolve_keep(mean, n) for n, _ in images], [n for n, _ in images]
        average = float(f"{solve_average(budgets, sizes, [rank for _, rank in images]):.6g}")
        value: Keep = {"auto": mean, "average": average}  # type: ignore[dict-item]
        stages = [*specs[:solved], _with_option(specs[solved], option, value), *specs[solved + 1 :]]
        kept = [adapted(k, n, rank, average) for k, (n, rank) in zip(budgets, images, strict=True)]
        achieved, wanted = sum(kept) / len(kept), sum(budgets) / len(budgets)
        if abs(achieved - wanted) > max(TOLERANCE * wanted, 0.5):  # budgets are whole numbers
            raise BudgetError(
                f"{_names(specs)} cannot keep {mean} visual tokens on average, each image by its effective rank: the "
                f"nearest mean is {achieved:.4g} tokens. Give another mean, or more sample prompts"
            )
        with patch(self.model, stages):  # refuses what cannot have such budgets
            pass
        return Solution(tuple(stages), option, value, {"auto": mean}, achieved, len(self.sizes))  # type: ignore[dict-item]

    @cached_property
    def _ranks(self) -> list[tuple[int, float]]:
        """The tokens and the effective rank of each image of the sample prompts."""
        seen = _Ranks()
        with patch(self.model, seen):
            for inputs in self._pictured:
                self._prefill(inputs)
        return seen.found

    def _measure_time(self, stages: list[Solved]) -> float:
        """Measure the time to first token of some sample prompts over the unpatched model's, interleaved."""
        attach: dict[str, Callable[[], AbstractContextManager]] = {
            "unpatched": nullcontext,
            "patched": partial(patch, self.model, stages),
        }
        prompts = self._pictured[:TIMED_PROMPTS]
        times = measure_together(self.model, attach, prompts, new_tokens=2, repeats=TIMED_ROUNDS)
        return summarise(times["patched"], times["unpatched"])["ttft_ratio"]

    def _values(self, spec: Spec, option: str) -> Sequence[int | float]:
        """List the values that an option can take, cheapest first."""
        if option == "keep" and family_of(self.model).anyres:  # images differ in size
            return [i / SHARE_STEPS for i in range(1, SHARE_STEPS + 1)]
        most = max(n for _, n in self.sizes) if option == "keep" else self.shape.layers - 1
        build(_with_option(spec, option, 1))  # every option takes 1, so this refuses the other options only
        return [value for value in range(1, most + 1) if _accepts(spec, option, value)]

    def _planned(self, stages: Sequence[Spec]) -> dict[str, float]:
        """Compute the cost of the sample from the methods' own account of their tokens."""
        built = [stage for spec in stages for stage in build(spec).stages()]
        built.sort(key=lambda stage: not stage.acts_before_llm)
        depth, prompts = self.shape.layers, len(self.sizes)
        total = [0] * depth
        for images, n in self.sizes:
            tokens = [n] * depth
            for stage in built:
                tokens = list(map(min, tokens, stage.visual_tokens(tokens[0], depth)))
            total = [t + images * count for t, count in zip(total, tokens, strict=True)]
        images = sum(count for count, _ in self.sizes)
        summary = {
            "images": images,
            "prompts": prompts,
            "visual_tokens": sum(count * n for count, n in self.sizes) / images,
            "visual_tokens_per_layer": [t / prompts for t in total],
            "text_tokens": self.text,
        }
        return cost_of(summary, self.shape)

    def _measure(self, stages: Sequence[Spec]) -> dict[str, Any]:
        """Prefill the sample prompts under a method and return the summary of its receipt."""
        with patch(self.model, stages) as slim:
            for inputs in self.prompts:
                self._prefill(inputs)
            return slim.receipt.summary()

    @torch.inference_mode()
    def _prefill(self, inputs: Mapping) -> None:
        self.model(**inputs, logits_to_keep=1, use_cache=False)


@dataclass
class _Ranks(Compressor):
    """Keeps every token, and notes how many there are and how complex their image is."""

    found: list[tuple[int, float]] = field(default_factory=list)

    def compress(self, image: ImageTokens) -> Compressed:
        """Keep everything."""
        self.found.append((len(image.features), image.effective_rank))
        return image.pick_all()


def check_target(target: Mapping[str, float]) -> tuple[str, float]:
    """Return the currency of a budget and its number.

    Raises:
        ValueError: not exactly one known currency, or a number out of range.
    """
    if len(target) != 1 or not set(target) <= set(CURRENCIES):
        raise ValueError(
            f"a budget is one of equivalent_tokens=64, flops_ratio=0.15, ttft_ratio=0.5 and auto=64, not {dict(target)}"
        )
    ((currency, wanted),) = target.items()
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not wanted > 0:
        raise ValueError(f"{currency}={wanted!r}: give a positive number")
    if currency.endswith("_ratio") and wanted > 1:
        what = "FLOPs" if currency == "flops_ratio" else "time to first token"
        raise ValueError(f"{currency}={wanted}: a share of the unpatched model's {what} lies in (0, 1]")
    if currency == "auto":
        check_keep(wanted, "auto")
    return currency, wanted


def free_option(methods: Sequence[Spec]) -> tuple[int, str]:
    """Return which of several methods a budget solves, and its option: the first of `budget_options` that is not given.

    The default is `keep`. FastV has `keep` and `layer`: without `keep` a budget solves `keep`, and with `keep=16` it
    solves `layer`. A method object has a value for each option, so a budget replaces its first one.

    Raises:
        ValueError: every option is given, or the methods have none that a budget can solve.
    """
    for i, spec in enumerate(methods):
        given = spec if isinstance(spec, dict) else {}
        cls = type(spec) if isinstance(spec, Compressor) else method_class(_name(spec))
        for option in cls.budget_options:
            if option in options_of(cls) and option not in given:
                return i, option
    raise ValueError(
        f"{_names(methods)}: nothing is left to solve; leave out the option that the budget decides, such as 'keep'"
    )


def cost_of(receipt: Mapping[str, Any], shape: DecoderShape) -> dict[str, float]:
    """Compute the cost of the mean prompt of a receipt, in the currencies that a receipt tells.

    Args:
        receipt: `Receipt.summary()` of at least one prompt with an image.
        shape: sizes of the language model.
    """
    visual, text = receipt["visual_tokens_per_layer"], receipt["text_tokens"]
    images = receipt["images"] / receipt["prompts"]
    unpatched = prefill_flops(shape, receipt["visual_tokens"] * images + text)
    return {
        "equivalent_tokens": equivalent_tokens(visual) / images,
        "flops_ratio": prefill_flops(shape, [count + text for count in visual]) / unpatched,
    }


def _with_option(spec: Spec, option: str, value: Keep) -> Solved:
    """Set one option of a method."""
    changed: dict[str, Any] = {option: value}
    if isinstance(spec, Compressor):
        return replace(spec, **changed)
    return ({"method": spec} if isinstance(spec, str) else spec) | changed


def _accepts(spec: Spec, option: str, value: int) -> bool:
    """Return whether a method takes this value of an option, because some methods take squares only."""
    try:
        build(_with_option(spec, option, value))
    except ValueError:
        return False
    return True


def _name(spec: Spec) -> str:
    if isinstance(spec, Compressor):
        return type(spec).__name__
    return spec["method"] if isinstance(spec, dict) else spec


def _names(specs: Sequence[Spec]) -> str:
    return "+".join(map(_name, specs))
