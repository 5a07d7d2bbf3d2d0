"""The questions of a run, one by one: what was asked, and what each row answered."""

from collections.abc import Sequence
from dataclasses import dataclass

from vlmslim.leaderboard.samples import as_text, given_answer, pictures_of, question_score


@dataclass(frozen=True)
class Questions:
    """The questions of one task, with the answers and scores of every row that finished the task.

    ids      : numbers of the questions in the task's data, lmms-eval's `doc_id`
    prompts  : the text that was asked, without the tokens of pictures
    targets  : the expected answers
    pictures : name of each question's picture; questions of the task about one picture share the name
    answers  : label -> the row's answers, as given
    scores   : label -> the row's scores; None where lmms-eval logs no score of the question
    """

    task: str
    ids: list[int]
    prompts: list[str]
    targets: list[str]
    pictures: list[str]
    answers: dict[str, list[str]]
    scores: dict[str, list[float | None]]

    @classmethod
    def of(cls, task: str, samples: dict[str, list[dict]], metric: str) -> "Questions":
        """Read the questions of a task.

        Args:
            task: its name.
            samples: label of a row -> its samples, the same questions in the same order for every row.
            metric: the metric whose scores are wanted.
        """
        first = next(iter(samples.values()))
        return cls(
            task,
            [sample["doc_id"] for sample in first],
            [_prompt(sample.get("arguments", ())) for sample in first],
            [as_text(sample.get("target")) for sample in first],
            [name.strip() for name in pictures_of(first, "")],  # without the source, which may be a path of the machine
            {label: [given_answer(sample) for sample in own] for label, own in samples.items()},
            {label: [question_score(sample, metric) for sample in own] for label, own in samples.items()},
        )


def _prompt(arguments: Sequence[object]) -> str:
    """Return the text of a request; it is the first text among its arguments."""
    return next((value for value in arguments if isinstance(value, str)), "")
