"""Fine-tune the trained part of a compression method on conversations about pictures.

    settings = read_settings(Path("scripts/tokenflex.yaml"))
    model, processor = load(settings)
    slim = vlmslim.patch(model, "tokenflex", weights="random", keep=64)
    finetune(slim, processor, open_conversations(settings), settings, Path("runs/tokenflex"))

The backbone stays frozen unless `train_decoder` is set. Training runs in one process or under `accelerate launch`. An
interrupted run continues from its last checkpoint and reaches the same loss, because batches, dropout and the random
draws of a method follow from the seed and the step alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from transformers import PreTrainedModel, ProcessorMixin

import vlmslim
from vlmslim import loading
from vlmslim.engine.families import language_model, projector
from vlmslim.training.conversations import IGNORED, Collator, Conversations, Items
from vlmslim.training.run_folder import RunFolder
from vlmslim.training.settings import Settings, parse_arguments, read_settings

__all__ = [
    "Answers",
    "Batches",
    "Loss",
    "RunFolder",
    "Settings",
    "Tuned",
    "answer_loss",
    "finetune",
    "learning_rate_factor",
    "load",
    "open_conversations",
    "parse_arguments",
    "prepare",
    "read_settings",
]


def load(settings: Settings) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Seed the process, and load the checkpoint and its processor."""
    set_seed(settings.seed)
    return loading.load(settings.model, dtype=settings.dtype, attention=settings.attn_implementation)


def open_conversations(settings: Settings) -> Conversations:
    """Open the file of conversations that the settings name, and print how many records are skipped."""
    data = Conversations(settings.data, settings.images, settings.on_error)
    if data.skipped:
        where, reason = data.skipped[0]
        print(f"{len(data.skipped)} of {len(data) + len(data.skipped)} records are skipped; {where}: {reason}")
    return data


@dataclass
class Answers:
    """Predictions of the model at the answers of a batch.

    loss    : ()      mean cross-entropy of the N answer tokens
    logits  : (N, V)  fp32, one row for each answer token
    targets : (N,)    the answer tokens
    row     : (N,)    the row of the batch that each answer token belongs to
    """

    loss: Tensor
    logits: Tensor
    targets: Tensor
    row: Tensor


class Tuned(nn.Module):
    """The patched model and its trained parts as one module, because DistributedDataParallel must see both."""

    model: Any

    def __init__(self, slim: vlmslim.Slim):
        super().__init__()
        self.model, self.trained = slim.model, slim.trained

    def forward(self, input_ids: Tensor, labels: Tensor, copies: int = 1, **inputs: Any) -> Answers:
        """Compute logits at the answers only, because those of a whole prompt need more memory than the model."""
        core = self.model.model
        if copies > 1:  # rows that ask about one picture share its encoding
            pictures = {k: inputs.pop(k) for k in ("pixel_values", "image_sizes") if k in inputs}
            encoded = core.get_image_features(**pictures, return_dict=True)
            encoded.pooler_output = [x for x in encoded.pooler_output for _ in range(copies)]
            inputs["mm_encoder_outputs"] = {"image": encoded}
        hidden = core(input_ids=input_ids, use_cache=False, **inputs).last_hidden_state[:, :-1]
        answer = labels[:, 1:] != IGNORED
        logits, targets = self.model.lm_head(hidden[answer]).float(), labels[:, 1:][answer]
        loss = F.cross_entropy(logits, targets)
        # Zero, but with a gradient for every trained parameter, because DDP waits for all of them: a batch without
        # pictures needs no projector, and a method may have a projector of its own.
        optional = (*self.trained.parameters(), *projector(core).parameters())
        loss = loss + sum(p.sum() * 0.0 for p in optional if p.requires_grad)
        return Answers(loss, logits, targets, answer.nonzero()[:, 0])


#: A loss takes the answers, the batch and the step (from 0). It returns the value to minimise, and numbers to log.
Loss = Callable[[Answers, dict, int], tuple[Tensor, dict[str, float | Tensor]]]


def answer_loss(answers: Answers, batch: dict, step: int) -> tuple[Tensor, dict]:
    """Return the next-token cross-entropy of the answers, which visual instruction tuning minimises."""
    return answers.loss, {}


