"""The lmms-eval model `vlmslim`: a LLaVA of transformers, with or without a compression method.

    python -m lmms_eval --model vlmslim --model_args pretrained=PATH,method=divprune,keep=64 --tasks pope --batch_size 8

One implementation serves lmms-eval's simple protocol (`VlmSlim`) and its chat protocol (`VlmSlimChat`).
"""

import dataclasses
import inspect
import json
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

import vlmslim
from vlmslim.engine.families import KV_CACHE, kv_cache
from vlmslim.evaluation.conversation import Prompt, Prompter, user_message
from vlmslim.evaluation.preflight import check_effect
from vlmslim.evaluation.progress import MakeBar
from vlmslim.io.messages import did_you_mean
from vlmslim.loading import Located, load, located, stages_of
from vlmslim.registry import build

SAMPLING = ("temperature", "top_p", "top_k")
PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size", "min_new_tokens")


class RequestError(RuntimeError):
    """A request could not be answered; the message names its task and document, the cause is chained."""


@dataclass
class Query:
    """One prompt to answer. Its messages are built late, so that only one batch of pictures is in memory."""

    where: str  # "TASK document ID"
    messages: Callable[[], list[dict]]
    length: int  # characters: queries of similar length share a batch
    options: dict = field(default_factory=dict)  # the task's generation arguments
    target: str = ""  # continuation to score


class Score(GenerationResult):
    """The pair (loss, greedy) of a continuation.

    lmms-eval 0.7 turns every other pair into text before its tasks see it, and then they fail; what a
    `GenerationResult` holds, it hands over as it is.
    """

    def __init__(self, loss: float, greedy: bool):
        super().__init__((loss, greedy))

    def __iter__(self):
        return iter(self.text)


