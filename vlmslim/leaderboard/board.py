"""The leaderboard, read from an output directory at any time; the same data gives the same bytes."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmslim.cost.flops import DecoderShape
from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.store import Store, digest, reading
from vlmslim.leaderboard.averages import SCALES, References, contributes
from vlmslim.leaderboard.cells import Cells, check_cells, facts_of, open_run, verified, visual_tokens
from vlmslim.leaderboard.comparison import Comparison, Stability, compare
from vlmslim.leaderboard.costs import add_fronts
from vlmslim.leaderboard.questions import Questions
from vlmslim.leaderboard.rows import UNPATCHED, Row
from vlmslim.leaderboard.samples import read_task, source_of
from vlmslim.leaderboard.scores import Estimate, metric_of, score_of
from vlmslim.leaderboard.task_groups import group_of, known_first

if TYPE_CHECKING:
    from vlmslim.leaderboard.frames import Frames


@dataclass
class Leaderboard:
    """Rows grouped by budget: the unpatched and the blind model first, then the budgets from the largest on.

    metrics    : task -> (metric, whether higher is better)
    facts      : what the numbers depend on: model, seed, limit, versions, hardware, ...
    comparison : intervals, paired tests and flips, question by question
    groups     : task -> its group
    tokens     : task -> visual tokens of an image before compression
    directory  : what was read; None for a leaderboard that was put together by hand
    ranked_by  : one of `SCALES`: of the average that decides ranks, marks, tests and the Pareto front
    vision_tasks : tasks that make up the vision-retained score
    """

    rows: list[Row]
    tasks: list[str]
    metrics: dict[str, tuple[str, bool]]
    facts: dict
    comparison: Comparison = field(default_factory=Comparison)
    groups: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, float] = field(default_factory=dict)
    directory: Path | None = field(default=None, compare=False)
    ranked_by: str = "unpatched"
    vision_tasks: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, directory: Path | str, scale: str = "unpatched") -> "Leaderboard":
        """Read what `vlmslim run` has written so far.

        Args:
            directory: the output directory of the run.
            scale: one of `SCALES`: of the average that decides ranks, marks, tests and the Pareto front.

        Raises:
            ConfigError: the directory holds no run, cells that cannot be compared with each other, or records of
                another form than `vlmslim run` writes; or the run has no row that the scale refers to.
        """
        if scale not in SCALES:
            raise ConfigError(f"scale={scale!r}: use one of {', '.join(SCALES)}")
        with reading(directory):
            return cls._read(directory, scale)

    @classmethod
    def _read(cls, directory: Path | str, scale: str) -> "Leaderboard":
        store, run = open_run(directory)
        config = run["config"]
        grid = [(row["label"], task["task"]) for row in config["rows"] for task in config["tasks"]]
        cells = {place: cell for place in grid if (cell := store.cell(*place)) is not None}
        if not cells:
            raise ConfigError(f"{directory} has no finished cell yet, or the samples are gone; call vlmslim run again")
        check_cells(run, cells)

        settings = {task["task"]: task for task in config["tasks"] if any(name == task["task"] for _, name in cells)}
        tasks = list(settings)
        first = {task: next(cell for (_, name), cell in cells.items() if name == task) for task in tasks}
        metrics = {task: metric_of(first[task], task, settings[task]["metric"]) for task in tasks}
        groups = {task: settings[task].get("group") or group_of(task) for task in tasks}

        timing = store.timing or {}
        if timing and timing["settings"]["config_hash"] != digest(run["shared"]):
            timing = {}
        rows = _rows(config, cells, timing)
        answers = []
        for task in tasks:
            samples = {row.label: store.samples(row.label, task) for row in rows if (row.label, task) in cells}
            for row in rows:
                if row.label in samples:
                    row.scores[task] = score_of(cells[row.label, task], task, metrics[task][0], samples[row.label])
            answers.append(read_task(task, samples, *metrics[task], source_of(first[task], task)))
        add_ratios(rows, tasks, metrics, groups)

        damaged = [
            f"{label} / {task}" for label, task in grid if (label, task) not in cells and store.is_damaged(label, task)
        ]
        facts = facts_of(run, cells, timing, damaged) | {"verified": verified(store.verification, run, cells)}
        tokens = {task: visual_tokens([cell for (_, name), cell in cells.items() if name == task]) for task in tasks}
        board = cls(
            rows, tasks, metrics, facts, groups=groups, tokens=tokens, directory=Path(directory), ranked_by=scale
        )
        budgets = [rows for group in board.budgets() if (rows := [row for row in group if row.label != UNPATCHED])]
        labels = [[row.label for row in budget] for budget in budgets]
        references = board._references(budgets)
        board.comparison = compare(answers, labels, UNPATCHED, groups, references, scale)
        board._add_comparison(references)
        board._check_scale()
        add_fronts(rows, board.average)
        return board

    def _references(self, budgets: list[list[Row]]) -> References:
        """Find the rows that the scales refer to, and the tasks to which pictures contribute enough."""
        base, blind = self._complete(UNPATCHED), next((row for row in self.rows if row.is_only("blind")), None)
        shrunk = [next((row.label for row in budget if row.is_only("downsample")), None) for budget in budgets]
        if blind is None or base is None or self._complete(blind.label) is None:
            return References(shrunk=tuple(shrunk))
        contributing = [
            task
            for task in self.tasks
            if contributes(base.scores[task].value, blind.scores[task].value, self.metrics[task][1])
        ]
        return References(blind.label, tuple(shrunk), tuple(contributing))

    def _complete(self, label: str) -> Row | None:
        """Return a row if it has the scores of all tasks."""
        row = next((row for row in self.rows if row.label == label), None)
        return row if row is not None and row.scores.keys() == set(self.tasks) else None

    def _check_scale(self) -> None:
        """Refuse a scale that nothing refers to, in words that say what is missing."""
        needed = {"vision-retained": ("blind", ", and a task to which the picture adds"), "hard": ("downsample", "")}
        if self.ranked_by in needed and not any(self.average(row) for row in self.rows):
            name, more = needed[self.ranked_by]
            raise ConfigError(
                f"scale={self.ranked_by!r} needs finished rows of none and {name}{more}; add {name} to 'baselines' and "
                "call vlmslim run again, or use the scale 'unpatched'"
            )

    def budgets(self) -> list[list[Row]]:
        """Return the rows of each budget, in order; the unpatched and the blind model come first, by themselves."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.block, []).append(row)
        return list(groups.values())

    def questions(self) -> Iterator[Questions]:
        """Read the questions of each task, with the answers of all rows, one task at a time.

        Raises:
            ConfigError: the leaderboard was not read from a directory, or the cells there have changed since.
        """
        if self.directory is None:
            raise ConfigError("this leaderboard has no samples, because it was not read from the directory of a run")
        store = Store(self.directory)
        with reading(self.directory):
            for task in self.tasks:
                labels = [row.label for row in self.rows if task in row.scores]
                cells = [store.cell(label, task) for label in labels]
                if None in cells:
                    raise ConfigError(f"the samples of {task} in {self.directory} have changed; read them again")
                samples = {label: store.samples(label, task) for label in labels}
                yield Questions.of(task, samples, self.metrics[task][0])

    def to_frames(self) -> "Frames":
        """Return pandas data frames: rows, cells, samples and pairs.

        Raises:
            ConfigError: as `questions`.
        """
        from vlmslim.leaderboard.frames import to_frames  # pandas takes a second to load

        return to_frames(self)

    def medals(self, task: str | None) -> dict[str, int]:
        """Mark the best rows of each budget by the score of a task, or by the average (None).

        Equal values share a mark. Where all values are equal, no row is marked. The unpatched model does not compete.

        Returns:
            label -> 1 for the best row, or 2 for a row that is not significantly worse.
        """
        sign = 1 if task is None or self.metrics[task][1] else -1
        medals = {}
        for group in self.budgets():
            values = {row.label: self._value(row, task) for row in group if row.label != UNPATCHED}
            known = {label: value for label, value in values.items() if value is not None}
            if len(set(known.values())) < 2:
                continue
            best = max(known, key=lambda label: sign * known[label])
            for label, value in known.items():
                pair = self.comparison.pair(best, label, task)
                if value == known[best]:
                    medals[label] = 1
                elif pair is not None and not pair.significant:
                    medals[label] = 2
        return medals

    def _value(self, row: Row, task: str | None) -> float | None:
        """Return the number that decides the medals: for the average, the tested one if it is not the shown one."""
        if task is not None:
            return row.scores[task].value if task in row.scores else None
        pair, average = self.comparison.pair(row.label, UNPATCHED, None), self.average(row)
        if average is None:
            return None
        return average.value if pair is None or not self.not_question_means else pair.difference

    def average(self, row: Row) -> Estimate | None:
        """Return the average of a row on the board's scale; None where it is not known."""
        return {"unpatched": row.relative, "vision-retained": row.vision, "hard": row.hard}[self.ranked_by]

    @property
    def not_question_means(self) -> list[str]:
        """Tasks whose score is not the mean of its questions' scores: the tested average leaves such a score out."""
        means = self.comparison.means
        return [
            task
            for task in self.tasks
            if not all(
                row.scores[task].is_close_to(means.get((row.label, task))) for row in self.rows if task in row.scores
            )
        ]

    def scale(self, task: str) -> int:
        """Return 100 for a score that is shown in per cent, or 1 for points, for example of MME or CIDEr."""
        return 100 if all(row.scores[task].value <= 1 for row in self.rows if task in row.scores) else 1

    def question_scale(self, task: str) -> int:
        """Return the scale of the questions' own scores, which may be shares where the task's score is in points."""
        means = [self.comparison.means.get((row.label, task)) for row in self.rows]
        return 100 if all(mean is None or mean <= 1 for mean in means) else 1

    def _add_comparison(self, references: References) -> None:
        """Complete the rows with what the single questions say: intervals, ranks, other scales, loyalty and flips."""
        comparison, means = self.comparison, set(self.tasks) - set(self.not_question_means)
        self.vision_tasks = [task for task in references.contributing if task not in comparison.uncertain]
        base, blind = self._complete(UNPATCHED), self._complete(references.blind or "")
        for row in self.rows:
            own_means = [
                t for t, score in row.scores.items() if score.is_close_to(comparison.means.get((row.label, t)))
            ]
            for task in own_means:
                low, high = comparison.intervals.get((row.label, task), (None, None))
                row.scores[task] = replace(row.scores[task], low=low, high=high)
            row.rank = None if row.is_only("blind") else comparison.ranks.get(row.label)
            if row.relative is not None and row.label in comparison.relative and own_means == self.tasks:
                row.relative = Estimate(row.relative.value, *comparison.relative[row.label])
            for group, mean in row.groups.items():
                members = {task for task in self.tasks if self.groups[task] == group}
                if (row.label, group) in comparison.groups and members <= means:
                    row.groups[group] = Estimate(mean.value, *comparison.groups[row.label, group])
            if base is not None and blind is not None and self.vision_tasks and self._complete(row.label):
                shares = [_share(*(r.scores[task].value for r in (row, base, blind))) for task in self.vision_tasks]
                ends = comparison.vision.get(row.label, ()) if means >= set(self.vision_tasks) else ()
                row.vision = Estimate(statistics.fmean(shares), *ends)
            row.hard = comparison.hard.get(row.label)
            row.stability = mean_stability([comparison.stability.get((row.label, task)) for task in self.tasks])


