"""One forward of a patched model while it runs: what the caller sent, and the runs of decoder layers."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import Cache

from vlmslim.compressor import Compressed, Compressor, ImageTokens
from vlmslim.cost.timer import Timer
from vlmslim.engine.attention import LayerAttention
from vlmslim.engine.coming_keys import ComingKeys
from vlmslim.engine.encoded import Encoded
from vlmslim.engine.layer_run import Run, wider
from vlmslim.engine.layout import Segment
from vlmslim.engine.packed import Packed
from vlmslim.engine.plan import Plan
from vlmslim.engine.recorder import Recorder
from vlmslim.engine.stages import Stage
from vlmslim.pictures.trace import Trace
from vlmslim.receipt import Image, Prefill, StagePass


@dataclass
class Visit:
    """One question to a stage, and the visual tokens of each row before and after the answer."""

    stage: Stage
    before: list[int]
    after: list[int]


@dataclass
class Call:
    """One forward of the model, while it runs.

    encoded  : the images that were encoded, by kind
    given    : the kinds of which the caller sent pixels
    past     : the plan on the KV cache
    cache    : the KV cache; None without one
    owner    : the hooks that handle this forward
    embedded : the caller sent embeddings in place of ids
    guess    : tokens at the end that are no part of the prompt: guesses of speculative decoding, or an answer that
               the caller scores
    packed   : samples that the caller packed into rows; None if every row is one sample
    seen     : tokens of the caller's sequence that the KV cache accounts for
    length   : tokens of the caller's sequence in this forward
    padded   : whether some layer may see padding
    runs     : of decoder layers, in order; empty in a forward that vlmslim leaves alone
    images   : per row, the images
    counts   : per row, the token counts of the images
    text     : per row, text tokens
    image_last : per row, whether a visual token ends the prompt
    text_after : per row, how many text tokens of the prompt stand after each image
    tail     : tokens after the last image of any row
    shift    : (B, 1) how far the rotary positions of later tokens move down; None if they do not
    previous : the attention of the decoder layer before one that drops tokens
    coming   : keys of a decoder layer that drops tokens, if a method looked at them; None elsewhere
    timers   : time of each call of a method
    visits   : questions to the stages, in order
    blocks   : (B, L) the block in which a token sees all others, -1 where it is causal; None if all are
    added    : per decoder layer, (N, d) what the model adds after it to its N visual tokens
    number   : (B, L) which of these each of the caller's tokens gets, -1 for none
    delta    : (B, 1) rotary position minus number of tokens, where positions have several numbers
    given_mask : (B, P + L) as the caller sent it, where the model makes masks of it itself
    recorder : keeps what pictures show; None if the patch records no tokens
    read     : what the host knows of the prompt since before the encoder started, see `read_prompt`
    before   : (P,) ids of the prompt's tokens that the KV cache held already, where prompts share their beginning
    """

    encoded: dict[str, Encoded]
    past: Plan | None
    cache: Cache | None = None
    owner: Any = None
    given: frozenset[str] = frozenset()
    embedded: bool = False
    guess: int = 0
    packed: Packed | None = None
    seen: int = 0
    length: int = 0
    padded: bool = True
    runs: list[Run] = field(default_factory=list)
    images: list[list[ImageTokens]] = field(default_factory=list)
    counts: list[list[Image]] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    image_last: list[bool] = field(default_factory=list)
    text_after: list[list[int]] = field(default_factory=list)
    tail: int = 0
    shift: Tensor | None = None
    previous: LayerAttention | None = None
    coming: ComingKeys | None = None
    timers: list[Timer] = field(default_factory=list)
    visits: list[Visit] = field(default_factory=list)
    blocks: np.ndarray | None = None
    added: list[Tensor] = field(default_factory=list)
    number: np.ndarray | None = None
    delta: Tensor | None = None
    given_mask: Tensor | None = None
    recorder: Recorder | None = None
    read: dict[str, np.ndarray] = field(default_factory=dict)
    before: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def mask_on_host(self) -> np.ndarray:
        """Return the mask (B, L), False at padding."""
        mask, read = self.runs[0].tokens.mask, self.read.get("attention_mask")
        if not self.padded:
            return np.ones(tuple(mask.shape), bool)
        if read is not None and read.shape[1] == self.seen + self.length:
            return read[:, self.seen :].astype(bool)
        return mask.cpu().numpy()

    def unpack(self) -> None:
        """Give each packed sample a row of its own."""
        assert self.packed is not None
        for name, packed in self.read.items():
            self.read[name] = np.zeros(self.packed.mask.shape, packed.dtype)
            self.read[name][self.packed.row, self.packed.column] = packed
        self.read["attention_mask"], self.guess = self.packed.mask, 0

    def describe(
        self, embeds: Tensor, cache: Cache | None, mask: Any, position: Tensor | None, drops: bool = True
    ) -> None:
        """Write down what enters the language model: the runs of layers before anything is dropped.

        Args:
            embeds: (B, L, d) the caller's tokens in this forward.
            cache: the KV cache; None without one.
            mask: (B, P + L) False at padding, over the whole conversation; None without padding.
            position: (B or 1, L) or (axes, B, L), rotary positions; None if they count up.
            drops: some stage may drop tokens.

        Raises:
            ValueError: the mask or the rows do not fit the conversation that the cache holds.
        """
        batch, self.length = embeds.shape[:2]
        past, self.cache = self.past, cache
        if past and past.rows != batch:
            raise ValueError(
                f"the KV cache holds {past.rows} rows and {batch} came in; select, reorder or repeat its rows by the "
                "cache's own methods, so that what was dropped from each row stays known"
            )
        if cache is not None:
            self.seen = past.seen(cache) if past else cache.get_seq_length(0)
        self.padded = mask is not None or bool(past and past.padded)
        whole = self._whole_mask(mask, embeds, drops)
        tokens = Segment(whole[:, self.seen :], self._positions(position, whole), self.padded)
        if past:
            decoded = whole[:, past.length : self.seen]
            held = [(first, torch.cat([mask.to(embeds.device), decoded], dim=1)) for first, mask in past.masks]
            more = whole.shape[1] - past.length
            self.runs = [
                Run(first, tokens.lowered(lower), cached=mask, lower=lower, size=wider(size, more))
                for (first, mask), lower, size in zip(held, past.lower, past.sizes, strict=True)
            ]
        else:
            self.runs = [Run(0, tokens, cached=whole[:, : self.seen] if self.seen else None)]

    def _whole_mask(self, mask: Any, embeds: Tensor, drops: bool) -> Tensor:
        """Return the mask (B, P + L) of the whole conversation, False at padding."""
        batch, total = len(embeds), self.seen + self.length
        if mask is None:
            mask = torch.ones(batch, total, dtype=torch.bool, device=embeds.device)
        if not drops:  # a patch that only counts takes any mask
            mask = padding_of(mask, batch, total)
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != total:
            given = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
            raise ValueError(
                f"a patched model needs a 2-D attention mask over the whole conversation, ({batch}, {total}) here, "
                f"dropped visual tokens included; this one is {given}"
            )
        return mask.to(device=embeds.device, dtype=torch.bool)

    def _positions(self, position: Tensor | None, mask: Tensor) -> Tensor:
        """Return the rotary positions of the tokens, (B, L) or (axes, B, L), and note how later tokens go on from them.

        Args:
            position: as the caller gave them.
            mask: (B, P + L) of the whole conversation.
        """
        batch, total = mask.shape
        if position is None:
            position = torch.arange(self.seen, total, device=mask.device)[None]
        position = position.to(mask.device)
        if position.ndim == 3 and len(position) == 4:  # `generate` puts the text's own in front, for packed rows
            position = position[1:]
        position = position.expand(*position.shape[:-2], batch, -1)
        if self.past:
            self.shift, self.delta = self.past.shift.to(mask.device), self.past.delta
            position = position - self.shift
        elif position.ndim == 3:
            end = position.masked_fill(~mask[:, self.seen :], 0).amax((0, 2))[:, None]
            self.delta = end + 1 - mask.sum(1, keepdim=True)
        return position

    def merge_added(
        self, row: int, columns: np.ndarray, taken: np.ndarray, method: Compressor, result: Compressed
    ) -> None:
        """Let what the model adds after decoder layers (DeepStack) follow the tokens that a method merged.

        Args:
            row: of the batch.
            columns: (n,) the image's tokens in it.
            taken: (k,) the places that the method's tokens take.
            method: that merged.
            result: its answer.

        Raises:
            ValueError: the method says neither how it merged nor which slots its tokens take.
        """
        assert self.number is not None
        if result.into is not None:
            own, device = torch.from_numpy(self.number[row, columns]), self.added[0].device
            self.number[row, taken] = len(self.added[0]) + np.arange(len(taken))
            # a product repeats on a GPU, a scatter does not
            joins = (result.into().to(device) == torch.arange(len(taken), device=device)[:, None]).float()
            mean = joins / joins.sum(1, keepdim=True).clamp(min=1)
            self.added = [torch.cat([x, (mean @ x[own.to(device)].float()).to(x)]) for x in self.added]
        elif result.index is None and len(taken) < len(columns):
            raise ValueError(
                f"{method} says neither which tokens it kept nor how it merged them, and this model adds features of "
                "its tower to visual tokens after several layers; return Compressed(features, index, into), or use a "
                "method that picks tokens, such as divprune"
            )

    def resize(self, sizes: Tensor) -> None:
        """Note how many tokens each of the caller's stands for, (B, L), in every run of layers."""
        for run in self.runs:
            own = run.tokens.of_callers(sizes, fill=1.0)
            held = 0 if run.cached is None else run.cached.shape[1]
            if run.size is None:
                run.size = torch.nn.functional.pad(own, (held, 0), value=1.0)
            else:
                run.size = torch.cat([run.size[:, :held].to(own), own], dim=1)

    def run(self, layer: int) -> Run:
        """Return the run that a decoder layer belongs to."""
        return next(run for run in reversed(self.runs) if run.first <= layer)

    @property
    def entered(self) -> list[list[int]]:
        """Per row, the tokens of each image that entered the language model."""
        return [[image.kept for image in row] for row in self.counts]

    @property
    def altered(self) -> bool:
        """True if some layer sees, or has seen, other tokens than the caller sent."""
        return self.past is not None or self.runs[-1].tokens.shortened

    def restore(self, run: Run, hidden: Tensor) -> Tensor:
        """Put the hidden states of a run back where the caller expects them: (B, L, d)."""
        hidden = run.tokens.restore(hidden)
        return hidden if self.packed is None else self.packed.pack(hidden)

    def timed(self, device: torch.device) -> Timer:
        """Return a context in which a method works on tensors of `device`."""
        self.timers.append(Timer(device))
        return self.timers[-1]

    def plan(self) -> Plan:
        """Return what the KV cache holds after this forward."""
        masks = [(run.first, run.mask) for run in self.runs]
        padded = bool(self.past and self.past.padded) or any(run.tokens.padded for run in self.runs)
        shift = self.shift
        if shift is None:
            shift = self.runs[0].tokens.position.new_zeros(len(self.text), 1)
        lower, sizes = [run.lower for run in self.runs], [run.size for run in self.runs]
        return Plan(self.seen + self.length, shift, masks, lower, sizes, padded, self.tail, self.delta)

    def prefill(self, stages: tuple[Stage, ...], cache: Cache | None, depth: int) -> Prefill:
        """Return the record of this forward for the receipt."""
        runs = [self.run(layer) for layer in range(depth)]
        return Prefill(
            images=self.counts,
            text=[len(self.before) + own for own in self.text],
            visual=[run.visual for run in runs],
            sequence=[len(self.before) + run.tokens.mask.shape[1] for run in runs],
            kv=[] if cache is None else [cache.get_seq_length(layer) for layer in range(depth)],
            stages=self._passes(stages),
            timers=self.timers,
            traces=self._traces(stages, depth),
        )

    def _traces(self, stages: tuple[Stage, ...], depth: int) -> list[list[Trace]] | None:
        """Return where the tokens of each image went; None if the patch records no tokens."""
        if self.recorder is None:
            return None
        layouts = {run.first: run.tokens.layout for run in self.runs}
        return self.recorder.traces(self.images, {k: x for k, x in layouts.items() if x is not None}, stages, depth)

    def _passes(self, stages: tuple[Stage, ...]) -> list[StagePass]:
        """Sum up what each stage did."""
        passes, now = [], [sum(image.tokens for image in row) for row in self.counts]
        for stage in stages:
            visits = [visit for visit in self.visits if visit.stage is stage]
            before = visits[0].before if visits else now
            now = visits[-1].after if visits else now
            lost = [sum(visit.before[row] - visit.after[row] for visit in visits) for row in range(len(now))]
            sizes = [image.tokens if stage.acts_before_llm else image.kept for row in self.counts for image in row]
            asked = [stage.method.requested(n) for n in sizes]
            passes.append(StagePass(before, now, sum(n > 0 for n in lost), asked == sizes, None in asked))
        return passes


def padding_of(mask: Any, batch: int, total: int) -> Tensor:
    """Read off an attention mask of any kind which tokens are no padding, (batch, total) bool.

    `generate` makes the causal mask itself for a static cache, (B, 1, L, T) or a dictionary of such masks. The last
    query sees every token that is no padding. A mask of another kind is taken to have no padding.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention")
    if not isinstance(mask, Tensor):
        return torch.ones(batch, total, dtype=torch.bool)
    if mask.ndim == 4:
        mask = mask[:, 0, -1, :total]
        mask = mask if mask.dtype == torch.bool else mask == 0
    return mask
