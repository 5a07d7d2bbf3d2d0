"""Requests of lmms-eval, in its simple and in its chat protocol, as queries that a model answers."""

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance

from vlmslim.evaluation.conversation import Message, user_message

#: Task -> split -> documents.
Documents = Mapping[str, Mapping[str, Any]]


class RequestError(RuntimeError):
    """A request that could not be answered; the message names its task and document, and the cause is chained."""


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Say in an exception which documents it belongs to; the innermost name wins."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:  # a model or a task may raise anything; the error goes on, with the documents
        raise RequestError(f"{where}: {type(error).__name__}: {error}") from error


def naming_all(queries: "Iterable[Query]") -> AbstractContextManager[None]:
    """Say in an exception which documents a batch holds."""
    return naming(", ".join(dict.fromkeys(query.where for query in queries)))


@dataclass
class Query:
    """One prompt to answer.

    where    : "TASK document ID"
    messages : makes the conversation; late, so that only the pictures of one batch are in memory
    length   : characters of text, because queries of similar length share a batch
    options  : the generation arguments of the task
    target   : a continuation to score, for log-likelihood
    prompt   : the same for queries that ask the same and have other continuations; None if no other query does
    """

    where: str
    messages: Callable[[], list[Message]]
    length: int
    options: dict[str, Any] = field(default_factory=dict)
    target: str = ""
    prompt: Hashable = None

    @property
    def scores(self) -> bool:
        """True if a continuation is to be scored, and nothing generated."""
        return self.prompt is not None


class Score(GenerationResult):
    """The pair (loss, greedy) of a continuation.

    lmms-eval 0.7 turns every other pair into text before its tasks see it, and then they fail. It hands over what a
    `GenerationResult` holds as it is.
    """

    def __init__(self, loss: float, greedy: bool):
        super().__init__((loss, greedy))

    def __iter__(self) -> Iterator[float | bool]:
        return iter(self.text)


def query_of(request: Instance, documents: Documents, simple: bool) -> Query:
    """Read a request.

    Args:
        request: of the kind `generate_until`, `generate_until_multi_round` or `loglikelihood`.
        documents: of all tasks.
        simple: whether the request follows the simple protocol, not the chat protocol.
    """
    context, *middle, doc_id, task, split = request.args
    where, length = f"{task} document {doc_id}", len(context)

    def document() -> Any:
        return documents[task][split][doc_id]

    if not simple:
        to_messages, options = middle
        return Query(where, lambda: to_messages(document()), length, options)
    extra, to_visual = middle[:2]

    def messages() -> list[Message]:
        return user_message(context, to_visual(document()))

    if request.request_type == "loglikelihood":
        target = extra if isinstance(extra, str) else extra(document())
        return Query(where, messages, length + len(target), target=target, prompt=(where, context))
    if request.request_type == "generate_until" and (build := _message_builder(to_visual)):
        return Query(where, lambda: build(document()), length, extra)
    return Query(where, messages, length, extra)


@dataclass
class Dialogue:
    """A request of several rounds, while it is played.

    query   : what to ask next; None when the task ended the conversation
    answers : so far
    notes   : what the task keeps from round to round
    """

    request: Instance
    query: Query | None
    answers: list[str] = field(default_factory=list)
    notes: Any = None

    def answer(self, text: str, number: int, documents: Documents, simple: bool) -> None:
        """Take in an answer, and let the task say what to ask in round `number`, or that the conversation ends."""
        assert self.query is not None
        *head, doc_id, task, split = self.request.args
        ask = head[3] if simple else head[1]  # doc_to_text, doc_to_messages
        state = {"previous_output": [*self.answers, text], "previous_round_info": self.notes}
        with naming(self.query.where):
            *prompt, done, answers, self.notes = ask(documents[task][split][doc_id], round_idx=number, **state)
        self.answers = list(answers)
        if done:
            self.query = None
        else:
            messages = user_message(prompt[1], prompt[0]) if simple else prompt[0]
            self.query = dataclasses.replace(self.query, messages=lambda: messages)


def _message_builder(to_visual: Callable) -> Callable[[dict], list[Message]] | None:
    """Return `doc_to_messages` of the task that owns `to_visual`, if it has one, called as the chat protocol does."""
    task = getattr(to_visual, "__self__", None)
    build = getattr(getattr(task, "config", None), "doc_to_messages", None)
    if task is None or not callable(build) or task.OUTPUT_TYPE != "generate_until":
        return None
    settings = task.lmms_eval_specific_kwargs
    if settings is not None:
        parameters = inspect.signature(build).parameters.values()
        if any(p.name == "lmms_eval_specific_kwargs" or p.kind is p.VAR_KEYWORD for p in parameters):
            return lambda doc: build(doc, lmms_eval_specific_kwargs=settings)
    return build
