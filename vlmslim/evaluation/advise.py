"""`vlmslim advise`: find the method and the budget for a goal on a checkpoint, by a race on a few questions."""

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import yaml

from vlmslim.evaluation.config import RunConfig, validated
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.harness import Harness, Sample
from vlmslim.evaluation.progress import Display
from vlmslim.evaluation.race import Race
from vlmslim.evaluation.schema import TimingConfig
from vlmslim.evaluation.variants import Variant
from vlmslim.io import provenance
from vlmslim.io.messages import one_line
from vlmslim.leaderboard.board import UNPATCHED
from vlmslim.leaderboard.comparison import compare
from vlmslim.leaderboard.samples import ScoredTask, UnscoredTask, question_score, read_task, source_of
from vlmslim.leaderboard.scores import Estimate, metric_of
from vlmslim.leaderboard.task_groups import group_of
from vlmslim.registry import options_of

METHODS = ("divprune", "mmr", "scope", "visionzip", "fastv", "uniform")  # of different kinds, none of them trained
BUDGETS = (0.5, 0.25, 0.11)
POSITIONS = ("renumbered", "original")


@dataclass(frozen=True)
class Goal:
    """A goal of the race: one of the two is given.

    target : share of the unpatched model's average that a row has to reach, as cheaply as possible
    ttft   : most time to first token, as a share of the unpatched model's, with the best average
    """

    target: float | None = None
    ttft: float | None = None

    def __str__(self) -> str:
        if self.target is not None:
            return f"at least {self.target:.1%} of the unpatched score, as cheap as possible"
        return f"the best score at a TTFT of at most {self.ttft:g}x of the unpatched model's"


def parse_goal(target: str | None, ttft: float | None) -> Goal:
    """Read the goal as the command line writes it.

    Raises:
        ConfigError: not exactly one of the two is given, or it is no share between 0 and 1.
    """
    if (target is None) == (ttft is None):
        raise ConfigError('give one of --target "98% of unpatched" and --ttft 0.5')
    if target is None:
        if not 0 < (ttft or 0) <= 1:
            raise ConfigError(f"--ttft {ttft}: give a share of the unpatched model's TTFT, such as 0.5")
        return Goal(ttft=ttft)
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*(%?)\s*(?:of unpatched)?\s*", target)
    share = float(found[1]) / (100 if found[2] else 1) if found else 0.0
    if not 0 < share <= 1:
        raise ConfigError(f'--target {target!r}: give a share of the unpatched score, such as "98% of unpatched"')
    return Goal(target=share)


@dataclass(frozen=True)
class Settings:
    """Settings of the race.

    limit : questions of each task on the full board, from which the race draws
    share : most answers to ask for, as a share of the full board's
    level : most probable error of the rows that are dropped
    """

    limit: int | None = 100
    share: float = 0.25
    level: float = 0.05
    batch_size: int = 8
    seed: int = 0


