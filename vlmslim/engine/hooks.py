"""The hooks of a patch: what is attached where, and in which order it acts.

    core (LlavaModel)        begin: note the prompt and the encoded images; cut what the cache already holds
      language_model         enter: compress each image, close the gaps      leave: put tokens back in place
        layers[i]            enter: drop visual tokens; give each run of layers its own mask and positions

Outside the language model no shape changes, which is why `generate`, labels and evaluation harnesses need no change.
"""

import warnings
from contextvars import ContextVar
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.utils import ModelOutput

from vlmslim.compressor import LayerInput
from vlmslim.engine.answers import check_counts, check_retained, check_weight
from vlmslim.engine.attention import LayerAttention, attention_of, stop_if_coming
from vlmslim.engine.encoded import Encoded, record_of
from vlmslim.engine.encoder import RecordingEncoder
from vlmslim.engine.entrance import (
    Entrance,
    check_kinds,
    check_length,
    read_prompt,
    resumed_position,
    trim_cached_prefix,
)
from vlmslim.engine.families import (
    added_layers,
    blocks_of,
    cached_keys,
    encoder_layers,
    family_of,
    kv_cache,
    language_model,
    layer_type,
)
from vlmslim.engine.forward import Call, Run, Visit
from vlmslim.engine.gate import RUNNING, Gate
from vlmslim.engine.later import Later
from vlmslim.engine.layout import Segment
from vlmslim.engine.packed import BOUNDARIES, Packed
from vlmslim.engine.plan import CompressedCache, Plan, compressed
from vlmslim.engine.recorder import Recorder
from vlmslim.engine.shared_encoding import SharedEncoding
from vlmslim.engine.stages import Stage
from vlmslim.ops.attention import gather_rows
from vlmslim.receipt import Receipt

_MERGED = (
    "the prompt came as inputs_embeds without pictures; if pictures are merged into it already, they are not "
    "compressed: pass input_ids and pixel_values, and let the patched model merge them"
)

#: `logits_to_keep` of the forward that begins in this thread or task: what comes before them is the prompt.
_LOGITS: ContextVar[int] = ContextVar("vlmslim_logits", default=0)


