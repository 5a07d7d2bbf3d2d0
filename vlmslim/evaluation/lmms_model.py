"""The lmms-eval model `vlmslim`: a LLaVA of transformers, with or without a compression method.

    python -m lmms_eval --model vlmslim --model_args pretrained=PATH,method=divprune,keep=64 --tasks pope --batch_size 8

One implementation serves lmms-eval's simple protocol (`VlmSlim`) and its chat protocol (`VlmSlimChat`).
"""

import inspect
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics
from loguru import logger
from tqdm import tqdm
from transformers import BatchFeature, PreTrainedModel, ProcessorMixin

from vlmslim.compressor import Compressor
from vlmslim.evaluation.answering import Answerer, batches_of
from vlmslim.evaluation.conversation import Prompter
from vlmslim.evaluation.effect import abstentions, check_effect
from vlmslim.evaluation.progress import MakeBar
from vlmslim.evaluation.queries import Dialogue, Query, naming_all, query_of
from vlmslim.io.messages import did_you_mean
from vlmslim.loading import Located, load, located, stages_of
from vlmslim.originals import protocol as protocols
from vlmslim.patching import Slim, patch
from vlmslim.receipt import Receipt
from vlmslim.registry import Spec, build


class VlmSlim(lmms):
    """`LlavaForConditionalGeneration` and its relatives for lmms-eval's simple protocol.

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
        protocol: `original` for the pictures and prompts of LLaVA's authors, `hf` for those of HF's conversions; by
            default the checkpoint's own.
        image_aspect_ratio: `pad` or `crop`, one part of the protocol.
        conversation: `vicuna_v1`, `mistral_instruct`, `qwen_1_5`, ...: the other part.
        share_prefix: prefill the tokens with which all prompts of a batch begin once, for methods that act before the
            language model. The last bits of a number may change.
        processor: the processor of a model that is already loaded.
        **options: options of `method`.

    Raises:
        ValueError: an unknown argument, method or option, or a value out of range.
    """

    is_simple = True  # lmms-eval reads here which protocol to use
    shortest_first = False  # ask the longest prompts first, so that too large a batch fails at once
    model: Any  # a model of transformers, which does not declare `generate`

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
        protocol: str | None = None,
        image_aspect_ratio: str | None = None,
        conversation: str | None = None,
        share_prefix: bool = False,
        processor: ProcessorMixin | None = None,
        **options: Any,
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
        protocols.check(protocol, image_aspect_ratio, conversation)
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
        protocols.apply(processor, self.model.config, protocol, image_aspect_ratio, conversation)
        self.protocol: dict[str, Any] = {**protocols.describe(processor, self.model.config)}
        if share_prefix:
            self.protocol["share_prefix"] = True
        self.prompter = Prompter(processor, frames, self._resolve_system_prompt(system_prompt))
        self.processor, self.tokenizer = processor, processor.tokenizer
        self.make_bar: MakeBar = partial(tqdm, disable=self.rank != 0)
        self.answerer = Answerer(self.model, self.prompter, share_prefix)
        self._receipt: dict[str, Any] = {}
        self._batches_begun = self._batches_done = 0
        self._slim: Slim | None = patch(self.model, compressors)

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
        """The receipt of the compression since the model was loaded: `Receipt.summary()`.

        While the model runs, the receipt is of this process. After lmms-eval has let go of the model it is of all
        processes together.
        """
        return self._slim.receipt.summary() if self._slim else self._receipt

    def clean(self) -> None:
        """Note the receipt, take the patch off, let go of the model. lmms-eval calls this after the last request.

        Raises:
            RuntimeError: every request was answered, and a stage of the method did nothing in any of them.
        """
        slim, self._slim = self._slim, None
        if slim is not None:
            slim.remove()
            self._receipt = Receipt.pooled(gather_object([slim.receipt])).summary()
            # `log_metrics` is how a model's numbers get into the results file, as its section "throughput".
            numbers = {k: v for k, v in self._receipt.items() if isinstance(v, int | float)}
            if not self._batches_begun:  # answers of `--use_cache`: a receipt of zeros would look like a result
                numbers = {}
            seconds, tokens = self.answerer.seconds, self.answerer.new_tokens
            log_metrics(seconds, tokens, tokens / max(seconds, 1e-9), numbers)
        super().clean()
        if slim is not None and self.rank == 0 and not self._batches_begun:
            logger.warning(
                "the model was not asked anything: the answers came from lmms-eval's cache, so there is no receipt"
            )
        elif slim is not None and self.rank == 0:
            logger.info("receipt: {}", json.dumps(self._receipt))
            for line in abstentions([self._receipt]):
                logger.warning("{}", line)
        if slim is not None and 0 < self._batches_done == self._batches_begun:  # else a failed request says more
            check_effect(self._receipt)

    # ---------------------------------------------------------------- requests

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request: greedily, unless its task asks for a temperature."""
        return self._answers([self._query(request) for request in requests])

    def generate_until_multi_round(self, requests: list[Instance]) -> list[list[str]]:
        """Play all dialogues side by side, round by round, until its task ends each of them."""
        dialogues = [Dialogue(request, self._query(request)) for request in requests]
        number = 0
        while live := [dialogue for dialogue in dialogues if dialogue.query is not None]:
            number += 1
            results = self._answers([dialogue.query for dialogue in live if dialogue.query])
            for dialogue, result in zip(live, results, strict=True):
                dialogue.answer(result.text, number, self.task_dict, self.is_simple)
        return [dialogue.answers for dialogue in dialogues]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score continuations: the mean negative log-likelihood per token, and whether greedy decoding says the same.

        Negative and per token because lmms-eval wants a loss here: its multiple-choice tasks take the `argmin`.
        """
        return self._answers([self._query(request) for request in requests])

    def _query(self, request: Instance) -> Query:
        return query_of(request, self.task_dict, self.is_simple)

    # ---------------------------------------------------------------- batches

    def inputs(self, requests: list[Instance]) -> BatchFeature:
        """Return the inputs of `generate()` for these requests, as one batch."""
        return self.answerer.encode([self.answerer.render(self._query(request)) for request in requests])

    def _answers(self, queries: Sequence[Query]) -> list[GenerationResult]:
        """Return answers in the order of `queries`."""
        if not queries:  # lmms-eval's cache has all the answers
            return []
        self._batches_begun += 1
        results: dict[int, GenerationResult] = {}
        with self.make_bar(total=len(queries), desc="vlmslim") as bar:
            for batch in batches_of(queries, self.batch_size, self.shortest_first):
                members = [queries[i] for i in batch]
                with naming_all(members), torch.inference_mode():
                    done = self.answerer.answer(self.answerer.read(members))
                results.update(zip(batch, done, strict=True))
                bar.update(len(batch))
        self._batches_done += 1
        return [results[i] for i in range(len(queries))]


class VlmSlimChat(VlmSlim):
    """The same model for lmms-eval's chat protocol, which knows no log-likelihood."""

    is_simple = False


def _parsed(method: str | list | None) -> str | list | None:
    """Return the argument `method`, with its stages read from JSON."""
    if not isinstance(method, str) or not method.startswith("["):
        return method
    try:
        return json.loads(method)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"method={method}: this is no JSON ({error}); write stages as "
            'method=[{"method": "divprune", "keep": 128}, {"method": "fastv", "keep": 64}]'
        ) from error


def _compressor(stage: Spec) -> Compressor:
    """Make the method of a stage; hint at an argument of the model if an unknown option looks like one."""
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
