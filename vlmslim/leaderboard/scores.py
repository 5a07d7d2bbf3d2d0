"""Scores as lmms-eval reports them, with intervals."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

from vlmslim.evaluation.config import ConfigError
from vlmslim.leaderboard.comparison import question_score

_Z = statistics.NormalDist().inv_cdf(0.975)  # standard errors on either side of a 95 % interval


@dataclass(frozen=True)
class Score:
    """A task's score in its own unit.

    stderr    : lmms-eval's standard error, or that of the mean; None for scores such as F1 or CIDEr
    low, high : 95 % confidence interval; None where there is no standard error either
    """

    value: float
    stderr: float | None
    questions: int
    low: float | None = None
    high: float | None = None

    def is_close_to(self, value: float | None) -> bool:
        """Whether a number computed from the questions is this score, up to rounding."""
        return value is not None and math.isclose(self.value, value, rel_tol=1e-6, abs_tol=1e-12)


def metric_of(cell: dict, task: str, wanted: str | None) -> tuple[str, bool]:
    """The metric of a task, and whether higher is better.

    Args:
        cell: the record of a cell.
        task: its task.
        wanted: the metric asked for; None for the task's first that gave a number.

    Raises:
        ConfigError: the task does not report it, or no number at all.
    """
    first = cell["lmms_eval"]
    higher = first["higher_is_better"].get(task, {})
    reported = [key for key, value in first["results"][task].items() if "," in key and _is_number(value)]
    names = [key.split(",")[0] for key in reported if "_stderr" not in key]
    if wanted is not None and wanted not in names:
        raise ConfigError(f"{task} reports no metric {wanted!r}; it has {', '.join(dict.fromkeys(names))}")
    ordered = [name for name in higher if name in names] or names
    if not ordered:
        raise ConfigError(f"{task} reports no number; take it out, or use its validation split")
    name = wanted or ordered[0]
    return name, higher.get(name) is not False


def _is_number(value) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def score_of(cell: dict, task: str, metric: str, samples: list[dict]) -> Score:
    """The score of a cell, with the interval that its standard error gives.

    Raises:
        ConfigError: lmms-eval gave no number.
    """
    results = cell["lmms_eval"]["results"][task]
    key = next((k for k in results if k.split(",")[0] == metric), None)
    value = results.get(key)
    if not _is_number(value):
        raise ConfigError(f"{cell['label']} on {task}: lmms-eval gave {metric} = {value!r}")
    stderr = results.get(key.replace(metric, f"{metric}_stderr", 1))
    if not _is_number(stderr):
        stderr = stderr_of_mean(samples, metric, value)
    if stderr is None:
        return Score(float(value), None, len(samples))
    return Score(float(value), float(stderr), len(samples), value - _Z * stderr, value + _Z * stderr)


def stderr_of_mean(samples: list[dict], metric: str, value: float) -> float | None:
    """The standard error of a score that is the mean of its questions' scores; None for any other."""
    scores = [question_score(sample, metric) for sample in samples]
    if len(scores) < 2 or None in scores or not Score(value, None, 0).is_close_to(statistics.fmean(scores)):
        return None
    return statistics.stdev(scores) / math.sqrt(len(scores))


def source_of(cell: dict, task: str) -> str:
    """The data set that a task draws its pictures from, a name or a folder: tasks of one set may share pictures."""
    config = cell["lmms_eval"].get("configs", {}).get(task, {})
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    while isinstance(files, dict | list) and files:
        files = next(iter(files.values() if isinstance(files, dict) else files))
    return str(Path(files).parent) if isinstance(files, str) else config.get("dataset_path") or task
