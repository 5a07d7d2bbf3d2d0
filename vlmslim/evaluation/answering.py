"""A model's answers to batches of queries: text that it generates, and scores of continuations."""

import copy
import json
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, TokenCounts
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import BatchFeature, Cache

from vlmslim.engine.families import KV_CACHE, kv_cache
from vlmslim.evaluation.conversation import Prompt, Prompter
from vlmslim.evaluation.generation import cut_at, generation_options
from vlmslim.evaluation.prefix import SharedPrefix
from vlmslim.evaluation.queries import Query, Score, naming


def batches_of(queries: Sequence[Query], size: int, shortest_first: bool = False) -> list[list[int]]:
    """Sort queries into batches of at most `size` prompts, as indices. Queries of one prompt stay together.

    The longest go first, so that too large a batch fails at once, unless `shortest_first` asks for other batches.
    """
    prompts = defaultdict(list)
    for i, query in enumerate(queries):
        prompts[i if query.prompt is None else query.prompt].append(i)
    groups = defaultdict(list)
    lengths = {first: max(queries[i].length for i in members) for first, members in prompts.items()}
    for first in sorted(prompts, key=lambda first: -lengths[first], reverse=shortest_first):
        members = prompts[first]
        groups[json.dumps(queries[members[0]].options, sort_keys=True, default=str)].append(members)
    return [
        [i for members in group[start : start + size] for i in members]
        for group in groups.values()
        for start in range(0, len(group), size)
    ]


@dataclass
class Batch:
    """Queries that the model answers together, and what it reads.

    queries : the queries
    inputs  : of `generate()`, one row for each prompt
    rows    : for each row, the numbers of its queries
    answers : for each query, the ids of the continuation to score; empty if the model generates
    """

    queries: Sequence[Query]
    inputs: BatchFeature
    rows: list[list[int]]
    answers: list[list[int]] = field(default_factory=list)