class Hooks:
    """The hooks of one patch, on one model instance.

    Args:
        model: the model to patch.
        stages: of the patch, in the order in which they act.
        receipt: counts what happens.
        record: keep what pictures show of the last prefill.
        shared: what the model encodes, with other patches that take turns on the same inputs.
    """

    def __init__(
        self,
        model: Any,
        stages: tuple[Stage, ...],
        receipt: Receipt,
        record: bool = False,
        shared: SharedEncoding | None = None,
    ):
        self.model, self.core, self.family = model, model.model, family_of(model)
        self.lm = language_model(self.core)
        self.depth = len(self.lm.layers)
        self.stages, self.receipt, self.record = stages, receipt, record
        self.later = Later()
        self.entrance = Entrance(self.core, stages, self.later)
        self.at_layer = {layer: stage for stage in stages for layer in stage.layers}
        kinds = ["image", "video"] if self.family.video else ["image"]
        self.tower_layers = _tower_layers(stages, self.core)
        self.counts_only = not self.entrance.any_acts and not record
        self.encoders = {
            kind: RecordingEncoder(self.core, kind, self.tower_layers, self.counts_only, self._on_encoded, shared)
            for kind in kinds
        }
        self.handles: list[RemovableHandle] = []
        self.first_layer = self.depth  # that has a hook; those after it have one too
        self.gate: Gate | None = None
        self.forwards, self.removed = 0, False  # kept by the gate: forwards that run now, and whether new ones may

    @property
    def call(self) -> Call | None:
        """The forward of this patch that runs in this thread or task; None outside of one."""
        call = RUNNING.get()
        return call if call is not None and call.owner is self else None

    def attach(self) -> None:
        """Register the hooks, on this instance only."""
        for encoder in self.encoders.values():
            encoder.attach()
        self.gate = Gate.on(self.core)
        add = self.handles.append
        add(self.model.register_forward_pre_hook(self._enter_model, with_kwargs=True))
        add(self.lm.register_forward_pre_hook(self._enter_lm, with_kwargs=True))
        add(self.lm.register_forward_hook(self._leave_lm))
        for i in range(added_layers(self.core)):
            add(self.lm.layers[i].register_forward_hook(partial(self._leave_layer, i)))
        # the layer before one that drops tokens has the attention by which a method ranks them
        self._hook_layers(0 if self._gaps_at_entrance else min(self.at_layer, default=self.depth + 1) - 1)
        for i in self.at_layer:
            before = self.lm.layers[i - 1]
            attention = attention_of(before)
            assert attention is not None  # `check_decoder` refuses such layers
            add(attention.register_forward_pre_hook(partial(self._enter_attention, before), with_kwargs=True))
            own = attention_of(layer := self.lm.layers[i])
            assert own is not None
            add(own.register_forward_pre_hook(partial(stop_if_coming, layer), with_kwargs=True, prepend=True))
        self.gate.add(self)

    def _hook_layers(self, first: int) -> None:
        """Register the hooks of the decoder layers from `first` on, as far as they are not."""
        for i in range(first, self.first_layer):
            hook = partial(self._enter_layer, i)
            self.handles.append(self.lm.layers[i].register_forward_pre_hook(hook, with_kwargs=True))
        self.first_layer = min(first, self.first_layer)

    def remove(self) -> None:
        """Begin no more forwards. The hooks go as soon as no forward runs and no cache needs them."""
        assert self.gate is not None
        for encoder in self.encoders.values():
            encoder.detach()
        self.removed = True
        self.gate.settle()

    def detach(self) -> None:
        """Remove every hook."""
        while self.handles:
            self.handles.pop().remove()

    @property
    def _gaps_at_entrance(self) -> bool:
        """Whether dropping tokens before the language model leaves gaps in the rotary positions."""
        return self.entrance.stage is not None and self.entrance.stage.method.positions == "original"

    def _on_encoded(self, kind: str, output: ModelOutput) -> None:
        """Note images that are encoded inside `forward`, because they belong to it."""
        if self.call is not None:
            self.call.encoded[kind] = Encoded.of(output)

    # -- the model ---------------------------------------------------------------------------------------------------

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note whose logits the caller asks for."""
        keep = kwargs.get("logits_to_keep")
        _LOGITS.set(keep if isinstance(keep, int) and kwargs.get("labels") is None else 0)

    def begin(self, kwargs: dict) -> tuple[Call | None, dict]:
        """Begin a forward: return its call, None if it is left alone, and its arguments."""
        self.later.settle()
        cache, logits = kv_cache(kwargs), _LOGITS.get()
        _LOGITS.set(0)
        past = Plan.of(cache)
        if past is None and self.removed:
            return None, kwargs
        if cache is not None and past is not None:
            kwargs = trim_cached_prefix(kwargs, past.seen(cache))
            self._hook_layers(min((first for first, _ in past.masks[1:]), default=self.depth))  # another patch's plan
            if past.delta is not None and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = resumed_position(kwargs, past.seen(cache), past.delta)
        if not self.removed:
            for encoder in self.encoders.values():
                encoder.attach()  # a function may have been set on the model since the last forward
        outputs = {kind: out for kind, out in (kwargs.get("mm_encoder_outputs") or {}).items() if out is not None}
        for kind, output in outputs.items():
            self.encoders[kind].recognise(output)
        if self.removed or not self.entrance.any_acts:  # images encoded elsewhere cannot be counted, and need not be
            outputs = {kind: output for kind, output in outputs.items() if record_of(output) and not self.removed}
        encoded = {kind: Encoded.of(output) for kind, output in outputs.items()}
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
        given = frozenset(kind for kind in self.encoders if kwargs.get(pixels[kind]) is not None)
        call = Call(ids, embeds, encoded, past, cache, owner=self, guess=max(logits - 1, 0), given=given)
        check_kinds(self.family, given | encoded.keys())
        if self.record:
            call.recorder = Recorder()
        if given or encoded:
            call.read = read_prompt(kwargs)
        if self.family.masks_by_type:
            call.given_mask, call.blocks = kwargs.get("attention_mask"), blocks_of(kwargs)
        return call, kwargs

    def check_ran(self, call: Call) -> None:
        """Refuse a forward with images that did not pass the language model which was there at the patch.

        Raises:
            RuntimeError: it did not.
        """
        if call.encoded and not call.runs and not self.removed:
            raise RuntimeError(
                "the language model of this model was replaced after the patch, so nothing was compressed; remove() "
                "the patch, and patch again"
            )

    # -- the language model ------------------------------------------------------------------------------------------

    def _enter_lm(self, lm: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            return None  # the language model is used alone
        embeds, cache = kwargs["inputs_embeds"], kv_cache(kwargs)
        mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if self.family.masks_by_type:
            mask = call.given_mask
        if self.entrance.any_acts and not self.removed and call.given - call.encoded.keys():
            raise ValueError(
                "the images of this prompt were encoded by a function that was set on the model after the patch, and "
                "that does not call the one before it, so nothing can be compressed; set it before the patch"
            )
        if not call.encoded and call.past is None:
            if not isinstance(cache, Cache) or cache.get_seq_length() == 0:
                self.receipt.saw_text(len(embeds))
                if call.embeds is not None and embeds.shape[1] > 1 and self.entrance.any_acts:
                    warnings.warn(_MERGED, stacklevel=2)
            elif self.entrance.any_acts:
                check_length(cache, mask, embeds.shape[1])
            return None
        if call.encoded:
            self._check_images_allowed(cache, call.past)
            call.packed = self._packed(kwargs, cache)
        if call.packed is not None and position is not None:
            position = call.packed.unpack(position.expand(embeds.shape[:2]))
            embeds = call.packed.unpack(embeds)
            call.input_ids = None if call.input_ids is None else call.packed.unpack(call.input_ids, fill=-1)
            call.embeds = None if call.embeds is None else call.packed.unpack(call.embeds)
            mask, call.guess = call.packed.mask, 0
            kwargs = {k: v for k, v in kwargs.items() if k not in BOUNDARIES}
        call.describe(embeds, cache, mask, position, self.entrance.any_acts)
        changed: dict[str, Any] = {}
        if call.encoded and self.entrance.any_acts and kwargs.get("deepstack_visual_embeds"):
            visual = kwargs["visual_pos_masks"].cpu().numpy()
            call.added, changed["deepstack_visual_embeds"] = kwargs["deepstack_visual_embeds"], None
            call.number = np.where(visual, visual.cumsum().reshape(visual.shape) - 1, -1)
        if call.encoded:
            embeds = self.entrance.compress(call, embeds)
        if any(run.size is not None for run in call.runs):
            self._hook_layers(0)
        changed["inputs_embeds"] = embeds
        if call.altered or call.packed is not None:
            first = call.runs[0]
            changed["position_ids"] = first.tokens.position
            if isinstance(kwargs.get("attention_mask"), dict):
                layers = {layer_type(self.lm, i): i for i in reversed(range(self.depth))}
                masks = {
                    kind: first.attention_mask(self.lm, i, embeds, cache, call.blocks) for kind, i in layers.items()
                }
                changed["attention_mask"] = masks
            elif call.encoded or call.padded:
                changed["attention_mask"] = first.mask
        return args, kwargs | changed

    def _packed(self, kwargs: dict, cache: Cache | None) -> Packed | None:
        """Find samples that the caller packed into rows. Only a forward without a mask and a cache can have them."""
        position = kwargs.get("position_ids")
        if position is None or position.ndim != 2 or kwargs.get("attention_mask") is not None:
            return None
        if not self.entrance.any_acts:
            return None
        if cache is not None and cache.get_seq_length() > 0:
            return None
        packed = Packed.of(position)
        use_cache = kwargs.get("use_cache")
        if packed is not None and (cache is not None or (self.lm.config.use_cache if use_cache is None else use_cache)):
            raise ValueError(
                "rotary positions that start again inside a row pack several samples into it, and transformers keeps "
                "them apart only without a KV cache: pass use_cache=False, or give each sample a row of its own"
            )
        return packed

    def _check_images_allowed(self, cache: Cache | None, past: Plan | None) -> None:
        """Refuse what a forward with images cannot have."""
        if not self.entrance.any_acts:
            return
        if cache is not None and not isinstance(cache, Cache):
            raise ValueError(
                f"visual tokens cannot be removed from a {type(cache).__name__}; continuous batching takes text "
                "prompts only: call generate() for prompts with images"
            )
        if cache is not None and cache.is_compileable:
            raise ValueError(
                f"{type(cache).__name__} reserves room for every token; visual tokens can be removed from a "
                "DynamicCache only (do not set cache_implementation)"
            )
        if self.at_layer and past is not None:
            raise ValueError(
                f"{self.at_layer[min(self.at_layer)].method} drops tokens during prefill, and the KV cache holds a "
                "prompt whose visual tokens were dropped already; for an image in a later turn prefill again, or use a "
                "method that works before the language model"
            )
        checkpointing = any(getattr(layer, "gradient_checkpointing", False) for layer in self.lm.layers)
        if (self.at_layer or self._gaps_at_entrance) and self.lm.training and checkpointing:
            raise ValueError(
                "gradient checkpointing re-runs decoder layers outside the forward that knows which tokens they hold; "
                "disable it, or use a method that works before the language model with renumbered positions"
            )

    def _leave_lm(self, lm: Any, args: tuple, output: Any) -> Any:
        call, cache = self.call, kv_cache(output)
        if call is None or not call.runs:
            return output
        call.cache = cache
        if call.encoded:
            self.receipt.backend = lm.config._attn_implementation  # as it is now, not as it was at the patch
            self.receipt.dtype = str(output.last_hidden_state.dtype).removeprefix("torch.")
            if any(call.counts):
                self.receipt.saw_prefill(call.prefill(self.stages, cache, self.depth))
            else:  # the caller's mask hides every image
                self.receipt.saw_text(len(call.text))
        if not call.altered and call.packed is None:
            return output
        if call.encoded and cache is not None:
            self._note_plan(call.plan(), cache)
        output.last_hidden_state = call.restore(call.runs[-1], output.last_hidden_state)
        if getattr(output, "attentions", None) is not None and call.altered:
            output.attentions = self._attentions(call, output.attentions)
        if output.hidden_states is not None:  # what enters the first layer, and what leaves each
            runs = [call.run(max(0, i - 1)) for i in range(len(output.hidden_states))]
            output.hidden_states = tuple(
                call.restore(run, hidden) for run, hidden in zip(runs, output.hidden_states, strict=True)
            )
        return output

    def _attentions(self, call: Call, maps: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        """Lay attention maps of every layer out over the caller's tokens.

        Raises:
            ValueError: the forward continues a compressed prompt, of which the maps have no place for what is gone.
        """
        if call.past is not None or call.packed is not None:
            raise ValueError(
                "output_attentions is given for a whole prompt in rows of its own: with visual tokens dropped, the "
                "maps of later steps have no columns for them; call the model once on the prompt and the answer"
            )
        return tuple(None if x is None else call.run(i).tokens.restore_map(x) for i, x in enumerate(maps))

    def _note_plan(self, plan: Plan, cache: Cache) -> None:
        """Note in `cache` what it holds now, and stay as long as it lives."""
        assert self.gate is not None
        if not isinstance(cache, CompressedCache):
            self.gate.hold(cache)
        compressed(cache, plan)

    # -- the decoder layers ------------------------------------------------------------------------------------------

    def _enter_layer(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None or not call.runs:
            return None
        hidden, kwargs, cache = args[0], dict(kwargs), kv_cache(kwargs)
        if i in self.at_layer and call.encoded:
            hidden = self._drop(i, call, hidden, cache, kwargs)
        run, first = call.run(i), call.runs[0]
        if run.size is not None:
            kwargs["attention_mask"] = run.attention_mask(self.lm, i, hidden, cache, call.blocks)
        elif run is not first:
            without_padding = not (run.tokens.padded or call.past and call.past.padded)
            if run.weight is not None or kwargs.get("attention_mask") is not None or not without_padding:
                kwargs["attention_mask"] = run.attention_mask(self.lm, i, hidden, cache, call.blocks)
        if run.tokens is not first.tokens:
            kwargs["position_embeddings"] = run.rotary(self.lm, i, hidden)
        if run.tokens.gapped or run.tokens is not first.tokens:
            kwargs["position_ids"] = None  # flash attention takes a gap for the start of another sequence
        return (hidden, *args[1:]), kwargs

    def _enter_attention(self, layer: nn.Module, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what a layer attends with, because the next one drops tokens by it."""
        call = self.call
        if call is not None and call.runs and call.encoded:
            call.previous = LayerAttention.entered(layer, attention, args, kwargs)

    def _leave_layer(self, i: int, layer: nn.Module, args: tuple, hidden: Tensor) -> Tensor | None:
        """Add to the visual tokens that are left what the model adds after layer `i` (DeepStack)."""
        call = self.call
        if call is None or call.number is None:
            return None
        number = call.run(i).tokens.of_callers(call.number, fill=-1)
        added = call.added[i].to(hidden)[number.clamp(min=0).to(hidden.device)]
        return hidden + added.masked_fill((number < 0).to(hidden.device)[..., None], 0)

    def _drop(self, i: int, call: Call, hidden: Tensor, cache: Cache | None, kwargs: dict) -> Tensor:
        """Ask which visual tokens stay from layer `i` on, and drop the others: (B, S, d) -> (B, S', d)."""
        stage, run = self.at_layer[i], call.run(i)
        layout, device = run.tokens.layout, run.tokens.mask.device
        assert layout is not None
        held = 0 if run.cached is None else run.cached.shape[1]
        keys = cached_keys(cache, i - 1, hidden, held)
        if held and keys is None:
            raise ValueError(
                f"{stage.method} reads attention to the {held} tokens that the KV cache held before the image, and a "
                f"{type(cache).__name__} does not give their keys; prefill text and image together"
            )

        def coming() -> LayerAttention:
            own = cached_keys(cache, i, hidden[:, :0], held) if held else None
            if held and own is None:
                raise ValueError(
                    f"{stage.method} reads attention to the {held} tokens that the KV cache held before the image, and "
                    f"this {type(cache).__name__} does not give their keys of layer {i}; prefill text and image "
                    "together"
                )
            given = kwargs
            if run.tokens is not call.runs[0].tokens:
                given = kwargs | {"position_embeddings": run.rotary(self.lm, i, hidden)}
            return LayerAttention.coming(self.lm.layers[i], hidden, given, own)

        tokens = LayerInput(
            layer=i,
            hidden=hidden,
            mask=run.tokens.mask,
            image=layout.image,
            slot=layout.slot,
            origin=layout.origin,
            last=layout.last,
            entered=call.entered,
            present=run.present,
            image_last=call.image_last,
            images=call.images,
            weight=run.weight,
            previous=call.previous,
            coming=coming,
            in_cache=keys,
            cached=run.cached,
            size=run.size,
            blocks=None if call.blocks is None else run.tokens.of_callers(call.blocks, fill=-1),
        ).without_last(call.guess)
        with call.timed(hidden.device):
            weight = check_weight(stage.method, tokens, stage.method.soft_retain(tokens))
            if weight is None:
                with torch.no_grad():
                    keep, states = check_retained(stage.method, tokens, stage.method.retain(tokens))
                    keep = nn.functional.pad(keep, (0, call.guess), value=True)
        if call.recorder is not None:
            call.recorder.note(i, tokens)
        call.previous = None
        renumber = stage.method.layer_positions == "renumbered"
        if weight is not None:
            if run.size is not None:
                raise ValueError(
                    f"{stage.method} hides tokens in training, and rectify=True counts merged ones; leave out rectify"
                )
            if renumber:
                raise ValueError(
                    f"{stage.method} hides tokens in training instead of dropping them, so there are no gaps to close; "
                    "use layer_positions='original' with it"
                )
            weight = weight.to(device).masked_fill(layout.image == 0, 1)
            weight = weight if run.weight is None else run.weight * weight
            call.runs.append(Run(i, run.tokens, run.visual, run.present, run.cached, weight))
            call.visits.append(Visit(stage, run.visual, run.visual))
            return hidden
        if states is not None:
            made = torch.cat([states.to(hidden), hidden[:, states.shape[1] :]], dim=1)
            hidden = torch.where((layout.image > 0).to(hidden.device)[..., None], made, hidden)
        keep = keep.to(device) | (layout.image == 0)  # text stays whatever the method says
        known, counts = stage.method.known_counts(tokens), None
        if known is not None:
            visual = [sum(row) for row in known]
            kept = (keep & (layout.image > 0)).sum(1)
            self.later.check(kept, partial(check_counts, stage.method, visual))
            counts = [each + text for each, text in zip(visual, call.text, strict=True)]
        selection = layout.select(keep, renumber, counts)
        if selection is None:
            call.visits.append(Visit(stage, run.visual, run.visual))
            return hidden
        visual = [count - text for count, text in zip(selection.layout.counts, call.text, strict=True)]
        index = selection.index
        weight = None if run.weight is None else run.weight.gather(1, index)
        size = None if run.size is None else torch.cat([run.size[:, :held], run.size[:, held:].gather(1, index)], 1)
        lower = run.lower
        if renumber:
            lower = selection.shift if lower is None else lower + selection.shift
        present = known or [[count] for count in visual]
        call.runs.append(Run(i, Segment.of(selection.layout), visual, present, run.cached, weight, lower, size))
        call.visits.append(Visit(stage, run.visual, visual))
        return gather_rows(hidden, index.to(hidden.device))


def _tower_layers(stages: tuple[Stage, ...], core: Any) -> tuple[int, ...]:
    """Collect the vision-tower layers that the stages read.

    Raises:
        ValueError: there is no such layer.
    """
    wanted = set()
    for stage in stages:
        for layer in stage.method.tower_layers:
            depth = len(encoder_layers(core))
            if not -depth <= layer < depth:
                raise ValueError(f"{stage.method}: the vision tower has {depth} layers, no layer {layer}")
            wanted.add(layer)
    return tuple(sorted(wanted))
