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
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.utils import ModelOutput

from vlmslim.engine.attention import LayerAttention, attention_of, stop_if_coming
from vlmslim.engine.coming_keys import KeyProjection
from vlmslim.engine.drop import drop
from vlmslim.engine.encoded import Encoded, record_of
from vlmslim.engine.encoder import RecordingEncoder
from vlmslim.engine.entrance import Entrance
from vlmslim.engine.families import (
    added_layers,
    blocks_of,
    family_of,
    kv_cache,
    language_model,
    layer_type,
)
from vlmslim.engine.forward import Call
from vlmslim.engine.gate import RUNNING, Gate
from vlmslim.engine.later import Later
from vlmslim.engine.layout import to_device
from vlmslim.engine.locate import check_kinds, read_prompt
from vlmslim.engine.packed import BOUNDARIES, packed_samples
from vlmslim.engine.plan import CompressedCache, Plan, compressed
from vlmslim.engine.prefix import words_before
from vlmslim.engine.recorder import Recorder
from vlmslim.engine.resume import check_length, resumed_position, trim_cached_prefix
from vlmslim.engine.shared_encoding import SharedEncoding
from vlmslim.engine.stages import Stage, tower_layers
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
        kinds = {"image": self.entrance.encodes} | ({"video": None} if self.family.video else {})
        self.tower_layers = tower_layers(stages, self.core)
        self.counts_only = not self.entrance.any_acts and not record
        self.encoders = {
            kind: RecordingEncoder(
                self.core, kind, self.tower_layers, self.counts_only, self._on_encoded, shared, encodes
            )
            for kind, encodes in kinds.items()
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
            self.handles += KeyProjection(self, i).attach(own)
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
        """True if dropping tokens before the language model leaves gaps in the rotary positions."""
        return self.entrance.stage is not None and self.entrance.stage.method.positions == "original"

    def _on_encoded(self, kind: str, output: ModelOutput) -> None:
        """Note images that are encoded inside `forward`, because they belong to it."""
        if self.call is not None:
            self.call.encoded[kind] = Encoded.of(output)

    # -- the model ---------------------------------------------------------------------------------------------------

    def _enter_model(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note for how many tokens the caller wants logits."""
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
            kwargs = self._resumed(kwargs, past, past.seen(cache))
        if not self.removed:
            for encoder in self.encoders.values():
                encoder.attach()  # a function may have been set on the model since the last forward
        encoded = self._encoded_before(kwargs)
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
        given = frozenset(kind for kind in self.encoders if kwargs.get(pixels[kind]) is not None)
        call = Call(encoded, past, cache, owner=self, guess=max(logits - 1, 0), given=given)
        call.embedded = kwargs.get("inputs_embeds") is not None
        check_kinds(self.family, given | encoded.keys())
        if self.record:
            call.recorder = Recorder()
        if given or encoded:
            call.read, call.before = read_prompt(self.core, kwargs, given | encoded.keys()), words_before(cache)
        if self.family.masks_by_type:
            call.given_mask, call.blocks = kwargs.get("attention_mask"), blocks_of(kwargs)
        return call, kwargs

    def _resumed(self, kwargs: dict, past: Plan, seen: int) -> dict:
        """Return the arguments of a forward that goes on with a shortened cache, which stands for `seen` tokens."""
        kwargs = trim_cached_prefix(kwargs, seen)
        self._hook_layers(min((first for first, _ in past.masks[1:]), default=self.depth))  # another patch's plan
        if past.delta is not None and kwargs.get("position_ids") is None:
            kwargs["position_ids"] = resumed_position(kwargs, seen, past.delta)
        return kwargs

    def _encoded_before(self, kwargs: dict) -> dict[str, Encoded]:
        """Return the images, by kind, that `generate` had encoded before it called `forward`."""
        outputs = {kind: out for kind, out in (kwargs.get("mm_encoder_outputs") or {}).items() if out is not None}
        for kind, output in outputs.items():
            self.encoders[kind].recognise(output)
        if self.removed or not self.entrance.any_acts:  # images encoded elsewhere cannot be counted, and need not be
            outputs = {kind: output for kind, output in outputs.items() if record_of(output) and not self.removed}
        return {kind: Encoded.of(output) for kind, output in outputs.items()}

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
        """Compress the images of the prompts, and close the gaps."""
        call = self.call
        if call is None:
            return None  # the language model is used alone
        embeds, cache = kwargs["inputs_embeds"], kv_cache(kwargs)
        mask, position = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if self.family.masks_by_type:
            mask = call.given_mask
        self._check_encoded(call)
        if not call.encoded and call.past is None:
            self._see_text(call, embeds, cache, mask)
            return None
        if call.encoded and self.entrance.any_acts:
            self._check_images_allowed(cache, call.past)
            call.packed = packed_samples(kwargs, call.read.get("position_ids"), cache, self.lm.config.use_cache)
        if call.packed is not None and position is not None:
            position = call.packed.unpack(position.expand(embeds.shape[:2]))
            embeds = call.packed.unpack(embeds)
            call.unpack()
            (mask,) = to_device(embeds.device, call.packed.mask)
            kwargs = {k: v for k, v in kwargs.items() if k not in BOUNDARIES}
        call.describe(embeds, cache, mask, position, self.entrance.any_acts)
        if call.encoded and self.entrance.any_acts and kwargs.get("deepstack_visual_embeds"):
            call.added, visual = kwargs["deepstack_visual_embeds"], kwargs["visual_pos_masks"].cpu().numpy()
            call.number = np.where(visual, visual.cumsum().reshape(visual.shape) - 1, -1)
            kwargs = kwargs | {"deepstack_visual_embeds": None}  # `_leave_layer` adds them
        if call.encoded:
            embeds = self.entrance.compress(call, embeds)
        if any(run.size is not None for run in call.runs):
            self._hook_layers(0)
        return args, kwargs | {"inputs_embeds": embeds} | self._places(call, embeds, cache, kwargs)

    def _check_encoded(self, call: Call) -> None:
        """Refuse images that passed a function of the user's in place of the patched encoder."""
        if self.entrance.any_acts and not self.removed and call.given - call.encoded.keys():
            raise ValueError(
                "the images of this prompt were encoded by a function that was set on the model after the patch, and "
                "that does not call the one before it, so nothing can be compressed; set it before the patch"
            )

    def _see_text(self, call: Call, embeds: Tensor, cache: Any, mask: Any) -> None:
        """Count prompts without images; check a KV cache that they go on with."""
        if not isinstance(cache, Cache) or cache.get_seq_length() == 0:
            self.receipt.saw_text(len(embeds))
            if call.embedded and embeds.shape[1] > 1 and self.entrance.any_acts:
                warnings.warn(_MERGED, stacklevel=3)
        elif self.entrance.any_acts:
            check_length(cache, mask, embeds.shape[1])

    def _places(self, call: Call, embeds: Tensor, cache: Cache | None, kwargs: dict) -> dict[str, Any]:
        """Return the positions and masks of the tokens that enter the language model, where the caller's do not fit."""
        if not call.altered and call.packed is None:
            return {}
        first = call.runs[0]
        places: dict[str, Any] = {"position_ids": first.tokens.position}
        if isinstance(kwargs.get("attention_mask"), dict):
            layers = {layer_type(self.lm, i): i for i in reversed(range(self.depth))}
            places["attention_mask"] = {
                kind: first.attention_mask(self.lm, i, embeds, cache, call.blocks) for kind, i in layers.items()
            }
        elif call.encoded or call.padded:
            places["attention_mask"] = first.mask
        return places

    def _check_images_allowed(self, cache: Cache | None, past: Plan | None) -> None:
        """Refuse a KV cache or a training setting in which the visual tokens of a forward cannot be removed."""
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
        """Count what happened, and put every token back at its place."""
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
            ValueError: the forward continues a compressed prompt, and the maps have no place for the dropped tokens.
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
        """Drop tokens if a stage acts before layer `i`, and give the layer its run's mask and positions."""
        call = self.call
        if call is None or not call.runs:
            return None
        hidden, kwargs, cache = args[0], dict(kwargs), kv_cache(kwargs)
        if i in self.at_layer and call.encoded:
            hidden = drop(self.at_layer[i], i, self.lm, call, hidden, cache, kwargs, self.later)
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
