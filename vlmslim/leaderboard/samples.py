"""Reads lmms-eval's samples: what each row answered to each question, and what score the answer got."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vlmslim.evaluation.errors import ConfigError

#: Keys under which data sets name the picture (or page, or video) of a question, the most reliable first.
_PICTURE_KEYS = (
    *("scene", "page", "image_id", "imageId", "image_source", "data_id", "docId"),
    *("video_id", "videoID", "video_idx", "video_name", "video_path", "video", "question_id"),
)


@dataclass(frozen=True)
class UnscoredTask:
    """Answers of several rows to one task whose questions have no scores of their own.

    answers : label of a row -> its answer to each question
    """

    task: str
    answers: dict[str, list[str]]

    @property
    def labels(self) -> list[str]:
        """Labels of the rows."""
        return list(self.answers)


@dataclass(frozen=True)
class ScoredTask:
    """Answers of several rows to one task, with the score of each answer.

    answers  : label of a row -> its answer to each question
    scores   : (rows, questions), rows in the order of `answers`
    pictures : name of each question's picture
    sign     : 1 if higher scores are better, else -1
    """

    task: str
    answers: dict[str, list[str]]
    scores: np.ndarray
    pictures: list[str]
    sign: int = 1

    @property
    def labels(self) -> list[str]:
        """Labels of the rows."""
        return list(self.answers)

    def row(self, label: str) -> np.ndarray:
        """Return the scores of one row, (questions,)."""
        return self.scores[self.labels.index(label)]

    @property
    def right_or_wrong(self) -> bool:
        """True if every question is either right (1) or wrong (0)."""
        return bool(np.isin(self.scores, (0.0, 1.0)).all())


def read_task(
    task: str, samples: dict[str, list[dict]], metric: str, higher_is_better: bool, source: str = ""
) -> ScoredTask | UnscoredTask:
    """Read the answers and scores of one task.

    Some metrics cover only a part of the questions, for example the perception score of MME. The other questions are
    left out.

    Args:
        task: name of the task.
        samples: label of a row -> its samples.
        metric: the metric whose scores are compared.
        higher_is_better: the direction of the metric.
        source: the data set of the pictures; the same picture name in two data sets means two pictures.

    Raises:
        ConfigError: two rows answered different questions, so they cannot be paired.
    """
    first, *others = samples
    questions = [sample["doc_id"] for sample in samples[first]]
    for label in others:
        if [sample["doc_id"] for sample in samples[label]] != questions:
            raise ConfigError(
                f"{first} and {label} answered different questions of {task}, so they cannot be compared; "
                "start over with --fresh"
            )
    scores = [[question_score(sample, metric) for sample in own] for own in samples.values()]
    covered = [i for i in range(len(questions)) if any(row[i] is not None for row in scores)]
    known = [[score for i in covered if (score := row[i]) is not None] for row in scores]
    if not covered or any(len(row) < len(covered) for row in known):
        return UnscoredTask(task, {label: list(map(answer_text, own)) for label, own in samples.items()})
    return ScoredTask(
        task,
        {label: [answer_text(own[i]) for i in covered] for label, own in samples.items()},
        np.array(known, dtype=float),
        pictures_of([samples[first][i] for i in covered], source or task),
        1 if higher_is_better else -1,
    )


def question_score(sample: dict, metric: str) -> float | None:
    """Return the score of one question: a number, or the `score` in the dictionary that the task logs."""
    value = sample.get(metric)
    if isinstance(value, dict):
        value = value.get("score")
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def answer_text(sample: dict) -> str:
    """Return the answer as text that can be compared: `given_answer` without case and extra spaces."""
    return " ".join(given_answer(sample).casefold().split())


def given_answer(sample: dict) -> str:
    """Return the answer as it was given.

    Where lmms-eval chose an option by log-likelihood, the answer is the option with the lowest loss.
    """
    given = sample.get("filtered_resps", sample.get("resps"))
    given = given if isinstance(given, list) else [given]
    losses = [r[0] for r in given if isinstance(r, list | tuple) and len(r) == 2 and isinstance(r[0], int | float)]
    if losses and len(losses) == len(given):
        return f"option {losses.index(min(losses))}" if len(losses) > 1 else f"option {given[0][1]}"
    return as_text(given[0] if len(given) == 1 else given)


def as_text(value: object) -> str:
    """Return text as it is, and anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def source_of(cell: dict, task: str) -> str:
    """Return the data set of a task, a name or a folder; tasks of the same data set may share pictures."""
    config = cell["lmms_eval"].get("configs", {}).get(task, {})
    files = (config.get("dataset_kwargs") or {}).get("data_files")
    while isinstance(files, dict | list) and files:
        files = next(iter(files.values() if isinstance(files, dict) else files))
    return str(Path(files).parent) if isinstance(files, str) else config.get("dataset_path") or task


def pictures_of(samples: list[dict], source: str) -> list[str]:
    """Name the picture of each question; where the data set does not say, each question has its own picture."""
    docs = [sample.get("doc") or {} for sample in samples]
    key = next((key for key in _PICTURE_KEYS if docs and all(doc.get(key) not in (None, "") for doc in docs)), None)
    if key is None:
        return [f"{source} question {sample['doc_id']}" for sample in samples]
    return [f"{source} {key} {doc[key]}" for doc in docs]
