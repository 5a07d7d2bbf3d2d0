"""Runs of a model, patched or not: its answers to the prompts, in every way that must give the same logits."""

import copy
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Cache, PreTrainedModel

from vlmslim.cost.memory import cache_bytes, peak_memory
from vlmslim.doctor.prompts import LONG, Prompts
from vlmslim.doctor.reference import Notes, Reference, noted
from vlmslim.engine.families import KV_CACHE, kv_cache, language_model
from vlmslim.patching import Slim
from vlmslim.receipt import Prefill

STEPS = 5  # tokens of the answer
LAST = 16  # last tokens of a prompt whose logits are compared


class Generated(NamedTuple):
    """A greedy generation.

    answers : (B, T) the new tokens
    logits  : (B, T, V)
    cache   : keys and values of every layer
    """

    answers: Tensor
    logits: Tensor
    cache: list[Tensor]


@torch.no_grad()
def generate(model: Any, inputs: dict[str, Tensor]) -> Generated:
    """Generate `STEPS` tokens of text, whatever the checkpoint's generation settings say."""
    pictures = [getattr(model.config, name, None) for name in ("image_token_id", "video_token_id")]
    pictures += getattr(model.config, "visual_indicator_token_ids", None) or []  # Ovis2 replaces their embeddings
    greedy: dict[str, Any] = dict(do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1)
    greedy["suppress_tokens"] = [token for token in pictures if token is not None]
    greedy |= dict(min_new_tokens=STEPS, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True)
    out = model.generate(**inputs, **greedy)
    cache: Any = kv_cache(out)
    cached = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    return Generated(out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1), cached)


@torch.no_grad()
def decode(model: Any, inputs: dict[str, Tensor], answer: Tensor, stride: int = 1) -> tuple[Tensor, Cache]:
    """Prefill the prompts (B, L), and feed an answer (B, T) through the KV cache, whatever the model would say.

    Args:
        model: patched or not.
        inputs: of the prompts.
        answer: tokens.
        stride: number of tokens fed at a time.

    Returns:
        Logits (B, L + T, V), and the cache.
    """
    out = model(**inputs, use_cache=True)
    logits, mask, ahead = [out.logits], inputs["attention_mask"], _ahead(model, inputs)
    for tokens in answer.split(stride, dim=1):
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        more: dict[str, Any] = {KV_CACHE: kv_cache(out)}
        if ahead is not None:
            more["position_ids"] = (mask.cumsum(1) - 1)[None, :, -tokens.shape[1] :] + ahead
        out = model(input_ids=tokens, attention_mask=mask, **more, use_cache=True)
        logits.append(out.logits)
    cache = kv_cache(out)
    assert cache is not None
    return torch.cat(logits, dim=1).float(), cache


def _ahead(model: Any, inputs: dict[str, Tensor]) -> Tensor | None:
    """Return how far the rotary positions after prompts are ahead of the tokens counted, (B, 1), after their prefill.

    Models whose positions have several numbers keep it on themselves, and only `generate` reads it there rightly. None
    for other models.
    """
    if not hasattr(model.model, "rope_deltas"):
        return None
    pictured = any(name.endswith("grid_thw") for name in inputs)
    return model.model.rope_deltas if pictured else inputs["input_ids"].new_zeros(len(inputs["input_ids"]), 1)


def continued(inputs: dict[str, Tensor], answer: Tensor) -> dict[str, Tensor]:
    """Append the tokens of an answer (B, T), which are text, to prompts (B, L)."""
    ones, zeros = torch.ones_like(answer), torch.zeros_like(answer)
    after = {"input_ids": answer, "attention_mask": ones, "token_type_ids": zeros, "mm_token_type_ids": zeros}
    return inputs | {name: torch.cat([inputs[name], x], dim=1) for name, x in after.items() if name in inputs}


def likelihood(logits: Tensor, answer: Tensor) -> Tensor:
    """Return the negative log-likelihood (B, T) of an answer, from the logits (B, T + 1, V) around its tokens."""
    return -logits[:, :-1].log_softmax(-1).gather(-1, answer[..., None])[..., 0]


def difference(ours: Tensor | list[Tensor], theirs: Tensor | list[Tensor]) -> float:
    """Return the largest absolute difference; infinite where a shape differs or a number is not finite."""
    if isinstance(ours, list):
        return max(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    assert isinstance(theirs, Tensor)
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max())


