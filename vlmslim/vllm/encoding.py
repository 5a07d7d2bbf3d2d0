"""Encode images in vLLM's workers: vLLM's own tower and projector encode them, and a method compresses them.

The classes are mixed into vLLM's models. They rely on some of vLLM's internals (`_process_image_input`, the layers of
its towers), which is why the extra `vlmslim[vllm]` names a range of versions.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
)
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import MMEncoderAttention

from vlmslim.compressor import ImageTokens
from vlmslim.engine.answers import check_compressed
from vlmslim.engine.families import anyres_tiles
from vlmslim.engine.grids import crop_grid, packed_grid
from vlmslim.saving import backbone
from vlmslim.saving.folder import read
from vlmslim.vllm.plan import plan_of, skeleton_of
from vlmslim.vllm.processing import Mixin, check_positions
from vlmslim.vllm.seen import Seen
from vlmslim.vllm.slots import with_slots, without_slots

logger = init_logger("vllm.vlmslim")  # below "vllm", whose handler and level it shares

SECONDS_BETWEEN_RECEIPTS = 10

#: Weights of a checkpoint by which a trained part recognises it: how their names end, and their names in transformers.
_PROJECTOR = "multi_modal_projector.linear_1."
SIGNED = {"embed_tokens.weight": "model.language_model.embed_tokens.weight"}
SIGNED |= {name: f"model.{name}" for name in (f"{_PROJECTOR}weight", f"{_PROJECTOR}bias")}


class Receipt:
    """Counts what one worker kept, and writes a line into the log now and then."""

    def __init__(self, method: str) -> None:
        self.method, self.images, self.tokens, self.kept = method, 0, 0, 0
        self.told = 0.0

    def add(self, tokens: list[int], kept: list[int]) -> None:
        """Count images of `tokens` visual tokens, of which `kept` stayed."""
        self.images, self.tokens, self.kept = (
            self.images + len(tokens),
            self.tokens + sum(tokens),
            self.kept + sum(kept),
        )
        if time.monotonic() - self.told > SECONDS_BETWEEN_RECEIPTS:
            self.told = time.monotonic()
            logger.info(
                "vlmslim: %s: %d images so far, %d visual tokens in, %d out (%.1f %%)",
                *(self.method, self.images, self.tokens, self.kept, 100 * self.kept / self.tokens),
            )


class SlimModel(Mixin):
    """Mixed into a model with one crop for each image: of every image, what is kept goes to the language model."""

    supports_tower_connector_lora = False  # vLLM would take kept tokens for the tower's
    supports_mrope = supports_multimodal_pruning = True  # used for `positions="original"` alone
    supported_video_pruning_methods = ("evs",)

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        config = vllm_config.model_config.hf_config
        if vllm_config.lora_config is not None and vllm_config.lora_config.enable_tower_connector_lora:
            raise ValueError(
                "vlmslim: LoRA on the vision tower or the projector goes by placeholders, and there are fewer than the "
                "tower has tokens; turn enable_tower_connector_lora off"
            )
        if (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
            raise ValueError(
                f"vlmslim: pipeline_parallel_size={stages}, and vLLM tells only its first stage which positions "
                "visual tokens have; use tensor_parallel_size instead"
            )
        self.plan = plan_of(config)  # before any weight is read
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.unplaced: Any = None  # which tokens of the coming forward are visual, and their slots
        self.keeps_positions = self.plan.method.positions == "original"
        check_positions(self.plan.method, vllm_config.model_config)
        self.slim_receipt = Receipt(str(self.plan.method))
        self.tower_depth = config.vision_config.num_hidden_layers
        scheduler = vllm_config.scheduler_config
        self.encoder_budget = getattr(scheduler, "max_num_encoder_input_tokens", scheduler.max_num_batched_tokens)
        wanted = [layer % self.tower_depth for layer in self.plan.method.tower_layers]
        if max(wanted, default=-1) >= len(self.tower_layers):
            self._grow_tower(max(wanted) + 1, vllm_config, prefix)
        if (part := self.plan.method.trained()) is not None:
            part.to(vllm_config.device_config.device)

    @property
    def tower_layers(self) -> nn.ModuleList:
        """The layers of the vision tower; vLLM builds them up to the one whose features the projector reads."""
        return self.vision_tower.vision_model.encoder.layers

    def _grow_tower(self, depth: int, vllm_config: Any, prefix: str) -> None:
        """Build the tower up to `depth` layers, for a method that reads a later layer than the projector."""
        layers, config = self.tower_layers, self.config.vision_config
        self.select_layers = self.select_layers_of(self.config)
        for i in range(len(layers), depth):
            name = f"{prefix}vision_tower.vision_model.encoder.layers.{i}"
            quantised = vllm_config.quant_config
            layers.append(type(layers[0])(config, quant_config=quantised, prefix=name, attn_cls=MMEncoderAttention))

    @staticmethod
    def select_layers_of(config: Any) -> list[int]:
        """Return the layers whose features the projector reads."""
        chosen = config.vision_feature_layer
        return [chosen] if isinstance(chosen, int) else list(chosen)

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Tensor) -> Tensor:
        if getattr(self, "select_layers", None) is None:
            return super()._image_pixels_to_features(vision_tower, pixel_values)
        strategy = self.config.vision_feature_select_strategy
        return vision_tower(pixel_values, select_layers=self.select_layers, feature_select_strategy=strategy)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> Any:
        """Load a checkpoint, also one that a newer transformers wrote, whose names of the tower vLLM does not know.

        Raises:
            ValueError: the method has a part that was trained for another checkpoint.
        """
        method, found = self.plan.method, {}
        saved = None if method.trained() is None else read(str(getattr(method, "weights", "")))

        def renamed() -> Iterator[tuple[str, Tensor]]:
            for name, weight in weights:
                head, tower, tail = name.partition("vision_tower.")
                if tower and not tail.startswith("vision_model."):
                    name = f"{head}vision_tower.vision_model.{tail}"
                for end, known in SIGNED.items() if saved is not None else ():
                    if name.endswith(end):  # whole, as every rank reads it before it takes its share
                        found[known] = weight.clone()
                yield name, weight

        loaded = super().load_weights(renamed())
        if saved is not None:
            skeleton = skeleton_of(self.config)
            skeleton.load_state_dict(found, strict=False, assign=True)
            backbone.check(str(method), saved.base, skeleton)
        return loaded

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Encode images, not more at a time than the tower would see without compression.

        The scheduler limits a batch by its kept tokens, so that far more images come at once than it means to encode.
        """
        pixels = kwargs.get("pixel_values")
        if pixels is None:
            return super().embed_multimodal(**kwargs)
        found: list[Tensor] = []
        for first, end in self._batches(pixels):
            part = {
                name: value[first:end] if len(value) == len(pixels) else value
                for name, value in kwargs.items()
                if isinstance(value, Tensor | list | tuple)
            }
            found += super().embed_multimodal(**kwargs | part)
        return found

    def _batches(self, pixels: Any) -> list[tuple[int, int]]:
        """Cut a batch of images into ranges whose tower tokens fit the encoder's budget; one image always does."""
        vision = self.config.vision_config
        each = (vision.image_size // vision.patch_size) ** 2
        ranges, first, tokens = [], 0, 0
        for i, image in enumerate(pixels):
            size = each * (len(image) if image.ndim == 4 else 1)
            if i > first and tokens + size > self.encoder_budget:
                ranges.append((first, i))
                first, tokens = i, 0
            tokens += size
        return [*ranges, (first, len(pixels))]

    def _process_image_input(self, image_input: Any) -> Any:
        if image_input["type"] == "image_embeds":  # made elsewhere, and counted as they are
            made = super()._process_image_input(image_input)
            return [with_slots(own, None) for own in made] if self.keeps_positions else made
        with self._watched() as seen:
            features = super()._process_image_input(image_input)
        images = self._images(image_input, features, seen)
        with torch.no_grad():
            results = check_compressed(self.plan.method, images, self.plan.method.compress_images(images))
            if any(result.size is not None for result in results):
                raise ValueError(
                    f"{self.plan.method} returned tokens that count for several in attention, which vLLM's kernels "
                    "cannot do; return Compressed without size"
                )
            kept = [result.vectors(image) for image, result in zip(images, results, strict=True)]
            if self.keeps_positions:
                kept = [with_slots(own, result.index) for own, result in zip(kept, results, strict=True)]
        for image, own in zip(images, kept, strict=True):
            promised = self.plan.count(len(image.features), image.tiles, image.size)
            if len(own) != promised:
                raise RuntimeError(
                    f"{self.plan.method} kept {len(own)} of {len(image.features)} visual tokens and had promised "
                    f"{promised}; its `count` and its `compress` disagree"
                )
        self.slim_receipt.add([len(image.features) for image in images], [len(own) for own in kept])
        if get_tensor_model_parallel_world_size() > 1:  # ranks that round differently must not choose differently
            kept = [get_tp_group().broadcast(own.contiguous(), src=0) for own in kept]
        return [own.to(image.features.dtype) for own, image in zip(kept, images, strict=True)]

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        """Return the positions of a prompt under `positions="original"`, as far as they are known before encoding.

        vLLM keeps three numbers for each token, which the method that it calls here is meant to fill with time, height
        and width. The first row has the positions. The second has the position of the first token of the token's image,
        from which `recompute_mrope_positions` counts, and the third what decoding adds to a token's index.

        Args:
            input_tokens: N ids, with the kept placeholders of each image.
            mm_features: the images, in the order of the prompt.

        Returns:
            (3, N), and how far the positions are ahead of the tokens at the end.
        """
        shift = torch.zeros(len(input_tokens) + 1, dtype=torch.long)
        starts = torch.arange(len(input_tokens))
        ahead = 0
        for feature in sorted(mm_features, key=lambda feature: feature.mm_position.offset):
            first, kept = feature.mm_position.offset, feature.mm_position.length
            starts[first : first + kept] = first + ahead
            ahead += int(feature.identifier.rpartition("-")[2]) - kept
            shift[first + kept :] = ahead
        position = torch.arange(len(input_tokens)) + shift[:-1]
        return torch.stack([position, starts, torch.full_like(position, ahead)]), ahead

    def recompute_mrope_positions(
        self, input_ids: Any, multimodal_embeddings: Any, mrope_positions: Tensor, num_computed_tokens: int
    ) -> tuple[list[Tensor], Tensor, int]:
        """Give visual tokens the positions of the slots that they come from, which their embeddings carry.

        Args:
            input_ids: (N,) of the prompt.
            multimodal_embeddings: of the images in this part of the prompt: (k, d + 2) each, see `with_slots`.
            mrope_positions: (3, N) as `get_mrope_input_positions` made them.
            num_computed_tokens: tokens before this part.

        Returns:
            The embeddings (k, d), the positions, and how far they are ahead at the end.
        """
        ids = torch.as_tensor(input_ids).cpu()
        places = (ids == self.config.image_token_index).nonzero()[:, 0]
        places = places[places >= num_computed_tokens].to(mrope_positions.device)
        bare = []
        for own in multimodal_embeddings:
            own, slots = without_slots(own)
            at, places = places[: len(own)], places[len(own) :]
            mrope_positions[0, at] = mrope_positions[1, at] + slots.to(mrope_positions)
            bare.append(own)
        return bare, mrope_positions, int(mrope_positions[2, -1])

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        """Embed a batch of tokens. vLLM's CPU runner does not call `recompute_mrope_positions`, so this stands in."""
        if self.keeps_positions and multimodal_embeddings is not None and len(multimodal_embeddings):
            width = self.config.get_text_config().hidden_size
            if multimodal_embeddings[0].shape[-1] > width:
                multimodal_embeddings, slots = zip(*map(without_slots, multimodal_embeddings), strict=True)
                self.unplaced = is_multimodal, torch.cat(slots)
        return super().embed_input_ids(input_ids, multimodal_embeddings, is_multimodal=is_multimodal)

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the language model; of three numbers for each token it takes the first."""
        if positions.ndim == 2:
            positions, starts = positions[0], positions[1]
            if self.unplaced is not None:
                (places,), slots = self.unplaced[0].nonzero(as_tuple=True), self.unplaced[1]
                places = places.to(positions.device)
                positions = positions.index_copy(0, places, starts[places] + slots.to(starts))
                self.unplaced = None
        return super().forward(input_ids, positions, *args, **kwargs)

    @contextmanager
    def _watched(self) -> Iterator[Seen]:
        """Note what passes through tower and projector."""
        seen = Seen(self.config.vision_config.num_attention_heads)
        hooks = [
            self.vision_tower.register_forward_pre_hook(partial(seen.note, seen.pixels), with_kwargs=True),
            self.multi_modal_projector.register_forward_pre_hook(partial(seen.note, seen.tower), with_kwargs=True),
        ]
        for name in self.plan.method.tower_layers:
            layer = self.tower_layers[name % self.tower_depth]
            hooks.append(layer.register_forward_pre_hook(partial(seen.note, seen.layers[name]), with_kwargs=True))
            hooks.append(layer.self_attn.qkv_proj.register_forward_hook(partial(seen.heads_of, name)))
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def _images(self, image_input: Any, features: Any, seen: Seen) -> list[ImageTokens]:
        """Make what a method is shown of each image."""
        vision, crops = self.config.vision_config, self._crops(image_input)
        side = vision.image_size // vision.patch_size
        pixels, tower = torch.cat(seen.pixels).split(crops), torch.cat(seen.tower).split(crops)
        heads = {layer: (q.split(crops), k.split(crops)) for layer, (q, k) in seen.heads.items()}
        layers = {layer: torch.cat(x).split(crops) for layer, x in seen.layers.items()}
        images = []
        for n, own in enumerate(features):
            tiles, size = self._tiles(image_input, n, crops[n])
            images.append(
                ImageTokens(
                    features=own,
                    tower=tower[n],
                    pixels=pixels[n],
                    patches=(side, side),
                    tiles=tiles,
                    size=size,
                    projector=self.multi_modal_projector,
                    make_grid=partial(self._grid, side, tower[n].shape[1], crops[n], tiles, size),
                    recorded_layers={i: (self.tower_layers[i % self.tower_depth], x[n]) for i, x in layers.items()},
                    recorded_heads={layer: (q[n], k[n]) for layer, (q, k) in heads.items()},
                )
            )
        return images

    def _crops(self, image_input: Any) -> list[int]:
        return [1] * len(image_input["pixel_values"])

    def _tiles(self, image_input: Any, n: int, crops: int) -> tuple[tuple[int, int], tuple[int, int]]:
        return (0, 0), (0, 0)

    def _grid(self, side: int, patches: int, crops: int, tiles: tuple[int, int], size: tuple[int, int]) -> Tensor:
        return crop_grid(side, patches)


class AnyresModel(SlimModel):
    """The same for LLaVA-NeXT and LLaVA-OneVision, which cut pictures into tiles."""

    def _crops(self, image_input: Any) -> list[int]:
        return [len(crops) for crops in image_input["pixel_values"]]

    def _tiles(self, image_input: Any, n: int, crops: int) -> tuple[tuple[int, int], tuple[int, int]]:
        if crops == 1:
            return (0, 0), (0, 0)
        height, width = map(int, image_input["image_sizes"][n])
        return anyres_tiles(self.config, (height, width)), (height, width)

    def _grid(self, side: int, patches: int, crops: int, tiles: tuple[int, int], size: tuple[int, int]) -> Tensor:
        return packed_grid(partial(self._repack, size), crops, tiles[1], side, patches)

    def _repack(self, size: tuple[int, int], features: Tensor) -> Tensor:
        """Send other features (c, p, 3) through the model's own packing, with -1 for the newline."""
        newline = features.new_full((3,), -1.0)
        stand_in = SimpleNamespace(config=self.config, image_newline=newline)
        pack: Callable[..., Tensor] = type(self)._merge_image_patch_embeddings
        return pack(stand_in, torch.tensor(size), features, strategy="spatial_unpad", **self._newline(newline))

    def _newline(self, newline: Tensor) -> dict[str, Tensor]:
        return {}
