"""Observation of a model while it encodes images: hooks note what enters the tower, its layers and the projector."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmslim.engine.attention import attention_of, tower_heads
from vlmslim.engine.families import attending_layer, encoder_layers, has_plain_heads, projector, tower
from vlmslim.ops.attention import head_makers, split_heads

#: The observation of the images that are encoded in this thread or task. Hooks of other observations note nothing.
_ENCODING: ContextVar["Observation | None"] = ContextVar("vlmslim_encoding", default=None)


def observe(
    core: Any, tower_layers: Sequence[int], encode: Callable[[], Any], idle: bool = False
) -> "tuple[Any, Observation]":
    """Encode images, and note what passes.

    Args:
        core: the model without its head.
        tower_layers: the layers of the vision tower whose inputs, or queries and keys, are noted.
        encode: encodes the images with this model.
        idle: layers of the tower and projector make zeros and compute next to nothing; a method encodes the pictures.

    Returns:
        The output of `encode`, and the observation.
    """
    seen, before = Observation(core), _ENCODING.get()
    with ExitStack() as hooks:
        _ENCODING.set(seen)
        hooks.callback(_ENCODING.set, before)
        # The hooks live only while the images are encoded, because a method may call the projector itself. The modules
        # are looked up here, because adapters may replace them while the patch is on.
        noted: list[tuple[nn.Module, Callable]] = [
            (tower(core), seen.note_pixels),
            (projector(core), seen.note_features),
        ]
        for i in tower_layers:
            layer = encoder_layers(core)[i]
            if has_plain_heads(layer):
                noted.append((layer, partial(seen.note_layer, i)))
                for part, makers in zip("qk", head_makers(layer), strict=True):
                    note = seen.unless_elsewhere(partial(seen.note_projection, i, part))
                    hooks.enter_context(makers[-1].register_forward_hook(note, with_kwargs=True))
            elif (attention := attention_of(encoder_layers(core)[attending_layer(core, i)])) is not None:
                noted.append((attention, partial(seen.note_heads, i)))
        for module, note in noted:
            hooks.enter_context(module.register_forward_pre_hook(seen.unless_elsewhere(note), with_kwargs=True))
        for module in (*encoder_layers(core), projector(core)) if idle else ():
            shapes: list[torch.Size] = []
            hooks.enter_context(module.register_forward_pre_hook(partial(seen.give_one, shapes), with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(partial(seen.return_zeros, shapes), prepend=True))
        return encode(), seen


def is_observed(core: Any) -> bool:
    """Tell whether images of this model are being encoded in this thread or task."""
    seen = _ENCODING.get()
    return seen is not None and seen.core is core


class Observation:
    """Tensors that passed through a model while it encoded images.

    core           : the model without its head
    all_pixels     : of all crops or frames, one entry for each run of the tower
    all_features   : the same, as they enter the projector
    layers         : tower layer -> the module, and its inputs
    made           : tower layer -> queries and keys, where they depend on positions
    projected      : tower layer, "q" or "k" -> what each run made, (c, p, v), where it depends on the input alone
    crops, sizes   : per image, the number of crops, and height and width; of anyres models only
    repack         : per image, sends other features through its packing; of anyres models only
    """

    def __init__(self, core: Any) -> None:
        self.core = core
        self.all_pixels: list[Tensor] = []
        self.all_features: list[Tensor] = []
        self.layers: dict[int, tuple[nn.Module, list[Tensor]]] = {}
        self.made: dict[int, tuple[Tensor, Tensor]] = {}
        self.projected: dict[tuple[int, str], list[Tensor]] = {}
        self.crops: list[int] = []
        self.sizes: list[tuple[int, int]] = []
        self.repack: list[Callable[[Tensor], Tensor]] = []

    @property
    def pixel_values(self) -> Tensor:
        """Pixels of all crops or frames."""
        return _joined(self.all_pixels)

    @property
    def tower_features(self) -> Tensor:
        """Tower features of all crops or frames."""
        return _joined(self.all_features)

    def unless_elsewhere(self, note: Callable[..., None]) -> Callable[..., None]:
        """Make a hook that notes nothing while the module runs for another encoding, in another thread."""

        def hook(*passed: Any) -> None:
            if _ENCODING.get() is self:
                note(*passed)

        return hook

    def give_one(self, shapes: list, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Give a module the first patch of the first crop alone, and note how many (c, p) it was to take."""
        if _ENCODING.get() is not self:
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        shapes.append(x.shape[:2])
        one = x[:1, :1]
        return ((one, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): one})

    def return_zeros(self, shapes: list, module: nn.Module, args: tuple, made: Tensor) -> Tensor | None:
        """Return zeros for all patches (c, p, v) that a module was to take."""
        if _ENCODING.get() is not self:
            return None
        return made.new_zeros(*shapes.pop(), made.shape[-1])

    def note_pixels(self, tower: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what enters the vision tower."""
        self.all_pixels.append(args[0] if args else next(iter(kwargs.values())))

    def note_features(self, projector: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what enters the projector."""
        if len(self.all_features) == len(self.all_pixels):
            return  # Ovis2 projects its indicator tokens too, afterwards
        self.all_features.append(args[0] if args else next(iter(kwargs.values())))

    def note_layer(self, i: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note what enters layer `i` of the tower."""
        hidden = args[0] if args else kwargs["hidden_states"]
        self.layers.setdefault(i, (layer, []))[1].append(hidden)

    def note_projection(self, i: int, part: str, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        """Note what layer `i` of the tower makes, so that no method has to make it again."""
        self.projected.setdefault((i, part), []).append(output)

    def note_heads(self, i: int, attention: nn.Module, args: tuple, kwargs: dict) -> None:
        """Note queries and keys of layer `i` of the tower."""
        q, k = tower_heads(attention, args, kwargs)
        if i in self.made:
            q, k = torch.cat([self.made[i][0], q], 1), torch.cat([self.made[i][1], k], 1)
        self.made[i] = q, k

    def note_packing(self, pack: Callable, image_features: Any, image_sizes: Any, kwargs: dict) -> None:
        """Note how the model packs crops into images."""
        sizes = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        self.repack += [partial(_repack, pack, image_sizes, kwargs, n) for n in range(len(sizes))]
        self.crops += [len(features) for features in image_features]
        self.sizes += [(int(height), int(width)) for height, width in sizes]

    def heads(self, i: int) -> tuple[Tensor, Tensor] | None:
        """Return queries and keys that layer `i` of the tower made of all crops; None if its projections did not run.

        (crops, heads, p, v / heads) each.
        """
        layer, runs = self.layers[i]
        made = [self.projected.get((i, part), []) for part in "qk"]
        if any(len(outputs) != len(runs) for outputs in made):
            return None
        q, k = (split_heads(layer, _joined(outputs)) for outputs in made)
        return q, k

    def parts(self, counts: list[int]) -> list[dict[str, Any]]:
        """Split what passed into images of so many crops or frames each, as arguments of `ImageTokens`."""
        pixels, features = self.pixel_values.split(counts), self.tower_features.split(counts)
        layers = {i: (layer, _joined(x).split(counts)) for i, (layer, x) in self.layers.items()}
        made = {i: [part.split(counts) for part in heads] for i in layers if (heads := self.heads(i)) is not None}
        return [
            {
                "tower": features[n],
                "pixels": pixels[n],
                "recorded_layers": {i: (layer, x[n]) for i, (layer, x) in layers.items()},
                "recorded_heads": {i: (q[n], k[n]) for i, (q, k) in made.items()},
            }
            for n in range(len(counts))
        ]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Join what passed in one run of the tower or in several; packed images follow each other in one row."""
    if len(parts) == 1:
        return parts[0]
    rows = all(part.shape[1:] == parts[0].shape[1:] for part in parts)
    return torch.cat(list(parts), dim=0 if rows else 1)


def _repack(pack: Callable, image_sizes: Any, kwargs: dict, n: int, features: Tensor) -> Tensor:
    """Send other features (c, p, 3) through the packing of image `n`, with -1 for the newline."""
    newline = features.new_full((3,), -1.0)
    packed, _ = pack([features], image_sizes[n : n + 1], **kwargs | {"image_newline": newline})
    return packed[0]


def observed_packing(pack: Callable[..., Any], features: Any, image_sizes: Any, *strategy: Any, **kwargs: Any) -> Any:
    """Pack as the model does, and show the running observation how."""
    if strategy:  # LLaVA-NeXT-Video passes it by position
        kwargs["vision_feature_select_strategy"] = strategy[0]
    if (seen := _ENCODING.get()) is not None:
        seen.note_packing(pack, features, image_sizes, kwargs)
    return pack(features, image_sizes, **kwargs)