@dataclass
class Advice:
    """The choice of the race, and how sure it is.

    chosen    : None if no row reaches the goal
    score     : average in shares of the unpatched model's, with its interval
    predicted : FLOPs of a prefill, tower included, as a share of the unpatched model's
    times     : of the unpatched model and of the chosen row, as the harness measures them
    asked, full : answers asked for, and those of the full board
    dropped   : rows that cannot win
    open      : rows that the race did not separate from the chosen one, with their estimates
    config    : YAML for `vlmslim run`
    """

    goal: Goal
    checkpoint: str
    tasks: list[str]
    level: float
    chosen: Variant | None = None
    score: Estimate | None = None
    predicted: float = 1.0
    times: dict[str, dict] = field(default_factory=dict)
    hardware: str = ""
    asked: int = 0
    full: int = 0
    rows: int = 0
    dropped: int = 0
    open: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    config: str = ""

    def text(self) -> str:
        """Write the advice for the terminal; the configuration comes last."""
        lines = [f"{self.checkpoint} on {', '.join(self.tasks)}: {self.goal}"]
        open_rows = ", ".join(f"{label} ({value:.1%})" for label, value in self.open.items())
        if self.chosen is None:
            lines.append("choice    none: no row reaches the goal")
            lines += [f"nearest   {open_rows}"] if open_rows else []
        else:
            (stage,), score, own = self.chosen.stages, self.score, self.times[self.chosen.label]
            options = ", ".join(f"{name}={value}" for name, value in stage.items() if name not in ("method", "keep"))
            ends = "" if score is None or score.low is None else f", 95 % interval {score.low:.1%} to {score.high:.1%}"
            lines += [
                f"choice    {self.chosen.label}",
                f"method    {stage['method']}" + (f" ({options})" if options else ""),
                f"budget    keep={stage['keep']}",
                f"score     {score.value if score else float('nan'):.1%} of the unpatched model's{ends}",
                f"predicted {self.predicted:.2f}x of the unpatched prefill's FLOPs, tower included",
                f"measured  TTFT {own['ttft_ms']:.1f} ms, {own['ttft_ratio']:.2f}x of the unpatched model's, on "
                f"{self.hardware}",
            ]
            lines += [f"in doubt  {open_rows}"] if open_rows else []
        lines += [
            f"asked     {self.asked} answers; the full board of {self.rows} rows would take {self.full} "
            f"({self.asked / self.full:.0%})",
            f"dropped   {self.dropped} of {self.rows} rows; the row that wins on the full board is dropped with a "
            f"probability of at most {self.level:.0%}",
            *(f"skipped   {line}" for line in self.skipped),
        ]
        return "\n".join(lines) + "\n" + (f"\n{self.config}" if self.config else "")


def candidates(methods: Sequence[dict], budgets: Sequence[float | int]) -> list[dict]:
    """Return entries for a configuration: every method at every budget, with both positions where it has them."""
    entries = []
    for method in methods:
        name, own = method["method"], {"keep": list(budgets)} | method
        if "positions" in options_of(name) and "positions" not in method:
            entries += [own | {"positions": positions, "label": f"{name}-{positions}"} for positions in POSITIONS]
        else:
            entries.append(own)
    return entries


def advise(
    model: dict[str, Any],
    tasks: Sequence[str],
    goal: Goal,
    *,
    methods: Sequence[dict] | None = None,
    budgets: Sequence[float | int] = BUDGETS,
    settings: Settings | None = None,
    display: Display | None = None,
    harness: Callable[..., Any] | None = None,
) -> Advice:
    """Race methods and budgets on a checkpoint.

    Args:
        model: the entry `model` of a configuration of `vlmslim run`.
        tasks: lmms-eval tasks or groups, whose questions have scores between 0 and 1.
        goal: what to look for.
        methods: as dictionaries with the key "method" and options; by default `METHODS`.
        budgets: visual tokens to keep, counts or shares.
        settings: how the race is run.
        display: shows progress.
        harness: makes what evaluates questions; by default `Harness`.

    Raises:
        ConfigError: the checkpoint, a task, a method or an option does not exist; a task's questions have no scores
            between 0 and 1; or the race would be too short to tell anything.
    """
    entries = candidates(methods or [{"method": name} for name in METHODS], budgets)
    settings = settings or Settings()
    for name, value in (("share", settings.share), ("error", settings.level)):
        if not 0 < value < 1:
            raise ConfigError(f"--{name} {value:g}: give a number between 0 and 1")
    with tempfile.TemporaryDirectory() as scratch:
        config = validated(
            {
                "model": model,
                "tasks": list(tasks),
                "methods": entries,
                "baselines": False,
                "batch_size": settings.batch_size,
                "seed": settings.seed,
                "limit": settings.limit,
                "output": scratch,
            }
        )
        return _Advisor(config, goal, settings, display or Display(), harness or Harness, methods is None).complete()