def preview(store: Store, label: str) -> Row:
    """Read a row of a run that goes on, as far as it is finished.

    The row has its cost, its scores and their average, but no intervals and tests.

    Raises:
        ConfigError: lmms-eval reports no number for a task.
    """
    _, run = open_run(store.directory)
    config, tasks = run["config"], {task["task"]: task["metric"] for task in run["config"]["tasks"]}
    labels = dict.fromkeys((UNPATCHED, label))
    places = [(name, task) for name in labels for task in tasks]
    cells = {place: cell for place in places if (cell := store.cell(*place)) is not None}
    tasks = {task: wanted for task, wanted in tasks.items() if (label, task) in cells}
    metrics = {task: metric_of(cells[label, task], task, wanted) for task, wanted in tasks.items()}
    rows = _rows(config | {"rows": [row for row in config["rows"] if row["label"] in labels]}, cells, {})
    for row in rows:
        own = [task for task in tasks if (row.label, task) in cells]
        row.scores = {task: score_of(cells[row.label, task], task, metrics[task][0], []) for task in own}
    add_ratios(rows, list(tasks), metrics, {task: group_of(task) for task in tasks})
    return next(row for row in rows if row.label == label)


def _rows(config: dict, cells: Cells, timing: dict) -> list[Row]:
    """Read the rows without their scores, in the order of the leaderboard."""
    shape = DecoderShape(**config["checkpoint"]["shape"])
    rows = []
    for entry in config["rows"]:
        own = [cell for (label, _), cell in cells.items() if label == entry["label"]]
        rows.append(Row.read(entry, own, shape, timing))
    return sorted(rows, key=_group_order)


