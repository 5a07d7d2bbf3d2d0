"""`vlmslim compare`: two runs, row by row and question by question."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from vlmslim.evaluation.errors import ConfigError
from vlmslim.evaluation.store import Store, reading
from vlmslim.io.files import markdown_table
from vlmslim.leaderboard.board import Leaderboard, mean_stability
from vlmslim.leaderboard.comparison import Pair, Stability, compare
from vlmslim.leaderboard.questions import Questions
from vlmslim.leaderboard.render import csv_lines, escaped
from vlmslim.leaderboard.samples import read_task, source_of
from vlmslim.leaderboard.significance import holm
from vlmslim.leaderboard.tables import NOTHING, STAR, difference_text, number, p_text

FIRST, SECOND = "A", "B"


@dataclass(frozen=True)
class Difference:
    """One row on one task, or on all tasks that both runs finished (`task` is None), in the second run and the first.

    first, second : the scores; for the average, 1 and the mean ratio of the second run's scores to the first's
    pair          : second minus first, with its interval and p values; None where single questions have no scores
    stability     : same answers, and questions lost and won from the first run to the second; of the average, the mean
    """

    label: str
    task: str | None
    first: float
    second: float
    pair: Pair | None
    stability: Stability | None


@dataclass(frozen=True)
class TwoRuns:
    """The comparison of two runs.

    names       : the directories
    differences : row by row, task by task, the average of a row last
    conditions  : what differs between the runs, one sentence each
    scales      : task -> 100 for scores in per cent, else 1
    questions   : of each task, with the answers of both runs, whose labels begin with "A " and "B "
    """

    names: tuple[str, str]
    differences: list[Difference]
    conditions: list[str]
    scales: dict[str, int]
    questions: list[Questions]

    def items(self) -> Iterator[dict]:
        """Yield one line for each row and question."""
        for asked in self.questions:
            for label in (name.removeprefix(f"{FIRST} ") for name in asked.answers if name.startswith(f"{FIRST} ")):
                pair = [(asked.answers[f"{run} {label}"], asked.scores[f"{run} {label}"]) for run in (FIRST, SECOND)]
                for i, question in enumerate(asked.ids):
                    yield {
                        "label": label,
                        "task": asked.task,
                        "question": question,
                        "picture": asked.pictures[i],
                        "prompt": asked.prompts[i],
                        "target": asked.targets[i],
                        **{f"answer_{run}": own[0][i] for run, own in zip("ab", pair, strict=True)},
                        **{f"score_{run}": own[1][i] for run, own in zip("ab", pair, strict=True)},
                    }


def compare_runs(first: Path | str, second: Path | str) -> TwoRuns:
    """Compare the rows that two runs have in common, on the questions that both asked.

    The statistics are those of a leaderboard: paired, over pictures, and Holm's correction over the rows of a task.

    Raises:
        ConfigError: a directory holds no run, or the two are not comparable; the message says why.
    """
    a, b = Leaderboard.read(first), Leaderboard.read(second)
    finished = [{row.label: set(row.scores) for row in board.rows if row.scores} for board in (a, b)]
    labels = [row.label for row in a.rows if row.label in finished[0] and row.label in finished[1]]
    if not labels:
        raise ConfigError(
            f"{first} and {second} have no row in common: {', '.join(finished[0])} there, {', '.join(finished[1])} "
            "here; give the rows to compare the same 'label'"
        )
    tasks = [task for task in a.tasks if task in b.tasks and any(_both(finished, label, task) for label in labels)]
    if not tasks:
        raise ConfigError(
            f"{first} and {second} have no task in common: {', '.join(a.tasks)} there, {', '.join(b.tasks)} here"
        )
    stores = Store(first), Store(second)
    with reading(f"{first} or {second}"):
        for task in tasks:
            _check_comparable(task, (a, b), stores)
        samples = {task: _samples(task, labels, finished, stores) for task in tasks}
        sources = {task: source_of(_cell(task, a, stores[0]), task) for task in tasks}
        differences = [one for label in labels for one in _differences(label, samples, (a, b), sources)]
    return TwoRuns(
        (str(first), str(second)),
        _corrected(differences),
        _conditions(a, b, labels),
        {task: a.scale(task) for task in tasks},
        [Questions.of(task, samples[task], a.metrics[task][0]) for task in tasks],
    )


def _both(finished: list[dict[str, set[str]]], label: str, task: str) -> bool:
    return all(task in run[label] for run in finished)


def _samples(
    task: str, labels: list[str], finished: list[dict[str, set[str]]], stores: tuple[Store, Store]
) -> dict[str, list[dict]]:
    """Read the samples of the rows that finished a task in both runs, under the labels "A ROW" and "B ROW"."""
    return {
        f"{run} {label}": store.samples(label, task)
        for label in labels
        if _both(finished, label, task)
        for run, store in zip((FIRST, SECOND), stores, strict=True)
    }


def _cell(task: str, board: Leaderboard, store: Store) -> dict:
    """Return the record of one of the cells of a task; all of them asked the same questions."""
    label = next(row.label for row in board.rows if task in row.scores)
    cell = store.cell(label, task)
    if cell is None:
        raise ConfigError(f"the cell {label} / {task} in {store.directory} has changed; call vlmslim compare again")
    return cell


def _check_comparable(task: str, boards: tuple[Leaderboard, Leaderboard], stores: tuple[Store, Store]) -> None:
    """Refuse a task whose questions or scores are not the same in both runs."""
    metrics = [board.metrics[task] for board in boards]
    if metrics[0] != metrics[1]:
        raise ConfigError(
            f"{task} is scored by {metrics[0][0]} in {stores[0].directory} and by {metrics[1][0]} in "
            f"{stores[1].directory}; name one of them as the task's 'metric' in both runs"
        )
    first, second = (_cell(task, board, store) for board, store in zip(boards, stores, strict=True))
    if first["questions"] != second["questions"]:
        limits = [board.facts["limit"] for board in boards]
        asked = ["all questions" if limit is None else f"the first {limit} questions" for limit in limits]
        why = f": {asked[0]} there, {asked[1]} here; use one 'limit'" if limits[0] != limits[1] else ""
        raise ConfigError(
            f"{stores[0].directory} and {stores[1].directory} asked different questions of {task}, or asked them "
            f"under different settings, so their answers cannot be paired{why}"
        )
    before, now = first.get("definition", {}), second.get("definition", {})
    changed = sorted(name for name in before.keys() & now.keys() if before[name] != now[name])
    if changed:
        raise ConfigError(
            f"{', '.join(changed)} of {task} changed between {stores[0].directory} and {stores[1].directory}, so "
            "their scores may not mean the same; evaluate one of the two again"
        )


def _differences(
    label: str, samples: dict[str, dict[str, list[dict]]], boards: tuple[Leaderboard, Leaderboard], sources: dict
) -> list[Difference]:
    """Compare one row on all tasks that it finished in both runs; the second run is compared with the first."""
    a, b = f"{FIRST} {label}", f"{SECOND} {label}"
    finished = {task: {name: own[name] for name in (a, b)} for task, own in samples.items() if a in own}
    read = [read_task(task, own, *boards[0].metrics[task], sources[task]) for task, own in finished.items()]
    result = compare(read, [[b]], a, boards[0].groups)
    before, now = (next(row for row in board.rows if row.label == label) for board in boards)
    found = [
        Difference(
            label,
            task,
            before.scores[task].value,
            now.scores[task].value,
            result.pair(b, a, task),
            result.stability[b, task],
        )
        for task in finished
    ]
    average = result.pair(b, a, None)
    if average is not None and len(found) > 1:
        stability = mean_stability([one.stability for one in found])
        found.append(Difference(label, None, 1.0, 1.0 + average.difference, average, stability))
    return found


def _corrected(differences: list[Difference]) -> list[Difference]:
    """Correct the p values of each task, and those of the average, for the number of rows."""
    adjusted: dict[tuple[str, str | None], float] = {}
    for task in {one.task for one in differences}:
        tested = [(one.label, one.pair.p) for one in differences if one.task == task and one.pair is not None]
        family = holm(np.array([p for _, p in tested]))
        adjusted |= {(label, task): float(p) for (label, _), p in zip(tested, family, strict=True)}
    return [
        one if one.pair is None else replace(one, pair=replace(one.pair, p_adjusted=adjusted[one.label, one.task]))
        for one in differences
    ]


def _conditions(a: Leaderboard, b: Leaderboard, labels: list[str]) -> list[str]:
    """Say what differs between two runs besides the answers."""
    said = []
    for kind, names in {
        "rows": [[row.label for row in run.rows if row.scores] for run in (a, b)],
        "tasks": [a.tasks, b.tasks],
    }.items():
        for run, own, others in ((FIRST, *names), (SECOND, *reversed(names))):
            if alone := [name for name in own if name not in others]:
                said.append(f"{kind}: {', '.join(alone)} only in {run}, so left out")
    keys = ("model", "checkpoint", "protocol", "limit", "seed", "batch_size", "backends", "hardware", "git_commits")
    for key in (*keys, "versions"):
        ours, theirs = a.facts[key], b.facts[key]
        if ours != theirs:
            said.append(f"{key.replace('_', ' ')}: {_told(ours, theirs)} in {FIRST}, {_told(theirs, ours)} in {SECOND}")
    for label in labels:
        ours, theirs = (next(row.stages for row in board.rows if row.label == label) for board in (a, b))
        if ours != theirs:
            said.append(f"{label}: {json.dumps(ours)} in {FIRST}, {json.dumps(theirs)} in {SECOND}")
    return said


def _told(value: object, other: object) -> str:
    """Write a value; of a dictionary, what the other does not have."""
    if isinstance(value, dict) and isinstance(other, dict):
        return ", ".join(f"{name} {own}" for name, own in value.items() if other.get(name) != own) or "the same"
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "not known" if value is None else str(value)


# ---------------------------------------------------------------------- formats


def render(runs: TwoRuns, format: str) -> str:
    """Write a comparison as a table in Markdown (`md`), as one line for each question (`csv`), or as `json`."""
    if format == "csv":
        lines = list(runs.items())
        return csv_lines(lines, list(lines[0]))
    if format == "json":
        data = {
            "runs": dict(zip((FIRST, SECOND), runs.names, strict=True)),
            "conditions": runs.conditions,
            "differences": [asdict(one) for one in runs.differences],
            "items": list(runs.items()),
        }
        return json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    return _markdown(runs)


def _markdown(runs: TwoRuns) -> str:
    lines = []
    for one in runs.differences:
        scale = 100 if one.task is None else runs.scales[one.task]
        lines.append(
            [
                escaped(one.label),
                "average, % of A" if one.task is None else escaped(one.task),
                number(one.first, scale, 1 if scale == 100 else 3),
                number(one.second, scale, 1 if scale == 100 else 3),
                difference_text(one.pair, scale),
                p_text(one.pair),
                *(number(getattr(one.stability, share, None), 100, 1) for share in ("loyalty", "lost", "won")),
            ]
        )
    headers = ["method", "task", FIRST, SECOND, f"{SECOND} − {FIRST}", "p", "same answer %", "lost %", "won %"]
    named = "; ".join(f"{letter}: {escaped(name)}" for letter, name in zip((FIRST, SECOND), runs.names, strict=True))
    parts = [f"# Two runs, question by question\n\n{named}.", markdown_table(headers, lines)]
    if runs.conditions:
        parts.append("The runs differ in:\n\n" + "\n".join(f"- {escaped(line)}" for line in runs.conditions))
    parts.append(
        f"Both runs answered the same questions, so every difference is paired: {SECOND} minus {FIRST}, ± half of its "
        f"95 % interval over pictures. {STAR} marks a significant difference (p < 0.05); Holm's method corrects the p "
        "values of a task for the number of methods. Lost and won are the questions whose score fell and rose from "
        f"{FIRST} to {SECOND}; {NOTHING} means that single questions have no scores."
    )
    return "\n\n".join(parts) + "\n"
