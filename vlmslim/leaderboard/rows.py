"""One row of the leaderboard: a method at one budget, with its cost, read from its cells."""

import statistics
from dataclasses import dataclass, field, fields

from vlmslim.cost.flops import DecoderShape, prefill_flops
from vlmslim.evaluation.store import timing_key
from vlmslim.leaderboard.comparison import Stability
from vlmslim.leaderboard.scores import Estimate, Score

UNPATCHED = "none"  # label of the row without a method

#: What cells record about their origin. Only trained methods have weights, only files of other authors versions.
PROVENANCE = ("config_hash", "seed", "versions", "git_commit", "method_versions", "hardware", "weights")


@dataclass(frozen=True)
class Cost:
    """Cost of a prompt, averaged over the images or prompts of all tasks.

    requested  : visual tokens that the budget asks for, per image; None where the method decides
    kept       : visual tokens that enter the language model, per image
    kept_low, kept_high : fewest and most visual tokens that an image keeps; None in old receipts
    last       : visual tokens left in the last decoder layer, per image
    equivalent : visual tokens of a prompt, averaged over the decoder layers
    flops      : analytic prefill FLOPs of the language model
    method_flops : FLOPs of the methods' own matrix products, counted on some prompts of each task; None in old cells
    kv_bytes   : bytes of the prompt's KV cache
    selection_ms : milliseconds that the methods took, per prompt of the evaluation; None in old receipts
    positions  : "renumbered" or "original", as the language model sees them
    """

    requested: float | None
    kept: float
    kept_low: int | None
    kept_high: int | None
    last: float
    equivalent: float
    flops: float
    kv_bytes: float
    selection_ms: float | None
    positions: str
    method_flops: float | None = None

    @property
    def nominal(self) -> float:
        """Visual tokens per image as papers count them: those that the budget asks for, else those that enter."""
        return self.kept if self.requested is None else self.requested

    @property
    def work(self) -> float:
        """FLOPs of the language model and, where they are known, of the methods."""
        return self.flops + (self.method_flops or 0.0)

    @classmethod
    def read(cls, cells: list[dict], shape: DecoderShape) -> "Cost | None":
        """Average what a row's cells record; None if they count no image."""
        receipts = [cell["receipt"] for cell in cells]
        images, prompts = sum(r["images"] for r in receipts), sum(r["prompts"] for r in receipts)
        if not images or not prompts:
            return None

        def per_image(key: str, receipts: list[dict]) -> float:
            return sum(r[key] * r["images"] for r in receipts) / sum(r["images"] for r in receipts)

        def per_prompt(values: list[float]) -> float:
            return sum(v * r["prompts"] for v, r in zip(values, receipts, strict=True)) / prompts

        seen = [r for r in receipts if r["images"]]
        budgeted = [r for r in seen if r["requested"] is not None]
        ranges = [r["kept_range"] for r in seen if "kept_range" in r]
        known = len(ranges) == len(seen)
        lengths = [[v + r["text_tokens"] for v in r["visual_tokens_per_layer"]] for r in receipts]
        timed = all("selection_ms" in r for r in receipts)
        own = [cell["method_flops"] for cell in cells if "method_flops" in cell]
        return cls(
            requested=per_image("requested", budgeted) if budgeted else None,
            kept=per_image("kept", seen),
            kept_low=min(low for low, _ in ranges) if known else None,
            kept_high=max(high for _, high in ranges) if known else None,
            last=per_prompt([r["visual_tokens_per_layer"][-1] for r in receipts]) * prompts / images,
            equivalent=per_prompt([r["equivalent_tokens"] for r in receipts]),
            flops=per_prompt([prefill_flops(shape, length) for length in lengths]),
            kv_bytes=per_prompt([r["kv_bytes"] for r in receipts]),
            selection_ms=per_prompt([r["selection_ms"] for r in receipts]) if timed else None,
            positions=", ".join(sorted({r["positions"] for r in receipts})),
            method_flops=per_prompt(own) if len(own) == len(cells) else None,
        )


@dataclass(frozen=True)
class StageActivity:
    """Prompts of all tasks on which one stage of a row acted.

    name      : the stage's method
    layers    : decoder layers at which the stage acts; empty before the language model
    acted     : prompts in which the stage dropped or merged at least one visual token
    prompts   : prompts that the stage saw
    decides   : whether the stage decides itself how many tokens it drops, so that it may drop none
    keeps_all : whether the stage was asked to keep all tokens
    """

    name: str
    layers: list[int]
    acted: int
    prompts: int
    decides: bool
    keeps_all: bool

    @classmethod
    def read(cls, receipts: list[dict]) -> "list[StageActivity]":
        """Add up the receipts of a row's cells, stage by stage; old receipts do not record their stages."""
        recorded = [receipt["stages"] for receipt in receipts if "stages" in receipt]
        return [
            cls(
                name=stage[0]["name"],
                layers=stage[0]["layers"],
                acted=sum(one["acted"] for one in stage),
                prompts=sum(one["prompts"] for one in stage),
                decides=any(one["decides"] for one in stage),
                keeps_all=all(one["keeps_all"] for one in stage),
            )
            for stage in zip(*recorded, strict=True)
        ]

    @property
    def never_acted(self) -> bool:
        """True if the stage dropped nothing, although it was not asked to keep all tokens."""
        return self.acted == 0 < self.prompts and not self.keeps_all


