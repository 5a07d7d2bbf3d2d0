"""Scores of tasks as lmms-eval reports them, with confidence intervals."""

import math
import statistics
from dataclasses import dataclass

from vlmslim.evaluation.errors import ConfigError
from vlmslim.leaderboard.samples import question_score

_Z = statistics.NormalDist().inv_cdf(0.975)  # standard errors on either side of a 95 % interval


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval; `low` and `high` are None where the interval is not known."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Score(Estimate):
    """A task's score in its own unit.

    stderr    : lmms-eval's standard error, or that of the mean; None for scores such as F1 or CIDEr
    questions : how many questions were asked
    """

    stderr: float | None = None
    questions: int = 0

    def is_close_to(self, value: float | None) -> bool:
        """Compare with a number that was computed from the questions, up to rounding."""
        return value is not None and math.isclose(self.value, value, rel_tol=1e-6, abs_tol=1e-12)


def metric_of(cell: dict, task: str, wanted: str | None) -> tuple[str, bool]:
    """Find the metric of a task, and whether higher is better.

    Args:
        cell: the record of a cell.
        task: the cell's task.
        wanted: the metric that the configuration names; None means the task's first metric that is a number.

    Raises:
        ConfigError: the task does not report the metric, or reports no number at all.
    """
    first = cell["lmms_eval"]
    higher = first["higher_is_better"].get(task, {})
    reported = [key for key, value in first["results"][task].items() if "," in key and _is_number(value)]
    names = [key.split(",")[0] for key in reported if "_stderr" not in key]
    if not names:
        raise ConfigError(f"{task} reports no number; remove the task from the run, or use its validation split")
    if wanted is not None and wanted not in names:
        raise ConfigError(f"{task} reports no metric {wanted!r}; use one of {', '.join(dict.fromkeys(names))}")
    ordered = [name for name in higher if name in names] or names
    name = wanted or ordered[0]
    return name, higher.get(name) is not False


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def score_of(cell: dict, task: str, metric: str, samples: list[dict]) -> Score:
    """Read the score of a cell, with the interval of its standard error.

    Raises:
        ConfigError: lmms-eval reports no number.
    """
    results = cell["lmms_eval"]["results"][task]
    key = next((key for key in results if key.split(",")[0] == metric), metric)
    value = results.get(key)
    if not _is_number(value):
        raise ConfigError(f"{cell['label']} on {task}: lmms-eval reports {metric} = {value!r}, which is not a number")
    stderr = results.get(key.replace(metric, f"{metric}_stderr", 1))
    if not _is_number(stderr):
        stderr = stderr_of_mean(samples, metric, value)
    if stderr is None:
        return Score(float(value), questions=len(samples))
    return Score(float(value), value - _Z * stderr, value + _Z * stderr, float(stderr), len(samples))


def stderr_of_mean(samples: list[dict], metric: str, value: float) -> float | None:
    """Return the standard error of a score that is the mean of its questions' scores; None for any other score."""
    scores = [score for sample in samples if (score := question_score(sample, metric)) is not None]
    if not 2 <= len(scores) == len(samples) or not Score(value).is_close_to(statistics.fmean(scores)):
        return None
    return statistics.stdev(scores) / math.sqrt(len(scores))
