"""What is asked of a model again and again, patched or not, and what the unpatched one answers."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vlmslim.cost.memory import peak_memory
from vlmslim.doctor.prompts import LONG, Prompts
from vlmslim.doctor.snapshots import Watch
from vlmslim.engine.families import KV_CACHE, kv_cache

STEPS = 5  # tokens that are decoded
TAIL = 16  # last tokens of a prompt whose logits are compared


@torch.no_grad()
def generate(model: nn.Module, inputs: dict) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Greedy answers: the new tokens (B, T), their logits (B, T, V), and the keys and values of all layers."""
    greedy = dict(do_sample=False, temperature=None, top_p=None, top_k=None, num_beams=1)
    greedy |= dict(min_new_tokens=STEPS, max_new_tokens=STEPS, output_logits=True, return_dict_in_generate=True)
    out = model.generate(**inputs, **greedy)
    cached = [x for layer in kv_cache(out).layers for x in (layer.keys, layer.values)]
    return out.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(out.logits, dim=1), cached


@torch.no_grad()
def decode(model: nn.Module, inputs: dict, answer: Tensor, stride: int = 1, whole: bool = False) -> Tensor:
    """Logits (B, T + 1, V) before, between and behind the tokens of an answer (B, T) that is fed through the cache.

    Args:
        model: patched or not.
        inputs: of the prompts.
        answer: what is said, whatever the model would say.
        stride: tokens fed at a time.
        whole: give those of the prompts (B, L) too: (B, L + T, V).
    """
    out = model(**inputs, use_cache=True, logits_to_keep=0 if whole else 1)
    logits, mask = [out.logits], inputs["attention_mask"]
    for tokens in answer.split(stride, dim=1):
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
        out = model(input_ids=tokens, attention_mask=mask, **{KV_CACHE: kv_cache(out)}, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, dim=1).float()


def continued(inputs: dict, answer: Tensor) -> dict:
    """The prompts with an answer (B, T) written behind them."""
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(answer)], dim=1)
    return inputs | {"input_ids": torch.cat([inputs["input_ids"], answer], dim=1), "attention_mask": mask}


@torch.no_grad()
def recompute(model: nn.Module, inputs: dict, answer: Tensor) -> Tensor:
    """The logits of `decode` in one forward, without a cache."""
    return model(**continued(inputs, answer), use_cache=False, logits_to_keep=answer.shape[1] + 1).logits.float()


@torch.no_grad()
def loss(model: nn.Module, inputs: dict, answer: Tensor) -> float:
    """The model's own loss on an answer: mean negative log-likelihood per token."""
    whole = continued(inputs, answer)
    labels = torch.full_like(whole["input_ids"], -100)
    labels[:, -answer.shape[1] :] = answer
    return float(model(**whole, labels=labels, use_cache=False).loss)


def likelihood(logits: Tensor, answer: Tensor) -> Tensor:
    """Negative log-likelihood (B, T) of the tokens of an answer, from the logits of `decode`."""
    return -logits[:, :-1].log_softmax(-1).gather(-1, answer[..., None])[..., 0]


@torch.no_grad()
def tails(model: nn.Module, inputs: dict) -> list[Tensor]:
    """Logits (at most TAIL, V) of the last tokens of every row, padding left out."""
    logits = model(**inputs, use_cache=False).logits
    return [row[mask.bool()][-TAIL:].float() for row, mask in zip(logits, inputs["attention_mask"], strict=True)]


def difference(ours: Tensor | Iterable[Tensor], theirs: Tensor | Iterable[Tensor]) -> float:
    """The largest absolute difference; infinite where a shape differs or a number is not finite."""
    if not isinstance(ours, Tensor):
        return max(difference(a, b) for a, b in zip(ours, theirs, strict=True))
    if ours.shape != theirs.shape or not (ours.isfinite().all() and theirs.isfinite().all()):
        return float("inf")
    return float((ours.double() - theirs.double()).abs().max())


def singles(model: nn.Module, prompts: Prompts, answer: Tensor) -> Tensor:
    """`decode` of every row by itself, the last one first: a method that remembers is then told from one that reads."""
    rows = [
        decode(model, prompts.inputs((row,)), answer[i : i + 1]) for i, row in reversed([*enumerate(prompts.batch)])
    ]
    return torch.cat(rows[::-1])


@torch.no_grad()
def shapes(model: nn.Module, inputs: dict) -> set[tuple[int, ...]]:
    """Shapes of all floating-point tensors made in a prefill."""
    with Watch() as watch:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return watch.shapes


class Witness:
    """A model that nobody has patched, and what it answers: found out at once, for later a patch may be on it.

    generated : of all rows, by `generate`
    brief     : of the first row
    wobble    : how far it is from itself in a second, equal run: zero, but for kernels that add in random order
    """

    def __init__(self, model: nn.Module, prompts: Prompts):
        self.model, self.prompts = model, prompts
        self.generated, self.brief = generate(model, prompts.inputs()), generate(model, prompts.inputs((0,)))
        self.wobble = difference(self.brief[1:2], generate(model, prompts.inputs((0,)))[1:2])

    def changed(self) -> float:
        """How far its answer is from what it was."""
        return difference(generate(self.model, self.prompts.inputs((0,)))[1], self.brief[1])


class Baseline(Witness):
    """All that a patched model is compared with.

    answer  : (B, T) tokens that every comparison decodes
    noise   : how far the model is from itself where only rounding differs: batch or single, left or right, cache or
              none. At least the rounding of one logit of usual size.
    backend : its attention implementation
    peak    : peak bytes of a short generation
    shapes  : shapes of all tensors that are made in the prefill of the long row

    Raises:
        ValueError: the model answers with numbers that are not finite, and then nothing could be told from it.
    """

    def __init__(self, model: nn.Module, prompts: Prompts):
        super().__init__(model, prompts)
        self.answer = answer = self.generated[0]
        together = decode(model, prompts.inputs(), answer)
        self.noise = max(
            difference(together, singles(model, prompts, answer)),
            difference(together, recompute(model, prompts.inputs(), answer)),
            difference(together, decode(model, prompts.inputs(), answer, stride=STEPS)),
            difference(tails(model, prompts.inputs()), tails(model, prompts.inputs(side="right"))),
            abs(loss(model, prompts.inputs(), answer) - float(likelihood(together, answer).mean())),
            torch.finfo(model.dtype).eps * float(together.std()),
        )
        if not math.isfinite(self.noise + self.wobble):
            raise ValueError(
                f"the unpatched model's logits in {model.dtype} are not all finite, so there is nothing to hold a "
                "method against; use another dtype, or a checkpoint that is whole"
            )
        self.backend = model.config.get_text_config()._attn_implementation
        self.peak = peak_memory(model, prompts.inputs())
        self.shapes = shapes(model, prompts.inputs((LONG,)))