class VlmSlim(lmms):
    """`LlavaForConditionalGeneration` and its relatives behind lmms-eval's simple protocol.

    Args:
        pretrained: directory, hub id, `bundled/NAME`, what `Slim.save_pretrained` wrote, or a model that is already
            loaded (then give `processor` too).
        method: a compression method; its options (`keep=64`, `layer=2`, ...) are further arguments. A JSON list makes
            stages: `method=[{"method": "divprune", "keep": 128}, {"method": "fastv", "keep": 64}]`. By default the
            saved one, whose options further arguments replace, or none.
        batch_size: prompts per forward.
        device: where to run; by default the GPU of this process, or else the CPU.
        dtype: a torch dtype by name, or "auto" for the checkpoint's own; by default float32 on a CPU, else "auto".
        device_map: given to `from_pretrained`, for a model larger than one device.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`, ...
        revision: branch, tag or commit on the hub.
        trust_remote_code: let a checkpoint from the hub bring its own code.
        max_frames_num: most frames taken from a video, evenly spaced.
        system_prompt: first message of every conversation, as text or as the path of a text file.
        processor: the processor of a model that is already loaded.
        **options: options of `method`.

    Raises:
        ValueError: an unknown argument, method or option, or a value out of range.
    """

    is_simple = True  # lmms-eval asks: which protocol?

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        method: str | list | None = None,
        batch_size: int | str = 1,
        device: str | None = None,
        dtype: str | None = None,
        device_map: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_frames_num: int = 32,
        system_prompt: str | None = None,
        processor: ProcessorMixin | None = None,
        **options,
    ):
        super().__init__()
        # Methods come first: a typo should not cost the minutes that a checkpoint takes to load.
        method = _parsed(method)
        if isinstance(pretrained, str):
            place = located(pretrained, method, revision=None if revision is None else str(revision), options=options)
            stages = place.stages
        else:
            stages = stages_of(method or "none", options)
        compressors = [_compressor(stage) for stage in stages]
        self.batch_size = _count("batch_size", batch_size)
        frames = _count("max_frames_num", max_frames_num)
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        if isinstance(pretrained, str):
            self.model, processor = self._load(place, device, dtype, device_map, attn_implementation, trust_remote_code)
        elif processor is None:
            raise ValueError("pretrained is a loaded model: give its processor too, processor=...")
        else:
            self.model = pretrained
        self.device = self.model.device
        self.prompter = Prompter(processor, frames, self._resolve_system_prompt(system_prompt))
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.make_bar: MakeBar = partial(tqdm, disable=self.rank != 0)
        self._seconds, self._new_tokens, self._receipt = 0.0, 0, {}
        self._batches_begun = self._batches_done = 0
        self._slim = vlmslim.patch(self.model, compressors)

    def _load(
        self,
        place: Located,
        device: str | None,
        dtype: str | None,
        device_map: str | None,
        attention: str | None,
        trust_remote_code: bool,
    ) -> tuple[PreTrainedModel, ProcessorMixin]:
        if self._world_size > 1 and (device or device_map):
            raise ValueError("several processes share the devices among themselves: drop device and device_map")
        device = device or str(self.accelerator.device)
        dtype = dtype or ("float32" if device == "cpu" and not device_map else "auto")
        return load(
            place,
            dtype=dtype,
            device=device,
            device_map=device_map,
            attention=attention,
            trust_remote_code=trust_remote_code,
        )

    @property
    def receipt(self) -> dict:
        """What compression really did since the model was loaded: `Receipt.summary()`.

        Of this process while it runs; of all processes together, and still readable, once lmms-eval has let go of the
        model.
        """
        return self._slim.receipt.summary() if self._slim else self._receipt

    def clean(self) -> None:
        """Note the receipt, take the patch off, let go of the model. lmms-eval calls this after the last request.

        Raises:
            RuntimeError: every request was answered, and the method did nothing in any of them.
        """
        methods = self._slim.methods if self._slim else []
        if self._slim:
            self._receipt = vlmslim.Receipt.pooled(gather_object([self._slim.receipt])).summary()
            if self.rank == 0:
                logger.info("receipt: {}", json.dumps(self._receipt))
            # `log_metrics` is how a model's numbers get into the results file, as its section "throughput".
            numbers = {k: v for k, v in self._receipt.items() if isinstance(v, int | float)}
            log_metrics(self._seconds, self._new_tokens, self._new_tokens / max(self._seconds, 1e-9), numbers)
            self._slim.remove()
            self._slim = None
        super().clean()
        if methods and 0 < self._batches_done == self._batches_begun:  # a request that failed says more than this
            check_effect(methods, self._receipt)

    # ---------------------------------------------------------------- requests

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request: greedily, unless its task asks for a temperature."""
        return self._in_batches([self._query(request) for request in requests], self._answer)

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Play all conversations side by side, round by round, until its task ends each of them."""
        answers: list[list[str]] = [[] for _ in requests]
        notes: list = [None] * len(requests)
        live, number = {i: self._query(request) for i, request in enumerate(requests)}, 0
        while live:
            number += 1
            results = self._in_batches(list(live.values()), self._answer)
            for (i, query), result in zip(live.copy().items(), results, strict=True):
                state = {"previous_output": [*answers[i], result.text], "previous_round_info": notes[i]}
                with _naming(query.where):
                    live[i], answers[i], notes[i] = self._next_round(requests[i], query, number, state)
            live = {i: query for i, query in live.items() if query}
        return answers

    def loglikelihood(self, requests: list[Instance]) -> list[Score]:
        """Score continuations: the mean negative log-likelihood per token, and whether greedy decoding says the same.

        Negative and per token because lmms-eval wants a loss here: its multiple-choice tasks take the `argmin`.
        """
        return self._in_batches([self._query(request) for request in requests], self._score)

    def _query(self, request: Instance) -> Query:
        context, *middle, doc_id, task, split = request.args
        where, length = f"{task} document {doc_id}", len(context)

        def doc():
            return self.task_dict[task][split][doc_id]

        if not self.is_simple:
            to_messages, options = middle
            return Query(where, lambda: to_messages(doc()), length, options)
        extra, to_visual = middle[:2]

        def messages():
            return user_message(context, to_visual(doc()))

        if request.request_type == "loglikelihood":
            target = extra if isinstance(extra, str) else extra(doc())
            return Query(where, messages, length + len(target), target=target)
        if request.request_type == "generate_until" and (to_messages := _task_messages(to_visual)):
            return Query(where, lambda: to_messages(doc()), length, extra)
        return Query(where, messages, length, extra)

    def _next_round(
        self, request: Instance, query: Query, number: int, state: dict
    ) -> tuple[Query | None, list, object]:
        """What to ask next, the answers so far and the task's notes, all as the task says."""
        *head, doc_id, task, split = request.args
        ask = head[3] if self.is_simple else head[1]  # doc_to_text, doc_to_messages
        *prompt, done, answers, notes = ask(self.task_dict[task][split][doc_id], round_idx=number, **state)
        if done:
            return None, list(answers), notes
        messages = user_message(prompt[1], prompt[0]) if self.is_simple else prompt[0]
        return dataclasses.replace(query, messages=lambda: messages), list(answers), notes

    # ---------------------------------------------------------------- batches

    def inputs(self, requests: list[Instance]) -> BatchFeature:
        """What `generate()` of the model is given for these requests, as one batch."""
        return self._encode([self._prompt(self._query(request)) for request in requests])

    def _in_batches(self, queries: list[Query], work: Callable[[list[Query], list[Prompt]], list]) -> list:
        """Results in the order of `queries`; the longest go first, so that too large a batch fails at once."""
        self._batches_begun += 1
        groups = defaultdict(list)
        for i in sorted(range(len(queries)), key=lambda i: -queries[i].length):
            groups[json.dumps(queries[i].options, sort_keys=True, default=str)].append(i)
        results: list = [None] * len(queries)
        with self.make_bar(total=len(queries), desc="vlmslim") as bar:
            for group in groups.values():
                for start in range(0, len(group), self.batch_size):
                    batch = group[start : start + self.batch_size]
                    members = [queries[i] for i in batch]
                    with _naming(", ".join(query.where for query in members)), torch.inference_mode():
                        for i, result in zip(batch, work(members, list(map(self._prompt, members))), strict=True):
                            results[i] = result
                    bar.update(len(batch))
        self._batches_done += 1
        return results

    def _prompt(self, query: Query) -> Prompt:
        with _naming(query.where):
            return self.prompter.render(query.messages())

    def _encode(self, prompts: list[Prompt]) -> BatchFeature:
        return self.prompter.encode(prompts).to(self.device, self.model.dtype)

    def _answer(self, queries: list[Query], prompts: list[Prompt]) -> list[GenerationResult]:
        options, until = _generation_options(queries[0].options)
        inputs = self._encode(prompts)
        pad, eos = self.tokenizer.pad_token_id, self.model.generation_config.eos_token_id
        eos = self.tokenizer.eos_token_id if eos is None else eos
        started = time.perf_counter()
        output = self.model.generate(**inputs, **options, pad_token_id=pad, eos_token_id=eos)
        new = output[:, inputs["input_ids"].shape[1] :].cpu()  # waits for the device: the time below is whole
        self._seconds += time.perf_counter() - started
        results = []
        for row, mask in zip(new, inputs["attention_mask"], strict=True):
            counts = TokenCounts(input_tokens=int(mask.sum()), output_tokens=int((row != pad).sum()))
            self._new_tokens += counts.output_tokens
            results.append(GenerationResult(_cut(self.tokenizer.decode(row, skip_special_tokens=True), until), counts))
        return results

    def _score(self, queries: list[Query], prompts: list[Prompt]) -> list[Score]:
        """Prefill the prompts alone, then feed the answers: no method may see an answer when it chooses tokens."""
        pairs = [self.prompter.continued(prompt, query.target) for prompt, query in zip(prompts, queries, strict=True)]
        wholes, lengths = zip(*pairs, strict=True)
        inputs = self._encode(wholes)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        answers, given = ids.new_zeros(len(ids), max(lengths)), mask.new_zeros(len(ids), max(lengths))
        for row, n in enumerate(lengths):  # cut the answer off the end; what remains moves up, behind more padding
            answers[row, :n], given[row, :n] = ids[row, -n:], 1
            ids[row], mask[row] = ids[row].roll(n), mask[row].roll(n)
            ids[row, :n], mask[row, :n] = self.tokenizer.pad_token_id, 0
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        output = self.model(**inputs, use_cache=True, logits_to_keep=1)
        logits = [output.logits]
        if max(lengths) > 1:
            following = {
                "input_ids": answers[:, :-1],
                "attention_mask": torch.cat([mask, given[:, :-1]], 1),
                "position_ids": mask.sum(1, keepdim=True) + torch.arange(max(lengths) - 1, device=mask.device),
            }
            logits.append(self.model(**following, **{KV_CACHE: kv_cache(output)}).logits)
        results = []
        for logit, answer, n in zip(
            torch.cat(logits, 1).float(), answers.to(output.logits.device), lengths, strict=True
        ):
            loss = torch.nn.functional.cross_entropy(logit[:n], answer[:n])
            results.append(Score(loss.item(), bool((logit[:n].argmax(-1) == answer[:n]).all())))
        return results


