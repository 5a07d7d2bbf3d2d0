"""The language-model side of the engine: compress at the entrance, prune between layers, restore at the exit.

    core (LlavaModel)        enter: note the prompt and the encoded images; cut what the cache already holds
      language_model         enter: compress each image, close the gaps      leave: put tokens back in place
        layers[i]            enter: drop visual tokens; give each run of layers its own mask and positions

Outside the language model no shape changes, which is why `generate`, labels and evaluation harnesses need no change.
"""

import inspect
import math
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import create_causal_mask

from vlmslim.compressor import Compressed, ImageTokens, LayerInput
from vlmslim.engine.encoder import RecordingEncoder, is_recorded, recorded
from vlmslim.engine.families import cached_keys, encoder_layers, family_of, kv_cache, placeholders
from vlmslim.engine.plan import Layout, Plan, Segment, joined, pick_rows, upload
from vlmslim.engine.stages import Stage
from vlmslim.ops.attention import weighted_causal_mask
from vlmslim.receipt import Image, Prefill, Receipt, Span, StagePass


def _on_host(results: list[Compressed]) -> list[np.ndarray | None]:
    """Which of its image's tokens each result holds; None where it does not say. Waits for the device, once."""
    told = [result.index for result in results]
    known = [order for order in told if order is not None]
    if not known:
        return told
    whole = (torch.cat(known) if len(known) > 1 else known[0]).cpu().numpy()
    ends = accumulate(len(order) for order in known)
    parts = (whole[end - len(order) : end] for order, end in zip(known, ends, strict=True))
    return [None if order is None else next(parts) for order in told]


def _words(ids: np.ndarray, text: np.ndarray) -> Tensor:
    """What `ImageTokens.prompt` holds."""
    return torch.from_numpy(ids[text])


@dataclass
class Encoded:
    """The images of an encoder output, without the tower's hidden states, which need not outlive the encoder.

    images : in the order of the prompts
    copies : how many rows in succession share them
    """

    images: list[ImageTokens]
    copies: int

    @classmethod
    def of(cls, output) -> "Encoded":
        """Of an encoder output; raises ValueError as `recorded` does."""
        images = recorded(output)
        return cls(images, len(output.pooler_output) // len(images))


@dataclass
class Visit:
    """One question to a stage, and the visual tokens of each row before and after its answer."""

    stage: Stage
    before: list[int]
    after: list[int]


@dataclass
class Call:
    """One forward of the model, while it runs."""

    input_ids: Tensor | None
    embeds: Tensor | None
    encoded: dict[str, Encoded]  # by kind
    past: Plan | None
    length: int = 0  # of the caller's sequence in this forward
    seen: int = 0  # of the caller's sequence behind the cache
    before: list[Tensor | None] = field(default_factory=list)  # per layer, the mask of what the cache holds
    segments: list[Segment] = field(default_factory=list)  # per layer, neighbours share
    images: list[list[Image]] = field(default_factory=list)  # per row
    text: list[int] = field(default_factory=list)  # per row, text tokens
    tail: int = 0  # tokens behind the last image of any row
    visual: list[list[int]] = field(default_factory=list)  # per layer, visual tokens of each row
    shift: Tensor | None = None
    gapped: bool = False  # rotary positions have gaps
    padded: bool = True  # some layer sees padding
    masks: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)  # attention masks made
    rope: tuple[Tensor, Tensor] | None = None
    features: list[list[ImageTokens]] = field(default_factory=list)  # per row, the images themselves
    weights: list[Tensor | None] = field(default_factory=list)  # per layer, of each key, while a method trains
    previous: tuple | None = None  # layer before a pruning one, its input and its rotary embeddings
    spans: list[Span] = field(default_factory=list)  # calls of the methods
    visits: list[Visit] = field(default_factory=list)

    def timed(self, device: torch.device) -> Span:
        """A context in which a method works on tensors of `device`."""
        self.spans.append(Span(device))
        return self.spans[-1]

    @property
    def entered(self) -> list[list[int]]:
        """Per row, the tokens of each image that entered the language model."""
        return [[image.kept for image in row] for row in self.images]

    @property
    def altered(self) -> bool:
        """Whether some layer sees, or has seen, something else than the caller sent."""
        return self.past is not None or not self.segments[-1].whole