def _group_order(row: Row) -> tuple:
    """Sort the unpatched and the blind model first, then rows without a budget, counts, shares, and costs."""
    if row.is_only("blind"):
        return (0, 1)
    if isinstance(row.budget, dict):
        return (4, *((name, -value) for name, value in row.budget.items()))
    kind = 1 if row.budget is None else 3 if isinstance(row.budget, float) else 2
    return (0 if row.label == UNPATCHED else kind, -(row.budget or 0))


def add_ratios(rows: list[Row], tasks: list[str], metrics: dict, groups: dict[str, str]) -> None:
    """Add each row's FLOPs and average score relative to the unpatched model's."""
    base = next((row for row in rows if row.label == UNPATCHED), None)
    if base is None:
        return
    for row in rows:
        if row.cost and base.cost and row.scores.keys() == base.scores.keys():  # else the prompts differ
            row.flops_ratio = row.cost.flops / base.cost.flops
            row.work_ratio = row.cost.work / base.cost.work
        if all(task in row.scores and task in base.scores for task in tasks):
            ratios = {t: _ratio(row.scores[t].value, base.scores[t].value, metrics[t][1]) for t in tasks}
            known = {task: ratio for task, ratio in ratios.items() if ratio is not None}
            row.relative = Estimate(statistics.fmean(known.values())) if known else None
            for group in sorted(dict.fromkeys(groups[task] for task in known), key=known_first):
                row.groups[group] = Estimate(statistics.fmean(r for task, r in known.items() if groups[task] == group))


def _ratio(ours: float, theirs: float, higher_is_better: bool) -> float | None:
    """Divide a score by the unpatched model's; None if that is 0, because then every method's ratio is meaningless."""
    if not theirs:
        return None
    return ours / theirs if higher_is_better else 2 - ours / theirs


def _share(score: float, unpatched: float, blind: float) -> float:
    """Return which share of what the picture adds to a score is left."""
    return (score - blind) / (unpatched - blind)


def mean_stability(tasks: list[Stability | None]) -> Stability | None:
    """Average over the tasks; None if a task is missing."""
    known = [one for one in tasks if one is not None]
    if not known or len(known) < len(tasks):
        return None
    lost = [one.lost for one in known if one.lost is not None]
    won = [one.won for one in known if one.won is not None]
    flips_known = len(lost) == len(known)
    return Stability(
        statistics.fmean(one.loyalty for one in known),
        statistics.fmean(lost) if flips_known else None,
        statistics.fmean(won) if flips_known else None,
    )
