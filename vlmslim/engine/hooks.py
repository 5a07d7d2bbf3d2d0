"""The hooks of a patch: what is attached where, and in which order it acts.

    core (LlavaModel)        enter: note the prompt and the encoded images; cut what the cache already holds
      language_model         enter: compress each image, close the gaps      leave: put tokens back in place
        layers[i]            enter: drop visual tokens; give each run of layers its own mask and positions

Outside the language model no shape changes, which is why `generate`, labels and evaluation harnesses need no change.
"""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache
from transformers.utils import ModelOutput

from vlmslim.compressor import LayerInput
from vlmslim.engine.answers import check_retained, check_weight
from vlmslim.engine.encoder import Encoded, RecordingEncoder, is_recorded
from vlmslim.engine.entrance import Entrance, trim_cached_prefix
from vlmslim.engine.families import cached_keys, encoder_layers, family_of, kv_cache
from vlmslim.engine.forward import Call, Run, Visit
from vlmslim.engine.layout import Segment, to_device
from vlmslim.engine.plan import Plan
from vlmslim.engine.stages import Stage
from vlmslim.ops.attention import gather_rows
from vlmslim.receipt import Receipt


class Hooks:
    """The hooks of one patch, on one model instance.

    Args:
        model: the model to patch.
        stages: of the patch, in the order in which they act.
        receipt: counts what happens.
    """

    def __init__(self, model: Any, stages: tuple[Stage, ...], receipt: Receipt):
        self.core, self.lm = model.model, model.model.language_model
        self.argument_names = list(inspect.signature(type(self.core).forward).parameters)[1:]
        self.depth = len(self.lm.layers)
        self.stages, self.receipt = stages, receipt
        self.entrance = Entrance(self.core, stages)
        self.at_layer = {layer: stage for stage in stages for layer in stage.layers}
        kinds = ["image", "video"] if family_of(model).video else ["image"]
        tower_layers = _tower_layers(stages, len(encoder_layers(self.core)))
        self.encoders = {kind: RecordingEncoder(self.core, kind, tower_layers, self._on_encoded) for kind in kinds}
        self.call: Call | None = None
        self.handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Register the hooks, on this instance only."""
        for encoder in self.encoders.values():
            encoder.attach()
        add = self.handles.append
        add(self.core.register_forward_pre_hook(self._enter_core, with_kwargs=True))
        add(self.core.register_forward_hook(self._leave_core, always_call=True))
        add(self.lm.register_forward_pre_hook(self._enter_lm, with_kwargs=True))
        add(self.lm.register_forward_hook(self._leave_lm))
        # the layer before one that drops tokens has the attention by which a method ranks them
        first = 0 if self._gaps_at_entrance else min(self.at_layer, default=self.depth + 1) - 1
        for i in range(first, self.depth):
            add(self.lm.layers[i].register_forward_pre_hook(partial(self._enter_layer, i), with_kwargs=True))

    def detach(self) -> None:
        """Remove every hook."""
        for encoder in self.encoders.values():
            encoder.detach()
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

    def _enter_core(self, core: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        kwargs |= dict(zip(self.argument_names, args, strict=False))  # LLaVA-NeXT passes input_ids by position
        cache = kv_cache(kwargs)
        past = Plan.of(cache)
        if cache is not None and past is not None:
            kwargs = trim_cached_prefix(kwargs, past.seen(cache))
        outputs = {kind: out for kind, out in (kwargs.get("mm_encoder_outputs") or {}).items() if out is not None}
        for kind, output in outputs.items():
            self.encoders[kind].recognise(output)
        if not self.entrance.any_acts:  # images that were encoded elsewhere cannot be counted, and need not be
            outputs = {kind: output for kind, output in outputs.items() if is_recorded(output)}
        encoded = {kind: Encoded.of(output) for kind, output in outputs.items()}
        self.call = Call(kwargs.get("input_ids"), kwargs.get("inputs_embeds"), encoded, past)
        return (), kwargs

    def _leave_core(self, core: nn.Module, args: tuple, output: object) -> None:
        self.call = None

    # -- the language model ------------------------------------------------------------------------------------------

    def _enter_lm(self, lm: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None:
            return None  # the language model is used alone
        embeds, cache = kwargs["inputs_embeds"], kv_cache(kwargs)
        if not call.encoded and call.past is None:
            if cache is None or cache.get_seq_length() == 0:
                self.receipt.saw_text(len(embeds))
            return None
        if call.encoded:
            self._check_images_allowed(cache)
        call.describe(embeds, cache, kwargs.get("attention_mask"), kwargs.get("position_ids"))
        if call.encoded:
            embeds = self.entrance.compress(call, embeds)
        changed = {"inputs_embeds": embeds}
        if call.altered:
            changed["position_ids"] = call.runs[0].tokens.position
            if call.encoded or call.padded:
                changed["attention_mask"] = call.runs[0].mask
        return args, kwargs | changed

    def _check_images_allowed(self, cache: Cache | None) -> None:
        """Refuse what a forward with images cannot have."""
        if not self.entrance.any_acts:
            return
        if cache is not None and cache.is_compileable:
            raise ValueError(
                f"{type(cache).__name__} reserves room for every token; visual tokens can be removed from a "
                "DynamicCache only (do not set cache_implementation)"
            )
        if self.at_layer and cache is not None and cache.get_seq_length(0) > 0:
            raise ValueError(
                f"{self.at_layer[min(self.at_layer)].method} drops tokens during prefill and takes images in the first "
                "forward of a cache only; for an image in a later turn prefill again, or use a method that works "
                "before the language model"
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
        if call.encoded:
            self.receipt.backend = lm.config._attn_implementation  # as it is now, not as it was at the patch
            self.receipt.dtype = str(output.last_hidden_state.dtype).removeprefix("torch.")
            self.receipt.saw_prefill(call.prefill(self.stages, cache, self.depth))
        if not call.altered:
            return output
        if call.encoded and cache is not None:
            call.plan().attach(cache)
        output.last_hidden_state = call.runs[-1].tokens.restore(output.last_hidden_state)
        if output.hidden_states is not None:  # what enters the first layer, and what leaves each
            runs = [call.run(max(0, i - 1)) for i in range(len(output.hidden_states))]
            output.hidden_states = tuple(
                run.tokens.restore(hidden) for run, hidden in zip(runs, output.hidden_states, strict=True)
            )
        return output

    # -- the decoder layers ------------------------------------------------------------------------------------------

    def _enter_layer(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        call = self.call
        if call is None or not call.runs:
            return None
        hidden, kwargs, cache = args[0], dict(kwargs), kv_cache(kwargs)
        if i in self.at_layer and call.encoded:
            hidden = self._drop(i, call, hidden, cache)
        run, first = call.run(i), call.runs[0]
        if run is not first:
            without_padding = not (run.tokens.padded or call.past and call.past.padded)
            if run.weight is not None or kwargs.get("attention_mask") is not None or not without_padding:
                kwargs["attention_mask"] = run.attention_mask(self.lm, i, hidden, cache)
        if run.tokens is not first.tokens:
            kwargs["position_embeddings"] = run.rotary(self.lm, hidden)
        if run.tokens.gapped:
            kwargs["position_ids"] = None  # flash attention takes a gap for the start of another sequence
        if i + 1 in self.at_layer and call.encoded:
            call.previous = layer, hidden, kwargs["position_embeddings"]
        return (hidden, *args[1:]), kwargs

    def _drop(self, i: int, call: Call, hidden: Tensor, cache: Cache | None) -> Tensor:
        """Ask which visual tokens stay from layer `i` on, and drop the others: (B, S, d) -> (B, S', d)."""
        stage, run = self.at_layer[i], call.run(i)
        layout, device = run.tokens.layout, run.tokens.mask.device
        assert layout is not None
        image, slot, origin, last = to_device(device, layout.image, layout.slot, layout.origin, layout.last)
        tokens = LayerInput(
            layer=i,
            hidden=hidden,
            mask=run.tokens.mask,
            image=image,
            slot=slot,
            origin=origin,
            last=last,
            entered=call.entered,
            images=call.images,
            weight=run.weight,
            previous=call.previous,
            keys=cached_keys(cache, i - 1, hidden),
        )
        with call.timed(hidden.device):
            weight = check_weight(stage.method, tokens, stage.method.soft_retain(tokens))
            if weight is None:
                with torch.no_grad():
                    keep = check_retained(stage.method, tokens, stage.method.retain(tokens))
        call.previous = None
        if weight is not None:
            weight = weight.to(device).masked_fill(image == 0, 1)
            weight = weight if run.weight is None else run.weight * weight
            call.runs.append(Run(i, run.tokens, run.visual, run.cached, weight))
            call.visits.append(Visit(stage, run.visual, run.visual))
            return hidden
        selection = layout.select(keep.cpu().numpy() | (layout.image == 0))  # text stays whatever the method says
        if selection is None:
            call.visits.append(Visit(stage, run.visual, run.visual))
            return hidden
        visual = [count - text for count, text in zip(selection.counts.tolist(), call.text, strict=True)]
        (index,) = to_device(device, selection.index)
        weight = None if run.weight is None else run.weight.gather(1, index)
        call.runs.append(Run(i, Segment.of(selection.layout, device), visual, run.cached, weight))
        call.visits.append(Visit(stage, run.visual, visual))
        return gather_rows(hidden, index.to(hidden.device))


def _tower_layers(stages: tuple[Stage, ...], depth: int) -> tuple[int, ...]:
    """Collect the vision-tower layers that the stages read, of `depth`.

    Raises:
        ValueError: there is no such layer.
    """
    wanted = set()
    for stage in stages:
        for layer in stage.method.tower_layers:
            if not -depth <= layer < depth:
                raise ValueError(f"{stage.method}: the vision tower has {depth} layers, no layer {layer}")
            wanted.add(layer)
    return tuple(sorted(wanted))
