"""Methods that take turns on batches of prompts, so that each batch is read and encoded once for all of them."""

import copy
import gc
import time
from collections.abc import Sequence

import torch
from lmms_eval.api.instance import GenerationResult

from vlmslim.evaluation.answering import Batch, batches_of
from vlmslim.evaluation.cells import Answers, Asked
from vlmslim.evaluation.checkpoint import Checkpoint
from vlmslim.evaluation.progress import Bar
from vlmslim.evaluation.queries import Query, RequestError, naming_all
from vlmslim.evaluation.variants import Variant
from vlmslim.patching import Slim, shared_encoding
from vlmslim.receipt import Receipt


class Turns:
    """The answers of several methods to the requests of a task, batch by batch.

    The methods share the pictures, their preprocessing, the vision tower and the projector, of one batch at a time. A
    method that fails sits out the rest, and its answers carry the failure.

    Args:
        asked: the requests.
        checkpoint: the model.
        variants: the methods.
        seed: of the random numbers of a batch, together with the number of the batch.
    """

    def __init__(self, asked: Asked, checkpoint: Checkpoint, variants: Sequence[Variant], seed: int):
        self._asked, self._answerer, self._seed = asked, checkpoint.answerer, seed
        self._slims = {variant.label: checkpoint.kept_patch(variant) for variant in variants}
        self._shared = shared_encoding(self._slims.values())
        self._common = 0.0  # seconds of all methods together
        self._answers = {
            label: Answers(asked.kind, asked.hash, protocol=checkpoint.protocol, hardware=checkpoint.hardware)
            for label in self._slims
        }

    def take(self, number: int, batch: Sequence[int], bar: Bar, size: int, may_shrink: bool = False) -> int:
        """Answer a batch under each method, in pieces of at most `size` prompts.

        Args:
            number: of the batch. It decides the random numbers, so that a batch draws the same after any other.
            batch: the numbers of its requests, as `batches_of` sorts them.
            bar: advances by one for each answer.
            size: prompts of a piece.
            may_shrink: where memory runs out, forget the piece and halve `size`, down to one prompt.

        Returns:
            The size at the end.
        """
        left = list(batch)
        while left:
            queries = [self._asked.queries[i] for i in left]
            piece = [left[i] for i in batches_of(queries, size)[0]]
            prompts = len(batches_of(queries[: len(piece)], 1))
            if self._fits(number, piece, bar, may_shrink and prompts > 1):
                left = left[len(piece) :]
            else:
                size = prompts // 2
        return size

    def _fits(self, number: int, piece: Sequence[int], bar: Bar, may_shrink: bool) -> bool:
        """Answer a piece under each method. Return False if memory ran out; then none of its answers counts."""
        queries = [self._asked.queries[i] for i in piece]
        given: dict[str, tuple[list[GenerationResult], Receipt]] = {}
        begun, shown, fits = time.perf_counter(), 0, False
        try:
            with naming_all(queries):
                batch = self._answerer.read(queries)
            self._common += time.perf_counter() - begun
            for label, slim in self._slims.items():
                turn, begun = self._answers[label], time.perf_counter()
                if turn.failure is None:
                    try:
                        given[label] = self._turn(slim, queries, batch, number)
                    except Exception as error:  # a method may raise anything; its own cell fails, with this error
                        if may_shrink and ran_out_of_memory(error):
                            raise
                        turn.failure = error
                turn.seconds += time.perf_counter() - begun
                bar.update(len(piece))
                shown += len(piece)
            fits = True
        except RequestError as error:
            if not (may_shrink and ran_out_of_memory(error)):
                raise
        if not fits:  # the error is gone here, and with it all tensors that its traceback held
            self._free()
            bar.update(-shown)
            return False
        for label, (results, receipt) in given.items():
            turn = self._answers[label]
            turn.results.update(zip(piece, results, strict=True))
            turn.receipt = receipt if turn.receipt is None else Receipt.pooled([turn.receipt, receipt])
        return True

    def _turn(
        self, slim: Slim, queries: Sequence[Query], batch: Batch, number: int
    ) -> tuple[list[GenerationResult], Receipt]:
        """Answer a batch under one method. Returns the answers, and the receipt of them alone."""
        torch.manual_seed(self._seed + number)
        slim.reset_receipt()
        with slim.attach(self._shared), naming_all(queries):
            results = self._answerer.answer(batch)
        return results, copy.copy(slim.receipt)

    def _free(self) -> None:
        """Give memory back after a piece that did not fit."""
        self._shared.forget()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def end(self) -> dict[str, Answers]:
        """Return the answers by method, after the last batch."""
        self._shared.forget()
        for turn in self._answers.values():
            turn.seconds += self._common / len(self._answers)
        return self._answers


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Tell whether an error, or one that caused it, says that a device has no memory left."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False