def clone_sharing_weights(model: nn.Module) -> Any:
    """Copy a model and its patch, if it has one, but share the weights of both, so that the copy takes no memory."""
    slim: Slim | None = getattr(model, "_vlmslim", None)
    held = [value for stage in (slim.stages if slim else ()) for value in vars(stage.method).values()]
    modules = [model, *(value for value in held if isinstance(value, nn.Module))]
    return copy.deepcopy(model, {id(x): x for module in modules for x in (*module.parameters(), *module.buffers())})


@dataclass(frozen=True)
class Decoded:
    """Prompts and their answers, decoded token by token.

    logits    : of each prompt, (L + T, V) without padding
    notes     : what the method answered
    prefill   : the receipt's; None without a patch and without an image
    kv_bytes  : bytes of the KV cache after the answer
    positions : of each forward, as `watched_positions` notes them
    """

    logits: list[Tensor]
    notes: Notes
    prefill: Prefill | None
    kv_bytes: int
    positions: list[list[Tensor]]

    @property
    def answer_logits(self) -> Tensor:
        """(B, T + 1, V) logits before, between and after the tokens of the answers."""
        return torch.stack([logits[-STEPS - 1 :] for logits in self.logits])


class ModelRun:
    """A model's answers to the prompts. Each is computed when a check first asks for it.

    The methods that return a number compare two ways of computing the same logits.

    model   : the model, patched or not
    prompts : its prompts
    answer  : (B, T) tokens that follow the prompts, whatever the model would say
    fresh   : a model that is equal, but has seen no prompt yet; by default the model itself
    """

    def __init__(self, model: Any, prompts: Prompts, answer: Tensor, fresh: Any = None):
        self.model, self.prompts, self.answer = model, prompts, answer
        self.fresh = model if fresh is None else fresh

    @cached_property
    def together(self) -> Decoded:
        """The batch, padded on the left."""
        return self._decode(self.model, self.prompts.batch)

    @cached_property
    def alone(self) -> dict[int, Decoded]:
        """Each prompt of the batch by itself, and the long one, under a method that has seen no prompt yet.

        The last prompt comes first, so that a method which remembers one answers otherwise than in the batch.
        """
        return {row: self._decode(self.fresh, (row,)) for row in (*reversed(self.prompts.batch), LONG)}

    def _decode(self, model: Any, rows: tuple[int, ...]) -> Decoded:
        slim: Slim | None = getattr(model, "_vlmslim", None)
        inputs, answer = self.prompts.inputs(rows), torch.cat([self.answer_of(row) for row in rows])
        real = F.pad(inputs["attention_mask"].bool(), (0, STEPS), value=True)
        with noted(slim) as notes, watched_positions(model) as positions:
            padded, cache = decode(model, inputs, answer)
        pictured = any(row in (*self.prompts.pictured, LONG) for row in rows)
        prefill = slim.receipt.last if slim is not None and pictured else None
        logits = [x[keep] for x, keep in zip(padded, real, strict=True)]
        return Decoded(logits, notes, prefill, cache_bytes(cache), positions)

    def answer_of(self, row: int) -> Tensor:
        """Return the answer (1, T) of a row; that of the first one for the long row, which is not in the batch."""
        place = 0 if row == LONG else self.prompts.batch.index(row)
        return self.answer[place : place + 1]

    @cached_property
    @torch.no_grad()
    def recomputed(self) -> tuple[Tensor, float]:
        """Logits (B, T + 1, V) around the answer in one forward without a cache, and the model's own loss."""
        inputs = continued(self.prompts.inputs(), self.answer)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -STEPS:] = self.answer
        out = self.model(**inputs, labels=labels, use_cache=False)
        return out.logits[:, -STEPS - 1 :].float(), float(out.loss)

    def batch(self) -> float:
        """Compare the batch with its prompts one by one."""
        return difference(
            self.together.answer_logits, torch.cat([self.alone[row].answer_logits for row in self.prompts.batch])
        )

    @torch.no_grad()
    def padding(self) -> float:
        """Compare the last logits of prompts padded on the left with those of prompts padded on the right."""
        inputs = self.prompts.inputs(side="right")
        right = self.model(**inputs, use_cache=False).logits.float()
        ours = [logits[:-STEPS][-LAST:] for logits in self.together.logits]
        return difference(ours, [x[m.bool()][-LAST:] for x, m in zip(right, inputs["attention_mask"], strict=True)])

    def cache(self) -> float:
        """Compare decoding through the KV cache with recomputing everything without one."""
        return difference(self.together.answer_logits, self.recomputed[0])

    def at_once(self) -> float:
        """Compare the log-likelihood of the answer, fed token by token, with that of the answer fed at once."""
        logits, _ = decode(self.model, self.prompts.inputs(), self.answer, stride=STEPS)
        steps = likelihood(self.together.answer_logits, self.answer)
        return difference(steps, likelihood(logits[:, -STEPS - 1 :], self.answer))

    def as_labels(self) -> float:
        """Compare the log-likelihood of the answer, fed token by token, with the model's own loss on labels."""
        return abs(float(likelihood(self.together.answer_logits, self.answer).mean()) - self.recomputed[1])


