"""Encoding of images by a patched model: its own output, and with it the images as methods are shown them."""

import copy
import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from vlmslim.compressor import Compressor, ImageTokens
from vlmslim.engine.answers import check_encoded
from vlmslim.engine.encoded import Record, put_record, record_of
from vlmslim.engine.families import FAMILIES
from vlmslim.engine.image_records import bare_images, images_of
from vlmslim.engine.observation import Observation, is_observed, observe, observed_packing
from vlmslim.engine.shadow import Shadow
from vlmslim.engine.shared_encoding import SharedEncoding


class RecordingEncoder:
    """Stands in for `get_image_features` or `get_video_features` of one model instance.

    The model's own output comes back with the `ImageTokens` of each image on it. `generate` may encode the images long
    before it calls `forward`, so the record has to travel with the features.

    Args:
        core: the model without its head.
        kind: "image" or "video".
        tower_layers: the layers of the vision tower whose inputs are recorded.
        counts_only: the images are counted and no method sees them, so that any tower is good enough.
        on_encoded: called with the kind and the output after each encoding.
        shared: with the patches that take turns; `tower_layers` and `counts_only` are then those of all of them.
        method: encodes pictures itself; None if the method before the language model does not.
    """

    def __init__(
        self,
        core: Any,
        kind: str,
        tower_layers: tuple[int, ...],
        counts_only: bool,
        on_encoded: Callable[[str, ModelOutput], None],
        shared: SharedEncoding | None = None,
        method: Compressor | None = None,
    ):
        if shared is not None:
            tower_layers, counts_only = shared.tower_layers, shared.counts_only
        self.shared, self.method = shared, method
        self.core, self.kind, self.tower_layers, self.on_encoded = core, kind, tower_layers, on_encoded
        self.family, self.counts_only = FAMILIES[core.config.model_type], counts_only
        self.name = f"get_{kind}_features"
        self.shadows = [Shadow(core, self.name, self._encode)]
        if kind == "image" and hasattr(core, "pack_image_features"):
            self.shadows.append(Shadow(core, "pack_image_features", observed_packing))
        self.latest = _Latest()

    def attach(self) -> None:
        """Stand in for the functions that the instance has now."""
        for shadow in self.shadows:
            shadow.stay_on_top()

    def detach(self) -> None:
        """Put back what was there before."""
        for shadow in self.shadows:
            shadow.lift()

    def _encode(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Encode as the model does, or as a function of the user's does, and record."""
        if is_observed(self.core):  # Qwen3-VL encodes videos through its image encoder
            return encode(*args, **kwargs)
        given = self._given(args, kwargs)
        output = None if self.shared is None else self.shared.find(self.kind, given)
        if output is None and self.shared is None and self.method is not None:
            output = self._encoded_by_method(partial(encode, *args, **kwargs), given)
        if output is None:
            output, seen = observe(self.core, self.tower_layers, partial(encode, *args, **kwargs))
            if isinstance(output, tuple):  # a caller of return_dict=False wants the bare features
                return output
            images = self._recorded(output, seen, args, kwargs)
            put_record(output, Record(images, len(output.pooler_output), self))
            if self.shared is not None:
                self.shared.hold(self.kind, given, output)
        if self.method is not None:
            self._let_encode(output)
        self.latest.output = weakref.ref(output)
        self.on_encoded(self.kind, output)
        return output

    def _encoded_by_method(self, encode: Callable[[], Any], given: dict[str, Any]) -> Any:
        """Return an output whose images the method encoded all, and the model none; None if it leaves one to the model.

        Each of its features is that of the token which covers this place, and zero where none does.
        """
        output, seen = observe(self.core, (), encode, idle=True)
        if isinstance(output, tuple) or not self._all_passed(output, seen):
            return None
        images = images_of(self.core, self.kind, output, seen, given, self.counts_only)
        put_record(output, Record(images, len(output.pooler_output), self))
        images = self._let_encode(output)
        if any(image.encoded is None for image in images):
            return None
        covered, kept = [_covered(image) for image in images], output.pooler_output
        output.pooler_output = torch.stack(covered) if isinstance(kept, Tensor) else type(kept)(covered)
        for image, features in zip(images, covered, strict=True):
            image.features = features
        return output

    def _let_encode(self, output: Any) -> list[ImageTokens]:
        """Let the method encode the images of an output, where it has not, and return them.

        Other patches may share the images, so copies of them carry what the method made.
        """
        record = record_of(output)
        assert self.method is not None and record is not None
        if all(image.encoded is not None for image in record.images):
            return record.images
        images = [copy.copy(image) for image in record.images]
        for image in images:
            image.encoded = self.method.encode(image)
        check_encoded(self.method, images, [image.encoded for image in images])
        put_record(output, replace(record, images=images))
        return images

    def _given(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """Return the arguments of an encoding by name."""
        given = inspect.signature(self._own).bind(*args, **kwargs).arguments
        return given | given.pop("kwargs", {})

    @property
    def _own(self) -> Callable[..., Any]:
        """The model's own function."""
        return partial(getattr(type(self.core), self.name), self.core)

    def _recorded(self, output: Any, seen: Observation, args: tuple, kwargs: dict) -> list[ImageTokens]:
        """Return the images of an output.

        A function of the user's may return features that it kept. What was recorded of them belongs to the output; if
        nothing was, the model encodes the pixels once more.

        Raises:
            ValueError: the features are not those of the pixels.
        """
        if not self._all_passed(output, seen):
            if self.counts_only:
                return bare_images(output)
            record = record_of(output)
            if record is not None and record.encoder is self:
                return record.images
            with torch.no_grad():
                ours, seen = observe(self.core, self.tower_layers, partial(self._own, *args, **kwargs))
            if not self._all_passed(output, seen) or not _alike(output.pooler_output, ours.pooler_output):
                raise ValueError(
                    f"{self.name} was replaced on this model by a function that returns other features than the model "
                    "makes of the same pixels, so no method can tell which patches they belong to; let the function "
                    "call the one that it replaces, or patch with 'none'"
                )
        return images_of(self.core, self.kind, output, seen, self._given(args, kwargs), self.counts_only)

    def _all_passed(self, output: Any, seen: Observation) -> bool:
        """Tell whether all images of an output passed while they were encoded, and no others."""
        count, units = len(output.pooler_output), self.family.units
        if not seen.all_pixels or len(seen.all_pixels) != len(seen.all_features):
            return False
        if units in ("packed", "samples"):
            return True
        if self.kind == "video":
            return len(seen.pixel_values) % count == 0
        return count == (len(seen.crops) if units == "anyres" else len(seen.tower_features))

    def recognise(self, output: Any) -> None:
        """Give a copy of the latest output its records back, because accelerate rebuilds outputs that it moves."""
        latest = self.latest.output()
        if record_of(output) is not None or latest is None:
            return
        ours, theirs = latest.pooler_output, output.pooler_output
        if [x.shape for x in ours] == [x.shape for x in theirs] and torch.equal(ours[0], theirs[0].to(ours[0])):
            put_record(output, record_of(latest))


def _covered(image: ImageTokens) -> Tensor:
    """Return the features (n, d) of an image that a method encoded: at each place the token that covers it, or zeros.

    Newlines stay the model's own.
    """
    assert image.encoded is not None and image.encoded.features is not None
    own, device = image.encoded.features.to(image.features), image.features.device
    into = torch.full((len(image.features),), -1) if image.encoded.into is None else image.encoded.into()
    placed = torch.from_numpy(image.grid_on_host[:, 0] >= 0).to(device, non_blocking=True)
    tokens = torch.cat([own, own.new_zeros(1, own.shape[1])])[into.to(device, non_blocking=True)]  # -1 is the zero
    return torch.where(placed[:, None], tokens, image.features)


class _Latest(threading.local):
    """The latest output of an encoder in each thread."""

    output: Callable[[], Any] = staticmethod(lambda: None)

    def __reduce__(self) -> tuple:
        return _Latest, ()  # a copy of the model has encoded nothing


def _alike(a: Any, b: Any) -> bool:
    """Tell whether features (n, d) of several images are the same, up to rounding."""
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return False
    pairs = [(x.float(), y.to(x).float()) for x, y in zip(a, b, strict=True)]
    return all(bool((x - y).abs().max() <= 0.02 * y.abs().max()) for x, y in pairs)