class _Advisor:
    """One call of `advise`."""

    def __init__(self, config: RunConfig, goal: Goal, settings: Settings, display: Display, make: Any, may_skip: bool):
        self.config, self.goal, self.settings, self.display = config, goal, settings, display
        self.base, *self.variants = config.variants()
        self.may_skip = may_skip
        self.harness = make(config, display.bar)
        self.harness.describe_checkpoint()
        self.tasks = [leaf.task for leaf in self.harness.tasks.leaves]
        self.advice = Advice(goal, config.model.pretrained, self.tasks, settings.level)
        self.samples: dict[str, dict[str, list[dict]]] = {}  # label -> task -> answers, in the order of the race

    def complete(self) -> Advice:
        """Race, then time the row that won."""
        self.harness.load()
        self._attach()
        self.sizes = self.harness.shuffle()
        self._ask_unpatched()
        flops = self._flops()
        costs = np.array([own["language_model"] + own["method"] for own in flops[1:]])
        self.labels = [UNPATCHED, *(variant.label for variant in self.variants)]
        if self.goal.ttft is not None:
            costs = self._fast_enough(costs)
        race = self._race(costs)
        chosen = race.best()
        open_rows = [row for row in race.left if row != chosen and len(race.scores[row])]
        self.advice.open = {self.variants[row].label: race.estimate(row) for row in open_rows}
        self.advice.dropped += int(race.dropped.sum())
        self.advice.asked = int(race.asked.sum()) + sum(self.sizes.values())
        if chosen is not None:
            self._describe(self.variants[chosen], race, chosen, flops)
        return self.advice

    def _attach(self) -> None:
        """Leave out default methods that do not work on the checkpoint; refuse such methods if the user named them."""
        for variant in list(self.variants):
            try:
                self.harness.check_method(variant)
            except Exception as error:  # a method may raise anything; the advice or the refusal says it
                line = f"{variant.label}: {one_line(error)}"
                if not self.may_skip:
                    raise ConfigError(line) from error
                self.advice.skipped.append(line)
                self.variants.remove(variant)
        if not self.variants:
            raise ConfigError(f"no method can be attached to {self.config.model.pretrained}; name one with --method")

    def _ask_unpatched(self) -> None:
        """Ask the unpatched model all questions: its scores are the unit of all others."""
        self.metrics: dict[str, str] = {}
        self.sources: dict[str, str] = {}
        self.samples[UNPATCHED] = {}
        for leaf in self.harness.tasks.leaves:
            cell = self.harness.ask(self.base, leaf.task, Sample(0, self.sizes[leaf.task]))
            record = {"lmms_eval": cell.results}
            self.metrics[leaf.task], higher = metric_of(record, leaf.task, leaf.metric)
            self.sources[leaf.task] = source_of(record, leaf.task)
            self.samples[UNPATCHED][leaf.task] = cell.samples
            scores = self._scores(cell.samples, leaf.task)
            if not higher or (scores < 0).any() or (scores > 1).any():
                raise ConfigError(
                    f"tasks: {leaf.task} scores its questions by {self.metrics[leaf.task]}, which is no number between "
                    "0 and 1 where higher is better; advise needs such scores, so leave the task out"
                )
        names = np.repeat(self.tasks, [self.sizes[task] for task in self.tasks])
        self.order = np.random.default_rng(self.settings.seed).permutation(names)
        base = {task: self._scores(own, task) for task, own in self.samples[UNPATCHED].items()}
        told = [task for task in self.tasks if base[task].any()]  # the others say nothing about relative scores
        if not told:
            raise ConfigError("tasks: the unpatched model answers no question, so there is nothing to compare with")
        worth = {task: len(names) / len(told) / base[task].sum() if task in told else 0.0 for task in self.tasks}
        self.values = np.array([worth[task] for task in self.order])
        self.base_scores = self._in_order({task: iter(scores) for task, scores in base.items()}, self.order)

    def _scores(self, samples: list[dict], task: str) -> np.ndarray:
        scores = [question_score(sample, self.metrics[task]) for sample in samples]
        if any(score is None for score in scores):
            raise ConfigError(f"tasks: the questions of {task} have no scores of their own; leave the task out")
        return np.array(scores, dtype=float)

    @staticmethod
    def _in_order(scores: dict[str, Any], order: Any) -> np.ndarray:
        """Return the scores of questions in the order of the race, which mixes the tasks."""
        return np.array([next(scores[task]) for task in order])

    def _flops(self) -> list[dict[str, float]]:
        """Count the FLOPs of a prefill of each row by part, averaged over the tasks. The unpatched model is first."""
        rows = [self.base, *self.variants]
        by_task = [[self.harness.flops(variant, task) for variant in rows] for task in self.tasks]
        return [
            {part: float(np.mean([count[part] for count in counts])) for part in counts[0]}
            for counts in zip(*by_task, strict=True)
        ]

    def _fast_enough(self, costs: np.ndarray) -> np.ndarray:
        """Time all rows, and leave those in that are fast enough. Returns their costs."""
        timing = TimingConfig(prompts=2, repeats=3, new_tokens=2)
        times = self.harness.time([self.base, *self.variants], timing, lambda: None)
        ratios = np.array([times[variant.label]["ttft_ratio"] for variant in self.variants])
        fast = ratios <= self.goal.ttft
        self.advice.rows, self.advice.dropped = len(self.variants), int((~fast).sum())
        if not fast.any():
            nearest = int(ratios.argmin())
            raise ConfigError(
                f"ttft: no row takes at most {self.goal.ttft:g}x of the unpatched model's TTFT here; the fastest is "
                f"{self.variants[nearest].label} with {ratios[nearest]:.2f}x"
            )
        self.variants = [variant for variant, one in zip(self.variants, fast, strict=True) if one]
        return costs[fast]

    def _race(self, costs: np.ndarray) -> Race:
        """Ask until the race ends."""
        questions = len(self.order)
        self.advice.rows = self.advice.rows or len(self.variants)
        self.advice.full = (self.advice.rows + 1) * questions
        most = int(self.settings.share * self.advice.full) - questions
        block = max(8, questions // 20)
        if most < 2 * block:
            raise ConfigError(
                f"share: {self.settings.share:g} of the full board's {self.advice.full} answers leaves too few after "
                "the unpatched model's; give a larger --share, or more methods and budgets"
            )
        race = Race(self.values, self.base_scores, costs, self.goal.target, self.settings.level, most, block)
        self.display.start(most // block, 0, max(len(variant.label) for variant in self.variants))
        while (row := race.next_row()) is not None:
            first = len(race.scores[row])
            race.add(row, self._ask(self.variants[row], first, min(first + block, questions)))
        return race

    def _ask(self, variant: Variant, first: int, last: int) -> np.ndarray:
        """Ask a row its next questions. Returns their scores, in the order of the race."""
        own = self.samples.setdefault(variant.label, {task: [] for task in self.tasks})
        new: dict[str, Any] = {}
        for task in dict.fromkeys(self.order[first:last]):
            before, count = len(own[task]), int((self.order[first:last] == task).sum())
            self.display.start_cell(variant.label, str(task))
            samples = self.harness.ask(variant, str(task), Sample(before, count)).samples
            own[task] += samples
            new[task] = iter(self._scores(samples, task))
        self.display.finish_cell()
        return self._in_order(new, self.order[first:last])

    def _describe(self, variant: Variant, race: Race, row: int, flops: list[dict[str, float]]) -> None:
        """Say what was chosen: its score, its cost, its times, and how to run it."""
        advice = self.advice
        advice.chosen = variant
        advice.score = Estimate(race.estimate(row), *self._interval(variant.label))
        whole = {name: sum(own.values()) for name, own in zip(self.labels, flops, strict=True)}
        advice.predicted = whole[variant.label] / whole[UNPATCHED]
        advice.times = self.harness.time([self.base, variant], TimingConfig(), lambda: None)
        advice.hardware = provenance.hardware(self.config.model.device)
        entry = {name: value for name, value in variant.stages[0].items() if name != "seed"}
        advice.config = yaml.safe_dump(
            {
                "model": self.config.model.arguments(),
                "tasks": [task.task for task in self.config.tasks],
                "methods": [entry],
                "batch_size": self.settings.batch_size,
                "seed": self.settings.seed,
                "output": "runs/advice",
            },
            sort_keys=False,
        )

    def _interval(self, label: str) -> tuple[float | None, float | None]:
        """Return the board's interval of a row's average, on the questions that the row was asked."""
        answers: list[ScoredTask | UnscoredTask] = []
        for task in self.tasks:
            own = self.samples[label][task]
            if own:
                both = {UNPATCHED: self.samples[UNPATCHED][task][: len(own)], label: own}
                answers.append(read_task(task, both, self.metrics[task], True, self.sources[task]))
        groups = {task.task: group_of(task.task) for task in answers}
        return compare(answers, [[label]], UNPATCHED, groups).relative.get(label, (None, None))
