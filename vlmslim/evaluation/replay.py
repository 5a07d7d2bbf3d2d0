"""Answers that were given before, as a model of lmms-eval: it grades them without a checkpoint."""

from collections.abc import Sequence

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms

from vlmslim.evaluation.store import digest


class Replay(lmms):
    """Gives the answers to the requests of a task.

    Args:
        kind: of the requests, "generate_until" or "loglikelihood".
        answers: in lmms-eval's order.
        hash: `requests_hash` of the requests that were answered.
    """

    is_simple = True

    def __init__(self, kind: str, answers: Sequence[GenerationResult], hash: str):
        super().__init__()
        self.kind, self.answers, self.hash = kind, answers, hash

    def generate_until(self, requests: list[Instance]) -> Sequence[GenerationResult]:  # type: ignore[override]
        """Return the texts."""
        return self._given(requests)

    def loglikelihood(self, requests: list[Instance]) -> Sequence[GenerationResult]:  # type: ignore[override]
        """Return the scores."""
        return self._given(requests)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Refuse: what a dialogue asks next depends on the answers, so that it is not graded later."""
        raise NotImplementedError("dialogues are answered while lmms-eval asks")

    def _given(self, requests: list[Instance]) -> Sequence[GenerationResult]:
        if requests_hash(requests) != self.hash:
            raise RuntimeError(
                "the task asks other questions here than where they were answered; give all machines the same data, "
                "and start over with --fresh"
            )
        return self.answers

    def clean(self) -> None:
        """Do nothing: there is no model to let go of."""


def requests_hash(requests: Sequence[Instance]) -> str:
    """Hash what lmms-eval asks, without the pictures."""
    return digest(
        [[r.request_type, r.doc_id, r.idx, [part for part in r.args if isinstance(part, str)]] for r in requests]
    )