def finetune(
    slim: vlmslim.Slim,
    processor: ProcessorMixin,
    data: Items,
    settings: Settings,
    out: Path,
    loss: Loss = answer_loss,
    before_step: Callable[[int], None] = lambda step: None,
    stop: int | None = None,
    after_step: Callable[[int], None] = lambda step: None,
    state: nn.Module | None = None,
) -> int:
    """Train `slim.trained`; write `out/log.csv`, checkpoints and, at the end, `out/final`.

    With `train_decoder`, `out/final` holds the tuned checkpoint as well.

    Args:
        slim: the patched model.
        processor: the checkpoint's processor.
        data: `Conversations`, or another data set of `Item`s.
        settings: the run.
        out: the run's folder. If it has a checkpoint of the same settings, training continues from there.
        loss: the value to minimise, see `Loss`.
        before_step: called with each step (from 0) before its batches; a method can set its schedules there.
        stop: last step of this call, for a run in pieces.
        after_step: called with each step (from 0) after its batches, in every process.
        state: has in its buffers what the loss or the calls remember from step to step, because checkpoints hold it.

    Returns:
        The steps done.

    Raises:
        ValueError: there is nothing to train, or `out` holds a run with other settings.
        RuntimeError: the loss is not finite.
    """
    accelerator = Accelerator(
        mixed_precision=settings.precision,
        cpu=settings.device == "cpu",
        gradient_accumulation_steps=settings.accumulate,
    )
    tuned, accumulate = prepare(slim, settings), settings.accumulate
    named = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"{slim} has nothing to train; set train_decoder to train the language model under it")
    steps = settings.steps or _step_count(settings, len(data), accelerator.num_processes)
    optimizer = torch.optim.AdamW(named.values(), lr=settings.lr, weight_decay=settings.decay, betas=(0.9, 0.98))
    tuned, optimizer = accelerator.prepare(tuned, optimizer)
    run = RunFolder(out, settings, accelerator)
    state = (state or nn.Module()).to(accelerator.device)
    first = run.resume(named, optimizer, state)
    last = max(first, steps if stop is None else min(stop, steps))
    batches = Batches(len(data), settings, accelerator, first * accumulate, last * accumulate)
    loader = iter(DataLoader(data, batch_sampler=batches, collate_fn=Collator(processor), num_workers=settings.workers))
    for step in range(first, last):
        set_seed(hash((settings.seed, step, accelerator.process_index)) % 2**32)
        rate = settings.lr * learning_rate_factor(step, steps, settings.warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        before_step(step)
        for _ in range(accumulate):
            batch = next(loader)
            run.count(skipped=batch["skipped"])
            inputs = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            with accelerator.accumulate(tuned):
                answers = tuned(**{k: v for k, v in inputs.items() if k not in ("skipped", "where")})
                total, numbers = loss(answers, inputs, step)
                if not torch.isfinite(total):
                    raise RuntimeError(f"step {step}: the loss is {total.item()} on {', '.join(batch['where'])}")
                accelerator.backward(total)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(named.values(), settings.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            run.mean(loss=total, answer=answers.loss, **numbers)
        after_step(step)
        run.mean(**_kept_tokens(slim))
        if (step + 1) % settings.log_every == 0 or step + 1 == last:
            run.log(step + 1, lr=rate)
        if (step + 1) % settings.save_every == 0 or step + 1 == last:
            run.save(step + 1, named, optimizer, state)
    if last == steps and accelerator.is_main_process:
        slim.save_pretrained(out / "final", with_base=settings.train_decoder, processor=processor)
    accelerator.wait_for_everyone()
    return last


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Rise linearly over the share `warmup` of the steps, then fall to zero as a cosine; `step` counts from 0."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Batches(Sampler[list[int]]):
    """Indices of the batches `first` .. `last` - 1 of one process, in a new order each epoch.

    The seed and the number of a batch decide its indices, so resuming needs no state.
    """

    def __init__(self, size: int, settings: Settings, accelerator: Accelerator, first: int, last: int):
        self.size, self.batch, self.seed, self.first, self.last = size, settings.batch, settings.seed, first, last
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, list[int]()
        for number in range(self.first, self.last):
            indices = []
            for place in range(self.batch):
                at = (number * self.world + self.rank) * self.batch + place
                if at // self.size != epoch:
                    epoch = at // self.size
                    generator = torch.Generator().manual_seed(1000 * self.seed + epoch)
                    order = torch.randperm(self.size, generator=generator).tolist()
                indices.append(order[at % self.size])
            yield indices


def prepare(slim: vlmslim.Slim, settings: Settings) -> Tuned:
    """Freeze the patched model except for the parts to train, which become fp32."""
    tuned = Tuned(slim)
    model = tuned.model
    model.requires_grad_(False)
    if settings.train_decoder:
        for part in (language_model(model.model), projector(model.model), model.lm_head):
            part.float().requires_grad_(True)
    slim.trained.float().requires_grad_(True)
    if settings.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return tuned.train()


def _step_count(settings: Settings, size: int, processes: int) -> int:
    return max(1, math.ceil(settings.epochs * size / (settings.batch * settings.accumulate * processes)))


def _kept_tokens(slim: vlmslim.Slim) -> dict[str, float]:
    """Visual tokens since the last call: per image before the language model, and per prompt averaged over layers."""
    summary = slim.receipt.summary()
    slim.reset_receipt()
    return {name: summary[name] for name in ("kept", "equivalent_tokens")} if summary["images"] else {}