@dataclass(frozen=True)
class Solved:
    """A budget that is a cost, such as {"equivalent_tokens": 64}.

    solution : the option that was solved on sample prompts, as `Solution.record()` writes it
    spent, spent_low, spent_high : the cost of the tasks: mean, lowest and highest. A time is measured on prompts of all
                                   tasks together; None where the row was not timed
    """

    solution: dict
    spent: float | None
    spent_low: float | None
    spent_high: float | None

    @classmethod
    def read(cls, budgets: list[dict], ttft_ratio: float | None) -> "Solved | None":
        """Read the records of a row's cells; None if there are none."""
        if not budgets:
            return None
        solution = {name: value for name, value in budgets[0].items() if name != "spent"}
        spent = [budget["spent"] for budget in budgets]
        if "ttft_ratio" in solution["target"]:
            return cls(solution, ttft_ratio, ttft_ratio, ttft_ratio)
        return cls(solution, statistics.fmean(spent), min(spent), max(spent))

    def text(self, digits: str = "") -> str:
        """Write the option as a user writes it: keep=11, or average=31.5 of budgets that each image has for itself."""
        option, value = self.solution["option"], self.solution["value"]
        if isinstance(value, dict):
            option, value = "average", value["average"]
        return f"{option}={value:{digits}}"


@dataclass(frozen=True)
class Times:
    """Measured times, each with its ratio to the unpatched model.

    ttft_ms   : time to first token
    decode_ms : time of each later token
    """

    ttft_ms: float
    ttft_ratio: float
    decode_ms: float
    decode_ratio: float

    @classmethod
    def read(cls, record: dict) -> "Times":
        """Read the record of one row's timing, which holds more than the medians."""
        return cls(**{f.name: record[f.name] for f in fields(cls)})


@dataclass
class Row:
    """One method at one budget.

    budget     : `keep` or a cost, by which the rows are grouped; None for the unpatched model
    stages     : the methods with their options
    provenance : configuration hash, seed, versions, commit, hardware and weights of the row's cells
    scores     : task -> score; a task that is not finished is missing
    relative   : mean over the tasks of the score relative to the unpatched model's; None until every task is finished
    groups     : group of tasks -> the same mean over its tasks
    vision     : the same mean of the score above the blind model's; None without that row
    hard       : the same mean over the questions that the row `downsample` of this budget gets wrong
    rank       : by `relative` within the budget; rows share a rank where no difference is significant
    stability  : loyalty, lost and won answers, averaged over the tasks
    cost       : None until a cell is finished
    flops_ratio : prefill FLOPs of the language model relative to the unpatched model's on the same tasks
    work_ratio : the same with the FLOPs of the methods, where they are known
    activity   : how often each stage acted, in the order of the stages; empty for old cells
    times      : None where the row was not timed
    solved     : None where the budget is no cost
    pareto     : the costs at which no other row has a better average for at most the same cost
    """

    label: str
    budget: int | float | dict | None
    stages: list[dict] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)
    scores: dict[str, Score] = field(default_factory=dict)
    relative: Estimate | None = None
    groups: dict[str, Estimate] = field(default_factory=dict)
    vision: Estimate | None = None
    hard: Estimate | None = None
    rank: int | None = None
    stability: Stability | None = None
    cost: Cost | None = None
    flops_ratio: float | None = None
    work_ratio: float | None = None
    activity: list[StageActivity] = field(default_factory=list)
    times: Times | None = None
    solved: Solved | None = None
    pareto: list[str] = field(default_factory=list)

    @property
    def budget_name(self) -> str:
        """The budget as text: 64, 0.25, equivalent_tokens=64, or all."""
        if self.budget is None:
            return "all"
        if isinstance(self.budget, dict):
            return ", ".join(f"{name}={value}" for name, value in self.budget.items())
        return str(self.budget)

    @property
    def block(self) -> str:
        """The budget, whose rows are compared with each other; the unpatched and the blind model stand alone."""
        alone = self.label == UNPATCHED or self.is_only("blind")
        return f"{self.label} alone" if alone else self.budget_name

    def is_only(self, method: str) -> bool:
        """Tell whether the row is a method by itself."""
        return [stage["method"] for stage in self.stages] == [method]

    @classmethod
    def read(cls, entry: dict, cells: list[dict], shape: DecoderShape, timing: dict) -> "Row":
        """Read a row without its scores.

        Args:
            entry: the configuration's row: label, budget and stages. A cost is not solved in these stages yet.
            cells: records of the row's finished cells.
            shape: sizes of the language model.
            timing: the record of the timing. Times of other options, weights or code do not count.
        """
        receipts = [cell["receipt"] for cell in cells]
        label, stages = entry["label"], cells[0]["stages"] if cells else entry["stages"]
        timed = timing and cells and timing_key(label, cells[0]) in timing["settings"]["rows"]
        times = Times.read(timing["times"][label]) if timed else None
        solved = [cell["budget"] for cell in cells if "budget" in cell]
        return cls(
            label,
            entry["budget"],
            stages,
            _provenance(cells),
            cost=Cost.read(cells, shape),
            activity=StageActivity.read(receipts),
            times=times,
            solved=Solved.read(solved, None if times is None else times.ttft_ratio),
        )


def _provenance(cells: list[dict]) -> dict[str, str]:
    """Describe the origin of a row's cells; where cells differ, all values are listed."""
    known = {name: sorted({_flat(cell[name]) for cell in cells if name in cell}) for name in PROVENANCE}
    return {name: "; ".join(values) for name, values in known.items() if values}


def _flat(value: object) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
