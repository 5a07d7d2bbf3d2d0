"""Records that pass between a harness and a run: requests of a task, the answers to them, and graded cells."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from lmms_eval.api.instance import GenerationResult, TokenCounts

from vlmslim.evaluation.queries import Query, Score
from vlmslim.evaluation.variants import Variant
from vlmslim.receipt import Receipt

UNPATCHED = Variant("none", ({"method": "none"},))

#: Task -> the methods whose cells are missing.
Todo = Mapping[str, Sequence[Variant]]


@dataclass(frozen=True)
class Cell:
    """One method on one task, evaluated.

    protocol     : how pictures and prompts were prepared, as `vlmslim.originals.protocol.describe` says it
    method_flops : of the method itself, for a prompt
    seconds      : the method's own, and an equal part of what the methods shared
    hardware     : that answered; "" for that of this process
    batch_size   : prompts of a batch; with `batch_size: auto`, the number that was found
    """

    results: dict
    samples: list[dict]
    receipt: dict
    protocol: dict = field(default_factory=dict)
    method_flops: float = 0.0
    seconds: float = 0.0
    hardware: str = ""
    batch_size: int = 1


@dataclass
class Answers:
    """Answers of one method to the requests of a task.

    kind    : of the requests: "generate_until" or "loglikelihood"
    hash    : `requests_hash` of the requests
    results : by the number of the request
    receipt : of these answers alone
    whole   : the finished cell, where lmms-eval had to ask on and on; then there are no results
    failure : why there are none
    protocol, method_flops, seconds, hardware, batch_size : as in `Cell`
    """

    kind: str = ""
    hash: str = ""
    results: dict[int, GenerationResult] = field(default_factory=dict)
    receipt: Receipt | None = None
    protocol: dict = field(default_factory=dict)
    method_flops: float = 0.0
    seconds: float = 0.0
    hardware: str = ""
    batch_size: int = 1
    whole: Cell | None = None
    failure: Exception | None = None

    def as_record(self) -> dict:
        """Return everything, ready for JSON, of answers without a failure to requests that do not depend on answers."""
        assert self.receipt is not None
        return {
            **{name: getattr(self, name) for name in _PLAIN},
            "results": {str(number): _as_record(result) for number, result in self.results.items()},
            "receipt": self.receipt.as_record(),
        }

    @classmethod
    def of_record(cls, record: dict) -> "Answers":
        """Read what `as_record` returned."""
        return cls(
            **{name: record[name] for name in _PLAIN},
            results={int(number): _result(told) for number, told in record["results"].items()},
            receipt=Receipt.of_record(record["receipt"]),
        )

    @classmethod
    def merged(cls, parts: "Sequence[Answers]") -> "Answers":
        """Put the parts of a task together, in their order.

        Raises:
            RuntimeError: the parts answer different questions.
        """
        first = next((part for part in parts if part.failure is not None), parts[0])
        if len(parts) == 1 or first.failure is not None:
            return first
        if len({part.hash for part in parts}) > 1:
            raise RuntimeError("the task asks other questions on another machine; give all machines the same data")
        return replace(
            first,
            results={number: result for part in parts for number, result in part.results.items()},
            receipt=Receipt.pooled([part.receipt for part in parts if part.receipt is not None]),
            seconds=sum(part.seconds for part in parts),
            batch_size=min(part.batch_size for part in parts),
        )


_PLAIN = ("kind", "hash", "protocol", "method_flops", "seconds", "hardware", "batch_size")


def _as_record(result: GenerationResult) -> dict:
    """Write a text with the tokens that it took, or the loss of a continuation."""
    if isinstance(result, Score):
        loss, greedy = result
        return {"loss": loss, "greedy": greedy}
    return {"text": result.text, "tokens": asdict(result.token_counts or TokenCounts())}


def _result(told: dict) -> GenerationResult:
    """Read what `_as_record` wrote."""
    if "loss" in told:
        return Score(told["loss"], told["greedy"])
    return GenerationResult(told["text"], TokenCounts(**told["tokens"]))


@dataclass(frozen=True)
class Asked:
    """The requests of a task, of one `kind`, and their `hash`."""

    kind: str
    queries: list[Query]
    hash: str


@dataclass(frozen=True)
class Sample:
    """Some questions of a task, and how they are asked.

    first, count   : the block of questions; a count of None means all that follow
    batch_size     : by default the comparison's
    shortest_first : ask the shortest prompts first, so that other prompts share a batch
    """

    first: int = 0
    count: int | None = None
    batch_size: int | None = None
    shortest_first: bool = False