def _check_finite(images: list[ImageTokens]) -> None:
    """Refuse images of which nothing sensible can be chosen."""
    sums = [image.features.detach().sum(dtype=torch.float32) for image in images]
    if all(map(math.isfinite, torch.stack(sums).tolist() if len(sums) > 1 else [sums[0].item()])):
        return  # huge tokens may overflow a sum: look again
    for i, image in enumerate(images):
        if not image.features.isfinite().all():
            raise ValueError(
                f"the visual tokens of image {i} of this batch are not finite; "
                "check the picture and the dtype of the vision tower"
            )


def _tower_layers(stages: tuple[Stage, ...], depth: int) -> tuple[int, ...]:
    """Collect the vision-tower layers that the stages read, of `depth`."""
    wanted = set()
    for stage in stages:
        for layer in stage.method.tower_layers:
            if not -depth <= layer < depth:
                raise ValueError(f"{stage.method}: the vision tower has {depth} layers, no layer {layer}")
            wanted.add(layer)
    return tuple(sorted(wanted))


class DecoderHooks:
    """The hooks of one patch on the language-model side."""

    def __init__(self, model: nn.Module, stages: tuple[Stage, ...], receipt: Receipt):
        self.core: nn.Module = model.model
        self.stages = stages
        self.lm: nn.Module = model.model.language_model
        self.receipt = receipt
        self.argument_names = list(inspect.signature(type(self.core).forward).parameters)[1:]
        self.first = next((stage for stage in stages if stage.acts_before_llm), None)
        self.before_llm = self.first.method if self.first else None
        self.positions = receipt.positions
        self.pruners = {layer: stage for stage in stages for layer in stage.layers}
        kinds = ["image", "video"] if family_of(model).video else ["image"]
        tower_layers = _tower_layers(stages, len(encoder_layers(self.core)))
        self.encoders = {kind: RecordingEncoder(self.core, kind, tower_layers, self._on_encoded) for kind in kinds}
        self.call: Call | None = None
        self.handles: list = []

    def attach(self) -> None:
        """Register the hooks, on this instance only."""
        for encoder in self.encoders.values():
            encoder.attach()
        add = self.handles.append
        add(self.core.register_forward_pre_hook(self._enter_core, with_kwargs=True))
        add(self.core.register_forward_hook(self._leave_core, always_call=True))
        add(self.lm.register_forward_pre_hook(self._enter_lm, with_kwargs=True))
        add(self.lm.register_forward_hook(self._leave_lm))
        everywhere = self.before_llm is not None and self.positions == "original"
        first = 0 if everywhere else min(self.pruners, default=len(self.lm.layers) + 1) - 1
        for i, layer in enumerate(self.lm.layers):
            if i >= first:
                add(layer.register_forward_pre_hook(partial(self._enter_layer, i), with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook."""
        for encoder in self.encoders.values():
            encoder.detach()
        while self.handles:
            self.handles.pop().remove()

    def _on_encoded(self, kind: str, output) -> None:
        """Images were encoded; if that happened inside `forward`, they belong to it."""
        if self.call is not None:
            self.call.encoded[kind] = Encoded.of(output)

    # -- the model ---------------------------------------------------------------------------------------------

    def _enter_core(self, core, args, kwargs):
        kwargs |= dict(zip(self.argument_names, args, strict=False))  # LLaVA-NeXT passes input_ids by position
        cache = kv_cache(kwargs)
        past = Plan.of(cache)
        if past is not None:
            kwargs = self._cut(kwargs, past.seen(cache))
        encoded = {kind: out for kind, out in (kwargs.get("mm_encoder_outputs") or {}).items() if out is not None}
        for kind, out in encoded.items():
            self.encoders[kind].recognise(out)
        if not (self.before_llm or self.pruners):  # what was encoded elsewhere cannot be counted, and need not be
            encoded = {kind: out for kind, out in encoded.items() if is_recorded(out)}
        encoded = {kind: Encoded.of(out) for kind, out in encoded.items()}
        self.call = Call(kwargs.get("input_ids"), kwargs.get("inputs_embeds"), encoded, past)
        return (), kwargs

    @staticmethod
    def _cut(kwargs: dict, seen: int) -> dict:
        """Drop leading tokens that the cache already holds.

        A caller who continues a conversation asks the cache how long it is and sends the rest. The compressed cache
        is shorter than the conversation, so the rest is too long by what was dropped.
        """
        name = "inputs_embeds" if kwargs.get("input_ids") is None else "input_ids"
        size = kwargs[name].shape[1]
        mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if mask is not None and mask.ndim == 2:
            fresh = mask.shape[1] - seen
            if fresh > size or fresh < 1:
                raise ValueError(
                    f"the attention mask covers {mask.shape[1]} tokens, the cache stands for {seen} and {size} more "
                    "came in; the mask must cover the whole conversation, dropped visual tokens included"
                )
        elif position is not None and size > 1:
            fresh = int(position.max()) + 1 - seen  # without a mask there is no padding
            if fresh < 1:
                raise ValueError(
                    f"positions end at {fresh + seen - 1}, but the cache already stands for {seen} tokens; pass an "
                    "attention mask that covers the whole conversation, dropped visual tokens included"
                )
        else:
            return kwargs
        if fresh >= size:
            return kwargs
        cut = {name: kwargs[name][:, -fresh:]}
        if position is not None:
            cut["position_ids"] = position[..., -fresh:]
        return kwargs | cut

    def _leave_core(self, core, args, output):
        self.call = None

    # -- the language model -----------------------------------------------------------------------------------------

    def _enter_lm(self, lm, args, kwargs):
        call = self.call
        if call is None:
            return None  # somebody uses the language model alone
        embeds, cache = kwargs["inputs_embeds"], kv_cache(kwargs)
        if not call.encoded and call.past is None:
            if cache is None or cache.get_seq_length() == 0:
                self.receipt.saw_text(len(embeds))
            return None
        if call.encoded:
            self._check(cache)
        self._describe(call, embeds, cache, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if call.encoded:
            embeds = self._compress(call, embeds)
        changed = {"inputs_embeds": embeds}
        if call.altered:
            segment = call.segments[0]
            changed["position_ids"] = segment.position
            if call.encoded or call.padded:
                changed["attention_mask"] = joined(call.before[0], segment.mask)
        return args, kwargs | changed

    def _describe(self, call: Call, embeds: Tensor, cache, mask: Tensor | None, position: Tensor | None) -> None:
        """Write down what the caller sent: the segment that every layer sees until something is dropped."""
        batch, call.length = embeds.shape[:2]
        device, past = embeds.device, call.past
        call.seen = past.seen(cache) if past else cache.get_seq_length(0) if cache is not None else 0
        total = call.seen + call.length
        call.padded = mask is not None or bool(past and past.padded)
        if mask is None:
            mask = torch.ones(batch, total, dtype=torch.bool, device=device)
        if mask.ndim != 2 or mask.shape[1] != total:
            raise ValueError(
                f"a patched model needs a 2-D attention mask over the whole conversation, ({batch}, {total}) here, "
                f"dropped visual tokens included; this one is {tuple(mask.shape)}"
            )
        mask = mask.to(device=device, dtype=torch.bool)
        if position is None:
            position = torch.arange(call.seen, total, device=device)[None]
        position = position.to(device).expand(batch, -1)
        layers = len(self.lm.layers)
        call.before, call.weights = [None] * layers, [None] * layers
        if past:
            call.shift = past.shift.to(device)
            position = position - call.shift
            unique = {id(m): m.to(device) for m in past.masks}  # neighbouring layers share one
            grown = {key: torch.cat([m, mask[:, past.length : call.seen]], dim=1) for key, m in unique.items()}
            call.before = [grown[id(m)] for m in past.masks]
        elif call.seen:
            call.before = [mask[:, : call.seen]] * layers
        if call.seen:
            mask = mask[:, call.seen :]
        call.segments = [Segment(mask, position, call.padded)] * layers

    def _check(self, cache) -> None:
        """Refuse what a forward with images cannot have."""
        if not (self.before_llm or self.pruners):
            return
        if cache is not None and cache.is_compileable:
            raise ValueError(
                f"{type(cache).__name__} reserves room for every token; visual tokens can be removed from a "
                "DynamicCache only (do not set cache_implementation)"
            )
        if self.pruners and cache is not None and cache.get_seq_length(0) > 0:
            raise ValueError(
                f"{self.pruners[min(self.pruners)].method} drops tokens during prefill and takes images in the first "
                "forward of a cache only; for an image in a later turn prefill again, or use a method that works "
                "before the language model"
            )
        checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in self.lm.layers)
        if (self.pruners or self.positions == "original") and self.lm.training and checkpointing:
            raise ValueError(
                "gradient checkpointing re-runs decoder layers outside the forward that knows which tokens they hold; "
                "disable it, or use a method that works before the language model with renumbered positions"
            )

    def _compress(self, call: Call, embeds: Tensor) -> Tensor:
        """Compress every image and close the gaps: (B, L, d) -> (B, S, d)."""
        segment = call.segments[0]
        layout = segment.layout = Layout.of(segment.mask, segment.position, tagged=bool(self.pruners))
        ids = None if call.input_ids is None else call.input_ids.cpu().numpy()
        found, text = self._locate(call, layout.mask, ids)
        images = [image for _, _, image in found]
        results: list[Compressed | None] = [None] * len(found)
        if images and (self.before_llm or self.pruners):
            _check_finite(images)
        if images and self.before_llm:
            for row, _, image in found:
                image.words = None if ids is None else partial(_words, ids[row], text[row])
            with call.timed(images[0].features.device):
                results = self.before_llm.compress_images(images)
        self._note(call, layout, found, results)
        call.text = text.cumsum(1)[:, -1].tolist()
        call.visual = [[sum(row) for row in call.entered]] * len(self.lm.layers)
        if self.first:
            encoded = [sum(image.tokens for image in row) for row in call.images]
            call.visits.append(Visit(self.first, encoded, call.visual[0]))
        call.tail = embeds.shape[1] - 1 - max((int(columns[-1]) for _, columns, _ in found), default=-1)
        return self._close_gaps(call, embeds, found, text, results) if images and self.before_llm else embeds

    def _note(self, call: Call, layout: Layout, found: list, results: list[Compressed | None]) -> None:
        """Write down which image each visual token belongs to, and how many of its tokens enter."""
        call.images = [[] for _ in layout.mask]
        call.features = [[] for _ in layout.mask]
        for (row, columns, image), result in zip(found, results, strict=True):
            n = len(columns)
            k = n if result is None else len(result)
            if k > n:
                raise ValueError(f"{self.before_llm} made {k} tokens out of an image of {n}")
            call.images[row].append(Image(n, self._requested(n), k))
            call.features[row].append(image)
            if self.pruners:
                layout.image[row, columns] = len(call.images[row])
                if result is None or result.index is not None:
                    layout.place[row, columns] = np.arange(1, n + 1)

    def _close_gaps(
        self, call: Call, embeds: Tensor, found: list, text: np.ndarray, results: list[Compressed]
    ) -> Tensor:
        """Put kept tokens into their slots and drop the slots of the others: (B, L, d) -> (B, S, d)."""
        keep, rows, slots, made = text.copy(), [], [], []
        for (row, columns, image), result, order in zip(found, results, _on_host(results), strict=True):
            taken, ascending = self._slots(result, order, len(columns))
            places = columns[taken]
            keep[row, places] = True
            if result.features is not None or not ascending:  # the prompt does not hold them so
                rows, slots, made = [*rows, np.full(len(result), row)], [*slots, places], [*made, result.vectors(image)]
        renumbered = self.positions == "renumbered"
        selection = call.segments[0].layout.select(keep, renumbered)
        if selection is not None:
            embeds = pick_rows(embeds, selection.index)
            call.segments = [Segment.of(selection.layout, embeds.device)] * len(self.lm.layers)
            call.gapped = not renumbered
            if renumbered:
                (shift,) = upload(embeds.device, selection.dropped)
                call.shift = shift if call.shift is None else call.shift + shift
        if made:
            rows, slots = np.concatenate(rows), np.concatenate(slots)
            if selection is None:
                embeds = embeds.clone()
            else:
                slots = selection.target[rows, slots]
            embeds[tuple(upload(embeds.device, rows, slots))] = torch.cat(made).to(embeds)
        return embeds

    def _slots(self, result: Compressed, order: np.ndarray | None, n: int) -> tuple[np.ndarray | slice, bool]:
        """The slots that the tokens of an image take among its `n`, ascending, and whether they came so."""
        if order is None:
            if self.positions == "original" and len(result) < n:
                raise ValueError(
                    f"{self.before_llm} does not say which tokens it kept; it needs positions='renumbered'"
                )
            return slice(len(result)), True
        ascending = not (order[1:] <= order[:-1]).any()
        slots = order if ascending else np.unique(order)
        if len(slots) != len(result):
            raise ValueError(f"{self.before_llm} does not give each token of an image a slot of its own")
        return slots, ascending

    def _requested(self, n: int) -> int | None:
        """Ask how many of an image's `n` tokens were to be kept: the stage before the language model, or the last."""
        return (self.before_llm or self.stages[-1].method).requested(n)

    def _locate(self, call: Call, mask: np.ndarray, ids: np.ndarray | None) -> tuple[list, np.ndarray]:
        """Find the images in the prompts.

        `generate` repeats a prompt's images when it expands prompts into beams; then a few rows share an image.

        Returns:
            (row, columns, image) for every image, by row and place in the prompt, and (B, L) bool, the text tokens.
        """
        found, text = [], mask
        for kind, encoded in call.encoded.items():
            at = placeholders(self.core, kind, ids, call.embeds)
            text = text & ~at
            images, start = encoded.images, 0
            for row, there in enumerate(at):
                (columns,) = there.nonzero()
                number, place = start, 0
                while place < len(columns):
                    if number == len(images):
                        raise ValueError(
                            f"row {row} has more {kind} placeholders than there are {kind}s left for it; every prompt "
                            f"needs its own {kind}s (transformers 5.17 mixes them up itself where beams share a prompt)"
                        )
                    n = len(images[number].features)
                    found.append((row, columns[place : place + n], images[number]))
                    number, place = number + 1, place + n
                if row % encoded.copies == encoded.copies - 1:
                    start = number
        if len(call.encoded) > 1:
            found.sort(key=lambda item: (item[0], item[1][0]))
        return found, text

    def _leave_lm(self, lm, args, output):
        call, cache = self.call, kv_cache(output)
        if call is None or not call.segments:
            return output
        if call.encoded:
            sequence = [segment.mask.shape[1] for segment in call.segments]
            kv = [] if cache is None else [layer.get_seq_length() for layer in cache.layers]
            self.receipt.backend = self.lm.config._attn_implementation  # as they are now, not as they were at the patch
            self.receipt.dtype = str(output.last_hidden_state.dtype).removeprefix("torch.")
            stages = self._passes(call)
            self.receipt.saw_prefill(Prefill(call.images, call.text, call.visual, sequence, kv, stages, call.spans))
        if not call.altered:
            return output
        if call.encoded and cache is not None:
            self._plan(call).attach(cache)
        output.last_hidden_state = call.segments[-1].restore(output.last_hidden_state)
        if output.hidden_states is not None:
            segments = [call.segments[0], *call.segments]
            output.hidden_states = tuple(s.restore(h) for s, h in zip(segments, output.hidden_states, strict=True))
        return output

    def _passes(self, call: Call) -> list[StagePass]:
        """Sum up what each stage did in this forward."""
        passes, now = [], [sum(image.tokens for image in row) for row in call.images]
        for stage in self.stages:
            visits = [visit for visit in call.visits if visit.stage is stage]
            before = visits[0].before if visits else now
            now = visits[-1].after if visits else now
            lost = [sum(visit.before[row] - visit.after[row] for visit in visits) for row in range(len(now))]
            sizes = [image.tokens if stage.acts_before_llm else image.kept for row in call.images for image in row]
            asked = [stage.method.requested(n) for n in sizes]
            acted = sum(n > 0 for n in lost)
            passes.append(StagePass(before, now, acted, asked == sizes, None in asked))
        return passes

    @staticmethod
    def _plan(call: Call) -> Plan:
        """What the KV cache holds now."""
        masks: list[Tensor] = []
        for i, (before, segment) in enumerate(zip(call.before, call.segments, strict=True)):
            alike = i and before is call.before[i - 1] and segment is call.segments[i - 1]
            masks.append(masks[-1] if alike else joined(before, segment.mask))  # neighbouring layers share one
        padded = bool(call.past and call.past.padded) or any(segment.padded for segment in call.segments)
        shift = call.shift if call.shift is not None else call.segments[0].position.new_zeros(len(call.text), 1)
        return Plan(call.seen + call.length, shift, masks, padded, call.tail)

    # -- the decoder layers -----------------------------------------------------------------------------------------

    def _enter_layer(self, i, layer, args, kwargs):
        call = self.call
        if call is None or not call.segments:
            return None
        hidden, kwargs = args[0], dict(kwargs)
        if i in self.pruners and call.encoded:
            hidden = self._prune(i, call, hidden, kv_cache(kwargs))
        segment, entrance = call.segments[i], call.segments[0]
        if call.weights[i] is not None:
            kwargs["attention_mask"] = self._soft_mask(i, call, hidden, kwargs)
        elif segment is not entrance or call.before[i] is not call.before[0]:
            kwargs["attention_mask"] = self._mask(i, call, hidden, kwargs)
        if segment is not entrance:
            if call.rope is None:
                call.rope = self.lm.rotary_emb(hidden, position_ids=segment.position)
            kwargs["position_embeddings"] = tuple(x.to(hidden.device) for x in call.rope)
        if call.gapped:
            kwargs["position_ids"] = None  # flash attention takes a gap for the start of another sequence
        if i + 1 in self.pruners and call.encoded:
            call.previous = layer, hidden, kwargs["position_embeddings"]
        return (hidden, *args[1:]), kwargs

    def _prune(self, i: int, call: Call, hidden: Tensor, cache: Cache | None) -> Tensor:
        """Ask the method which visual tokens stay from layer `i` on, and drop the others: (B, S, d) -> (B, S', d)."""
        old = call.segments[i]
        layout, device = old.layout, old.mask.device
        tags, last = upload(device, layout.tags, layout.last)
        image, place, origin = tags
        tokens = LayerInput(
            layer=i,
            hidden=hidden,
            mask=old.mask,
            image=image,
            origin=origin,
            last=last,
            entered=call.entered,
            images=call.features,
            slot=place - 1,
            weight=call.weights[i],
            previous=call.previous,
            keys=cached_keys(cache, i - 1, hidden),
        )
        with call.timed(hidden.device):
            weight = self.pruners[i].method.soft_retain(tokens)
            if weight is None:
                with torch.no_grad():
                    keep = self.pruners[i].method.retain(tokens)
        call.previous = None
        before = call.visual[i]
        if weight is not None:
            call.visits.append(Visit(self.pruners[i], before, before))
            weight = weight.to(device).masked_fill(image == 0, 1)
            weight = weight if call.weights[i] is None else call.weights[i] * weight
            call.weights[i:] = [weight] * (len(call.weights) - i)
            return hidden
        selection = layout.select(keep.cpu().numpy() | (layout.image == 0))
        if selection is None:
            call.visits.append(Visit(self.pruners[i], before, before))
            return hidden
        call.segments[i:] = [Segment.of(selection.layout, device)] * (len(call.segments) - i)
        visual = [count - text for count, text in zip(selection.counts.tolist(), call.text, strict=True)]
        call.visual[i:] = [visual] * (len(call.visual) - i)
        call.visits.append(Visit(self.pruners[i], before, visual))
        call.gapped, call.rope = True, None
        if call.weights[i] is not None:
            call.weights[i:] = [call.weights[i].gather(1, *upload(device, selection.index))] * (len(call.weights) - i)
        return pick_rows(hidden, selection.index)

    def _mask(self, i: int, call: Call, hidden: Tensor, kwargs: dict) -> Tensor | None:
        """The attention mask of the run of layers that layer `i` belongs to, made once per forward."""
        segment, before = call.segments[i], call.before[i]
        if kwargs.get("attention_mask") is None and not (segment.padded or call.past and call.past.padded):
            return None  # the back end did without a mask at the entrance, and nothing here needs one
        key = id(before), id(segment)
        if key not in call.masks:
            mask = joined(before, segment.mask).to(hidden.device)
            cache = kv_cache(kwargs)
            call.masks[key] = create_causal_mask(self.lm.config, hidden, mask, cache, layer_idx=i)
        made = call.masks[key]
        return made.to(hidden.device) if isinstance(made, Tensor) else made

    def _soft_mask(self, i: int, call: Call, hidden: Tensor, kwargs: dict) -> Tensor:
        """The attention mask of the run of layers that layer `i` belongs to, while a method trains."""
        backend = self.lm.config._attn_implementation
        if backend not in ("eager", "sdpa"):
            raise ValueError(
                f"{backend} attention takes no weights of keys, which training between layers needs; "
                "call model.set_attn_implementation('sdpa')"
            )
        if kv_cache(kwargs) is not None:
            raise ValueError(
                "a method in training hides visual tokens instead of dropping them, and a KV cache would bring them "
                "back: pass use_cache=False, or call .eval() on the trained part to drop them"
            )
        segment, weight = call.segments[i], call.weights[i]
        key = id(segment), id(weight)
        if key not in call.masks:
            call.masks[key] = weighted_causal_mask(segment.mask, weight, hidden.dtype)
        return call.masks[key].to(hidden.device)