class VlmSlimChat(VlmSlim):
    """The same behind lmms-eval's chat protocol, which knows no log-likelihood."""

    is_simple = False


@contextmanager
def _naming(where: str):
    """Say in an exception which documents it belongs to; the innermost name wins."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        raise RequestError(f"{where}: {type(error).__name__}: {error}") from error


def _parsed(method: str | list | None) -> str | list | None:
    """The argument `method`, its stages read from JSON."""
    return json.loads(method) if isinstance(method, str) and method.startswith("[") else method


def _compressor(stage: str | dict | vlmslim.Compressor) -> vlmslim.Compressor:
    """The method that a stage asks for, with a hint if an unknown option looks like an argument of the model."""
    try:
        return build(stage)
    except ValueError as error:
        options = [option for option in stage if option != "method"] if isinstance(stage, dict) else []
        own = inspect.signature(VlmSlim).parameters
        hints = {option: did_you_mean(option, own) for option in options}
        said = (f" Or is {option!r} an argument of the model?{hint}" for option, hint in hints.items() if hint)
        raise ValueError(f"{error}.{''.join(said)}") from error


def _count(name: str, value: int | str) -> int:
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name}={value!r}: give a whole number from 1 up")
    return int(value)


def _task_messages(to_visual: Callable) -> Callable[[dict], list[dict]] | None:
    """`doc_to_messages` of the task that owns `to_visual`, if it brings one, called as the chat protocol calls it."""
    task = getattr(to_visual, "__self__", None)
    build = getattr(getattr(task, "config", None), "doc_to_messages", None)
    if not callable(build) or task.OUTPUT_TYPE != "generate_until":
        return None
    settings = task.lmms_eval_specific_kwargs
    if settings is not None:
        parameters = inspect.signature(build).parameters.values()
        if any(p.name == "lmms_eval_specific_kwargs" or p.kind is p.VAR_KEYWORD for p in parameters):
            return lambda doc: build(doc, lmms_eval_specific_kwargs=settings)
    return build


def _generation_options(given: dict) -> tuple[dict, list[str]]:
    """Arguments for `generate()`, and the strings to stop at, from a task's `generation_kwargs`."""
    given = {name: value for name, value in given.items() if value is not None}
    until = given.pop("until", [])
    tokens = given.pop("max_new_tokens", given.pop("max_gen_toks", 1024))
    sampling = {name: given.pop(name, None) for name in SAMPLING}
    sample = given.pop("do_sample", False)
    if sampling["temperature"] is not None:
        sample = sampling["temperature"] > 0
    options = {name: given.pop(name) for name in PASSED_ON if name in given}
    for name in given:
        _warn_ignored(name)
    if not sample:
        sampling = dict.fromkeys(SAMPLING)  # None also silences what the checkpoint's generation config says
    else:
        sampling = {name: value for name, value in sampling.items() if value is not None}
    options |= {"max_new_tokens": int(tokens), "do_sample": bool(sample), **sampling}
    return options, [until] if isinstance(until, str) else until


@cache
def _warn_ignored(name: str) -> None:
    logger.warning("the generation argument {!r} means nothing to this model and is ignored", name)


def _cut(text: str, until: list[str]) -> str:
    """`text` up to the first of the strings `until`."""
    return text[: min((at for stop in until if (at := text.find(stop)) >= 0), default=len(text))]
