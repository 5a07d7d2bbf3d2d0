"""`patch`: attach a compression method to a model, and take it off again."""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmslim import registry
from vlmslim.compressor import Compressor
from vlmslim.engine.embeddings import compressed_prompt
from vlmslim.engine.families import (
    check_decoder,
    check_patches,
    check_tower,
    check_tower_layers,
    family_of,
    has_cls,
    language_model,
    sees_whole,
    tower,
)
from vlmslim.engine.hooks import Hooks
from vlmslim.engine.own_budgets import check_own_budget
from vlmslim.engine.shadow import Shadow
from vlmslim.engine.shared_encoding import SharedEncoding
from vlmslim.engine.stages import Stage, in_order
from vlmslim.receipt import Receipt
from vlmslim.registry import build, is_method_name, name_of
from vlmslim.saving.folder import read, save

if TYPE_CHECKING:
    import PIL.Image

Method = str | os.PathLike | dict | Compressor | Sequence[str | dict | Compressor]


class Slim:
    """A compression method on one model instance: a context manager, or a handle with `remove()`.

    Attributes:
        model: the patched model.
        methods: the methods, as the user gave them.
        stages: the stages that they consist of, in the order in which they act.
        trained: the trained parts by method name, an empty `nn.ModuleDict` for training-free methods. They belong to
            the handle: the model's own parameters and state dict stay as they are.
        processor: the checkpoint's processor, if `vlmslim.from_pretrained` loaded both; else None.
    """

    def __init__(self, model: Any, methods: list[Compressor], record: str | None = None):
        if record not in (None, "tokens"):
            raise ValueError(f"record={record!r}: give 'tokens' to keep what pictures need, or nothing")
        family_of(model)  # refuses what cannot be patched
        check_decoder(model.model)
        check_unpatched(model)
        self.model, self.methods = model, methods
        self.processor: Any = None
        parts = set_up(methods, model)
        self.trained = _trained(parts)
        depth = len(language_model(model.model).layers)
        self.stages = in_order([Stage.of(name_of(part), part, depth) for part in parts])
        for part in parts:
            if part.tower_layers:
                check_tower_layers(model.model, name_of(part))
        check_decoder(model.model, next((stage.name for stage in self.stages if stage.layers), None))
        self._receipt = _empty_receipt(model, str(self), self.stages)
        self._records = record is not None
        self.attach()

    def attach(self, shared: SharedEncoding | None = None) -> "Slim":
        """Put the patch on, again after `remove()`; the receipt goes on counting.

        Args:
            shared: what the model encodes, with other patches that take turns on the same inputs (`shared_encoding`).

        Raises:
            RuntimeError: the model is patched.
        """
        check_unpatched(self.model)
        self._hooks = Hooks(self.model, self.stages, self._receipt, self._records, shared)
        self._hooks.attach()
        self._saving = Shadow(self.model, "save_pretrained", self._save_unpatched)
        self._saving.stay_on_top()
        self.model._vlmslim = self
        return self

    def remove(self) -> None:
        """Give the model back exactly as it was. A second call does nothing.

        What began under the patch ends under it, in another thread too: a forward that runs, and an answer whose KV
        cache lives. Their hooks go with them.
        """
        if getattr(self.model, "_vlmslim", None) is self:
            self._hooks.remove()
            del self.model._vlmslim
            self._saving.lift()
            self._hooks.later.settle()

    def save_pretrained(self, folder: str | os.PathLike, with_base: bool = False, processor: Any = None) -> None:
        """Write the patch: methods and options to `vlmslim.json`, trained parts to `vlmslim-HASH.safetensors`.

        `vlmslim.from_pretrained(folder)` and `vlmslim.patch(model, folder)` restore it.

        Args:
            folder: made if it is not there. A patch in it is replaced, all at once; other files stay as they are.
            with_base: write the checkpoint and its processor too, unpatched, as `folder/base`. If the folder has a
                `base` already, the new one is `folder/base-NUMBER`; a name in `vlmslim.json` tells them apart.
            processor: the checkpoint's; by default `self.processor`, or found where the model came from.

        Raises:
            ValueError: a method that no name can load again, an option that JSON cannot hold, or a folder that cannot
                be written to or has a `vlmslim.json` that vlmslim did not write.
        """
        processor = processor or self.processor
        save(folder, self.model, self.methods, self.trained, with_base=with_base, processor=processor)

    def _save_unpatched(self, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Save the checkpoint as the model does, and warn that it does not contain the patch."""
        warnings.warn(
            f"the checkpoint is saved without its patch ({self}); slim.save_pretrained(folder) saves the patch, "
            "with_base=True both; or call vlmslim.patch again after loading",
            stacklevel=3,
        )
        return save(*args, **kwargs)

    def picture(
        self, processor: Any = None, *, row: int = 0, layer: int | None = None, size: int = 320
    ) -> "PIL.Image.Image":
        """Draw the visual tokens that the last prefill kept: kept patches clear, dropped ones faded.

        Args:
            processor: the checkpoint's, which knows how pixels were normalised; by default `self.processor`.
            row: the prompt of the batch. Each of its images gets a line of pictures.
            layer: the decoder layer whose tokens are drawn. By default there is a picture of the image as the model
                saw it, one after each stage, and one of the scores of each stage that has them.
            size: pixels of the longer side of a crop.

        Raises:
            RuntimeError: no image was seen yet, or the patch records no tokens.
            ValueError: no such prompt or layer, no processor, or a stage that does not say what it made its tokens of.
        """
        from vlmslim.pictures.draw import Panel, kept, panels, sheet

        traces = self.receipt.last.traces
        if traces is None:
            raise RuntimeError('this patch records no tokens; patch with vlmslim.patch(..., record="tokens")')
        if not 0 <= row < len(traces) or not traces[row]:
            pictured = [i for i, own in enumerate(traces) if own]
            raise ValueError(f"row={row}: the last prefill has images in these prompts of its batch: {pictured}")
        processor = processor or self.processor
        if layer is None:
            return sheet([panels(trace, processor, size) for trace in traces[row]])
        return sheet(
            [
                [
                    Panel(
                        kept(trace, processor, layer, size),
                        f"{trace.at(layer).count} of {len(trace.grid)} visual tokens",
                        f"layer {layer}",
                    )
                ]
                for trace in traces[row]
            ]
        )

    def compress(self, **inputs: Any) -> dict[str, Tensor]:
        """Return the prompt as the language model would see it, for engines that take embeddings.

        Static caches, `torch.compile` and CUDA graphs can run it, on the model without its patch:
        `slim.remove(); model.generate(**prompt, cache_implementation="static")`.

        Args:
            **inputs: of the model's forward: `input_ids`, `attention_mask`, `pixel_values` ...

        Returns:
            `inputs_embeds` (B, S, d), `attention_mask` (B, S), and `position_ids` (B, S), or (axes, B, S) where a
            position has several numbers. Rows are padded on the left.

        Raises:
            ValueError: a stage works inside the decoder, the language model needs more than embeddings, or there is no
                image.
        """
        return compressed_prompt(self._hooks, inputs)

    @property
    def receipt(self) -> Receipt:
        """The count of what happened since the patch or the last `reset_receipt()`.

        Raises:
            ValueError: a check of the last prefill, which had to wait for the device, fails.
        """
        self._hooks.later.settle()
        return self._receipt

    @property
    def substitutes(self) -> tuple[str, ...]:
        """Name what the methods read on this model in place of what their papers read, such as "received".

        `vlmslim.methods._substitutes.SUBSTITUTES` says what each name means.
        """
        found = [name for stage in self.stages for name in stage.method.substitutes]
        layers = [layer for stage in self.stages for layer in stage.method.tower_layers]
        if not all(sees_whole(self.model.model, layer) for layer in layers):
            found.append("full attention")
        return tuple(dict.fromkeys(found))

    def reset_receipt(self) -> None:
        """Start counting anew."""
        self.receipt.reset()

    def __enter__(self) -> "Slim":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __str__(self) -> str:
        return " + ".join(map(str, self.methods))


def set_up(methods: Sequence[Compressor], model: Any) -> list[Compressor]:
    """Return copies of the stages of `methods` that have looked at a model.

    Raises:
        TypeError: the engine cannot look into the model's vision tower.
        ValueError: a method does not suit the model.
    """
    parts = [copy.copy(part) for method in methods for part in method.stages()]
    if any(part.acts_before_llm or part.drops_between_layers for part in parts):
        check_tower(model.model)
    for part in parts:
        _check_cls(part, model)
        check_own_budget(name_of(part), part)
        if part.needs_patches:
            check_patches(model.model, name_of(part))
        with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it is
            part.setup(model)
    return parts


def shared_encoding(slims: Iterable[Slim]) -> SharedEncoding:
    """Let patches of one model share what it encodes, while they take turns on the same inputs.

        shared = shared_encoding(slims)
        for slim in slims:
            with slim.attach(shared):
                model.generate(**inputs)  # encodes the pictures once

    Answers, receipts and selection times are those of each patch alone.
    """
    hooks = [slim._hooks for slim in slims]
    layers = (layer for own in hooks for layer in own.tower_layers)
    return SharedEncoding(layers, counts_only=all(own.counts_only for own in hooks))


def _trained(parts: list[Compressor]) -> nn.ModuleDict:
    """Collect the trained parts by the names under which they are saved."""
    trained = nn.ModuleDict()
    for part in parts:
        if (module := part.trained()) is not None:
            if (name := name_of(part)) in trained:
                raise ValueError(f"two stages with a trained part have the name {name}; rename the class of one")
            trained[name] = module
    return trained


def patch(model: nn.Module, method: Method, *, record: str | None = None, **options) -> Slim:
    """Attach a compression method to a LLaVA-style model.

    Args:
        model: a loaded model of a supported family, such as `LlavaForConditionalGeneration` or
            `Qwen2_5_VLForConditionalGeneration`; docs/models.md lists them.
        method: a method's name, with its options as keywords; or a method object; or a list of stages, each a
            name, an object, or a dictionary such as `{"method": "divprune", "keep": 128}`; or what
            `Slim.save_pretrained` wrote, a folder or a repository on the hub.
        record: "tokens" keeps what `Slim.picture` needs of the last prefill; by default nothing is kept.
        **options: of the method, when it is given by name: `keep=64` (tokens per image) or `keep=0.11` (a share) ...
            Of a saved method they replace what was saved.

    Returns:
        The handle: a context manager, with `remove()` and `receipt`.

    Raises:
        TypeError: the model is of no supported class, or the engine cannot look into its vision tower or language
            model.
        ValueError: unknown method or option, an option out of range, stages that do not go together, or a method that
            needs a CLS token on a tower without one.
        RuntimeError: the model is already patched.
    """
    return Slim(model, made(method, **options), record)


def made(method: Method, **options: Any) -> list[Compressor]:
    """Make the methods that `patch` was asked for.

    Raises:
        ValueError: as `patch`.
    """
    if isinstance(method, str | os.PathLike):
        saved = None if isinstance(method, str) and is_method_name(method) else read(method)
        if saved is not None:
            return [build(stage) for stage in saved.stages(**options)]
        return [registry.method(str(method), **options)]
    if options:
        raise ValueError(f"options go with a method's name only; {sorted(options)} came with {method!r}")
    parts = method if isinstance(method, Sequence) else [method]
    if not parts:
        raise ValueError("no stage given; for a patch that only counts, use patch(model, 'none')")
    return [build(part) for part in parts]


def check_unpatched(model: nn.Module) -> None:
    """Refuse a model that is patched.

    Raises:
        RuntimeError: it is; the message names the patch.
    """
    if (slim := getattr(model, "_vlmslim", None)) is not None:
        raise RuntimeError(f"this model is already patched with {slim}; remove() that patch first")


def _check_cls(method: Compressor, model: Any) -> None:
    """Refuse a method that reads the CLS token on a model whose vision tower has none."""
    if method.needs_cls and not has_cls(model.model):
        raise ValueError(
            f"{type(method).__name__} reads the vision tower's CLS token, and "
            f"{type(tower(model.model)).__name__} has none (CLIP towers have one, SigLIP towers do not); "
            "choose another method for this checkpoint"
        )


def _positions(stages: tuple[Stage, ...]) -> str:
    """Say in words what becomes of rotary positions, before the language model and between its layers."""
    between = any(stage.layers and stage.method.layer_positions == "renumbered" for stage in stages)
    before = next((stage.method.positions for stage in stages if stage.acts_before_llm), None)
    if before is None:
        return "renumbered" if between else "original"
    return f"{before}, between layers {'too' if before == 'renumbered' else 'renumbered'}" if between else before


def _empty_receipt(model: Any, method: str, stages: tuple[Stage, ...]) -> Receipt:
    text, lm = model.config.get_text_config(), language_model(model.model)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Receipt(
        method=method,
        positions=_positions(stages),
        backend=text._attn_implementation,
        dtype=str(next(lm.parameters()).dtype).removeprefix("torch."),
        kv_numbers=2 * (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * head_dim,
        layers=len(lm.layers),
        places=tuple((stage.name, stage.layers) for stage in stages),
    )