class Answerer:
    """A model that reads and answers batches, with whatever patch it has at the moment.

    Args:
        model: a LLaVA of transformers.
        prompter: turns conversations into its inputs.
        share_prefix: prefill the tokens with which all prompts of a batch begin once; see `SharedPrefix`.

    Attributes:
        seconds: spent in `generate()`.
        new_tokens: that it generated.
    """

    def __init__(self, model: Any, prompter: Prompter, share_prefix: bool = False):
        self.model, self.prompter, self.tokenizer = model, prompter, prompter.tokenizer
        self._prefix = SharedPrefix(model) if share_prefix else None
        self.seconds, self.new_tokens = 0.0, 0

    def read(self, queries: Sequence[Query]) -> Batch:
        """Load the pictures of some queries and encode their prompts. Queries of one prompt share its row."""
        rendered: dict[Any, Prompt] = {}
        prompts = []
        for i, query in enumerate(queries):
            key = i if query.prompt is None else query.prompt
            if key not in rendered:
                rendered[key] = self.render(query)
            prompts.append(rendered[key])
        if not queries[0].scores:
            return Batch(queries, self.encode(prompts), [[i] for i in range(len(queries))])
        rows: dict[Any, list[int]] = defaultdict(list)  # the tokens before an answer may depend on the answer
        wholes, answers = [], []
        for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True)):
            whole, before, answer = self.prompter.continued(prompt, query.target)
            rows[id(prompt), tuple(before)].append(i)
            wholes.append(whole)
            answers.append(answer)
        firsts = [members[0] for members in rows.values()]
        inputs = self.encode([wholes[i] for i in firsts])
        self._cut(inputs, [len(answers[i]) for i in firsts])
        return Batch(queries, inputs, list(rows.values()), answers)

    def render(self, query: Query) -> Prompt:
        """Load the pictures of a query and write its prompt."""
        with naming(query.where):
            return self.prompter.render(query.messages())

    def encode(self, prompts: Sequence[Prompt]) -> BatchFeature:
        """Return the model inputs of some prompts as one batch, on the model's device."""
        return self.prompter.encode(prompts).to(self.model.device, self.model.dtype)

    def _cut(self, inputs: BatchFeature, lengths: Sequence[int]) -> None:
        """Cut so many tokens off the end of each row, and move what is left there, because padding is in front."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        by_token = {name: x for name, x in inputs.items() if getattr(x, "shape", None) == ids.shape}
        for row, n in enumerate(lengths):
            for name, x in by_token.items():
                x[row] = x[row].roll(n)
                x[row, :n] = self.tokenizer.pad_token_id if name == "input_ids" else 0
        start = int(mask.any(0).int().argmax())
        inputs.update({name: x[:, start:] for name, x in by_token.items()})
        inputs["position_ids"] = (mask[:, start:].cumsum(1) - 1).clamp(min=0)

    def answer(self, batch: Batch) -> list[GenerationResult]:
        """Answer each query of a batch: a text, or the `Score` of its continuation."""
        inputs = batch.inputs if self._prefix is None else self._prefix.shortened(batch.inputs)
        return self._score(batch, inputs) if batch.answers else self._generate(batch, inputs)

    def _generate(self, batch: Batch, inputs: BatchFeature) -> list[GenerationResult]:
        options, until = generation_options(batch.queries[0].options)
        pad, eos = self.tokenizer.pad_token_id, self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        started = time.perf_counter()
        output = self.model.generate(**inputs, **options, pad_token_id=pad, eos_token_id=eos)
        new = output[:, inputs["input_ids"].shape[1] :].cpu()  # waits for the device: the time below is whole
        self.seconds += time.perf_counter() - started
        results = []
        for row, mask in zip(new, inputs["attention_mask"], strict=True):
            counts = TokenCounts(input_tokens=int(mask.sum()), output_tokens=int((row != pad).sum()))
            self.new_tokens += counts.output_tokens
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            results.append(GenerationResult(cut_at(text, until), counts))
        return results

    def _score(self, batch: Batch, inputs: BatchFeature) -> list[GenerationResult]:
        """Score continuations.

        The prompts are prefilled alone, once, because no method may see an answer when it chooses tokens. The
        continuations follow through the KV cache, one of each prompt at a time.
        """
        mask, held = inputs["attention_mask"], kv_cache(inputs.data)
        seen = 0 if held is None else held.get_seq_length()
        own = {name: x[:, seen:] for name, x in inputs.items() if name in ("input_ids", "position_ids")}
        output = self.model(**{**inputs, **own}, use_cache=True, logits_to_keep=1)
        cache = kv_cache(output)
        assert cache is not None
        scores: dict[int, GenerationResult] = {}
        rounds = max(len(members) for members in batch.rows)
        for turn in range(rounds):
            asked = [members[turn] if turn < len(members) else None for members in batch.rows]
            answers = [[] if i is None else batch.answers[i] for i in asked]
            logits = output.logits
            if max(map(len, answers)) > 1:
                follow = self._follow(answers, mask, cache, again=turn + 1 < rounds)
                logits = torch.cat([logits, follow.to(logits.device)], 1)
            for i, row, answer in zip(asked, logits.float(), answers, strict=True):
                if i is not None:
                    target = torch.tensor(answer, device=row.device)
                    loss = torch.nn.functional.cross_entropy(row[: len(answer)], target)
                    scores[i] = Score(loss.item(), bool((row[: len(answer)].argmax(-1) == target).all()))
        return [scores[i] for i in range(len(batch.queries))]

    def _follow(self, answers: list[list[int]], mask: Tensor, cache: Cache, again: bool) -> Tensor:
        """Return the logits (B, T - 1, vocabulary) after each token but the last of `answers`, padded to T tokens.

        Args:
            answers: one for each row of the KV cache; it may be empty.
            mask: (B, L) of the prompts.
            cache: of the prompts.
            again: leave the cache as it is, for other answers.
        """
        ids = pad_sequence(
            [torch.tensor(answer, dtype=torch.long) for answer in answers],
            batch_first=True,
            padding_value=self.tokenizer.pad_token_id,
        ).to(mask.device)[:, :-1]
        given = torch.zeros_like(ids, dtype=mask.dtype)
        for row, answer in enumerate(answers):
            given[row, : len(answer)] = 1
        slides = any(getattr(layer, "is_sliding", False) for layer in cache.layers)  # such layers forget, for good
        if again and slides:
            cache = copy.deepcopy(cache)
        output = self.model(
            input_ids=ids,
            attention_mask=torch.cat([mask, given], 1),
            position_ids=mask.sum(1, keepdim=True) + torch.arange(ids.shape[1], device=mask.device),
            **{KV_CACHE: cache},
        )
        if again and not slides:
            cache.crop(-ids.shape[1])
        return output.logits
