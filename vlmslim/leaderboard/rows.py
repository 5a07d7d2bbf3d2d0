"""One row of the leaderboard: a method at one budget, with what it cost, read off its cells."""

import statistics
from dataclasses import dataclass, field

from vlmslim.cost.flops import DecoderShape, prefill_flops
from vlmslim.evaluation.store import timing_key
from vlmslim.leaderboard.scores import Score

#: What every cell records; weights only those of trained methods.
PROVENANCE = ("config_hash", "seed", "versions", "git_commit", "hardware", "weights")


@dataclass
class Row:
    """One method at one budget. Tokens are per image, and per prompt where layers are averaged.

    budget     : the `keep` or the cost asked for, which groups rows; None for the unpatched model
    scores     : task -> score; tasks that are not finished are missing
    relative   : mean over tasks of the score over the unpatched model's, with its 95 % interval; None until every task
                 is finished
    groups     : group of tasks -> the same mean over its tasks
    rank       : by `relative` within the budget; rows share a rank where no difference is significant
    loyalty, lost, won : answers equal to the unpatched model's, and scores below and above its, as shares of the
                 questions, averaged over tasks
    pareto     : the costs at which no row has a better average for at most the same cost
    stages     : the methods with their options
    provenance : configuration hash, seed, versions, commit, hardware and weights behind the row's cells
    requested, kept, last, equivalent : visual tokens asked for, sent to the language model, left in its last layer,
                 and averaged over its layers
    kept_low, kept_high : fewest and most that an image sent; None in old receipts
    solved     : of a budget that is a cost: the option that was solved, its value, and what the sample prompts cost
    spent, spent_low, spent_high : what the tasks then really cost in that currency: mean, least and most over tasks
    flops      : analytic prefill FLOPs of the language model
    kv_bytes   : of the prompt's KV cache
    selection_ms : measured time that a prompt of the evaluation spent in the methods; None in old receipts
    positions  : what the language model saw, "renumbered" or "original"
    ttft_ms, decode_ms : measured time to first token, and per later token; each with its ratio to the unpatched
    """

    label: str
    budget: int | float | dict | None
    scores: dict[str, Score] = field(default_factory=dict)
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    groups: dict[str, float] = field(default_factory=dict)
    rank: int | None = None
    loyalty: float | None = None
    lost: float | None = None
    won: float | None = None
    pareto: list[str] = field(default_factory=list)
    requested: float | None = None
    kept: float | None = None
    kept_low: int | None = None
    kept_high: int | None = None
    last: float | None = None
    equivalent: float | None = None
    solved: dict | None = None
    spent: float | None = None
    spent_low: float | None = None
    spent_high: float | None = None
    flops: float | None = None
    flops_ratio: float | None = None
    kv_bytes: float | None = None
    selection_ms: float | None = None
    positions: str | None = None
    ttft_ms: float | None = None
    ttft_ratio: float | None = None
    decode_ms: float | None = None
    decode_ratio: float | None = None
    stages: list[dict] = field(default_factory=list)
    provenance: dict[str, str] = field(default_factory=dict)

    @property
    def budget_name(self) -> str:
        """The budget in a word: 64, 0.25, equivalent_tokens=64, or all."""
        if self.budget is None:
            return "all"
        if isinstance(self.budget, dict):
            return ", ".join(f"{name}={value}" for name, value in self.budget.items())
        return str(self.budget)

    @classmethod
    def read(cls, entry: dict, cells: list[dict], shape: DecoderShape, timing: dict) -> "Row":
        """A row without its scores.

        Args:
            entry: the configuration's: label, budget, and stages, in which a cost is not solved yet.
            cells: records of its finished cells.
            shape: of the language model.
            timing: what was timed; times of other options, weights or code under the same label do not count.
        """
        row = cls(entry["label"], entry["budget"], stages=cells[0]["stages"] if cells else entry["stages"])
        row._add_cost([cell["receipt"] for cell in cells], shape)
        row._add_solution([cell["budget"] for cell in cells if "budget" in cell])
        if timing and cells and timing_key(row.label, cells[0]) in timing["settings"]["rows"]:
            for name in ("ttft_ms", "ttft_ratio", "decode_ms", "decode_ratio"):
                setattr(row, name, timing["times"][row.label][name])
        row.provenance = _provenance(cells)
        return row

    def _add_cost(self, receipts: list[dict], shape: DecoderShape) -> None:
        """Tokens, FLOPs and bytes, averaged over the images or prompts of all tasks."""
        images, prompts = sum(r["images"] for r in receipts), sum(r["prompts"] for r in receipts)
        if not images or not prompts:
            return

        def per_image(key: str) -> float | None:
            known = [r for r in receipts if r[key] is not None and r["images"]]
            return sum(r[key] * r["images"] for r in known) / sum(r["images"] for r in known) if known else None

        def per_prompt(values: list[float]) -> float:
            return sum(v * r["prompts"] for v, r in zip(values, receipts, strict=True)) / prompts

        self.requested, self.kept = per_image("requested"), per_image("kept")
        ranges = [r.get("kept_range") for r in receipts if r["images"]]
        if None not in ranges:
            self.kept_low, self.kept_high = min(low for low, _ in ranges), max(high for _, high in ranges)
        self.last = per_prompt([r["visual_tokens_per_layer"][-1] for r in receipts]) * prompts / images
        self.equivalent = per_prompt([r["equivalent_tokens"] for r in receipts])
        self.kv_bytes = per_prompt([r["kv_bytes"] for r in receipts])
        if all("selection_ms" in r for r in receipts):
            self.selection_ms = per_prompt([r["selection_ms"] for r in receipts])
        self.positions = ", ".join(sorted({r["positions"] for r in receipts}))
        lengths = [[v + r["text_tokens"] for v in r["visual_tokens_per_layer"]] for r in receipts]
        self.flops = per_prompt([prefill_flops(shape, length) for length in lengths])

    def _add_solution(self, budgets: list[dict]) -> None:
        """What a cost came to, from the records of the row's cells."""
        if budgets:
            spent = [budget["spent"] for budget in budgets]
            self.solved = {name: value for name, value in budgets[0].items() if name != "spent"}
            self.spent, self.spent_low, self.spent_high = statistics.fmean(spent), min(spent), max(spent)


def _provenance(cells: list[dict]) -> dict[str, str]:
    """What stands behind the cells of a row; several values, if cells differ, are all named."""
    known = {name: sorted({_flat(cell[name]) for cell in cells if name in cell}) for name in PROVENANCE}
    return {name: "; ".join(values) for name, values in known.items() if values}


def _flat(value) -> str:
    return " ".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