class UnpatchedRun(ModelRun):
    """The run of a model that no patch has ever touched, and all else that a patched model is compared with.

    reference         : the same model, computed by hand
    generated         : greedy answers to the batch
    first_row         : greedy answer to its first row
    run_to_run_noise  : difference between two equal runs: zero, unless kernels add in random order
    noise             : largest difference between two ways of computing the same logits, where only rounding differs;
                        at least the rounding of one logit of usual size
    backend           : attention implementation
    peak              : peak bytes of a short generation
    shapes            : shapes of all tensors that are made in the prefill of the long row

    Raises:
        ValueError: the model answers with numbers that are not finite, so no difference to it means anything.
    """

    def __init__(self, model: PreTrainedModel, prompts: Prompts):
        self.generated = generate(model, prompts.inputs())
        super().__init__(model, prompts, self.generated.answers)
        self.first_row = generate(model, prompts.inputs((0,)))
        self.run_to_run_noise = self.changed(model)
        self.noise = max(
            self.batch(),
            self.padding(),
            self.cache(),
            self.at_once(),
            self.as_labels(),
            torch.finfo(model.dtype).eps * float(self.together.answer_logits.std()),
        )
        if not math.isfinite(self.noise + self.run_to_run_noise):
            raise ValueError(
                f"the unpatched model's logits in {model.dtype} are not all finite, so nothing can be compared with "
                "them; use another dtype, or a checkpoint that is not damaged"
            )
        del self.together, self.alone, self.recomputed  # gigabytes on a large model, and the noise is all we need
        self.reference = Reference(model, prompts)
        self.backend = model.config.get_text_config()._attn_implementation
        self.peak = peak_memory(model, prompts.inputs())
        self.shapes = shapes(model, prompts.inputs((LONG,)))

    def changed(self, model: PreTrainedModel) -> float:
        """Return how far the answer of an unpatched model to the first row is from this one's."""
        return difference(generate(model, self.prompts.inputs((0,))).logits, self.first_row.logits)


@contextmanager
def watched_positions(model: Any) -> Iterator[list[list[Tensor]]]:
    """Note the rotary position of the last token whenever the language model makes rotary embeddings.

    Yields:
        For each forward, one tensor (B,) for each embedding that it makes; (axes, B) where a position has several
        numbers. Layers after a drop make their own.
    """
    lm = language_model(model.model)
    forwards: list[list[Tensor]] = []

    def begin(*_: object) -> None:
        forwards.append([])

    def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
        if forwards:
            position = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
            forwards[-1].append(position[..., -1].cpu())

    hooks = [lm.register_forward_pre_hook(begin), lm.rotary_emb.register_forward_pre_hook(note, with_kwargs=True)]
    try:
        yield forwards
    finally:
        for hook in hooks:
            hook.remove()


class ShapeRecorder(TorchDispatchMode):
    """Records the shape of every floating-point tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and x.is_floating_point():
                self.shapes.add(tuple(x.shape))
        return out


@torch.no_grad()
def shapes(model: PreTrainedModel, inputs: dict[str, Tensor]) -> set[tuple[int, ...]]:
    """Return the shapes of all floating-point tensors made in a prefill."""
    with ShapeRecorder() as recorder:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return recorder.shapes


class RngGuard:
    """Watches the random generators that a process shares: torch's, those of its CUDA devices, numpy's and Python's.

    used : the generators that were drawn from, or seeded, inside `watch()`
    """

    def __init__(self) -> None:
        self.used: list[str] = []

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note in `used` the generators that are drawn from, or seeded; leave all of them as they were."""
        python, library = random.getstate(), np.random.get_state()
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
        with torch.random.fork_rng(devices):
            try:
                for i in devices:
                    torch.cuda.set_rng_state(torch.Generator(f"cuda:{i}").manual_seed(4321).get_state(), i)
                torch.default_generator.manual_seed(4321)  # a seed that no method would set: seeding again must show
                np.random.seed(4321)
                random.seed(4321)
                before = _rng_states()
                yield
                self.used = [name for name, state in _rng_states().items() if state != before[name]]
            finally:
                random.setstate(python)
                np.random.set_state(library)


def _rng_states() -> dict[str, object]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "random": random.getstate(),
        "numpy.random": [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "torch.cuda": [state.tolist() for state in cuda],
    }
