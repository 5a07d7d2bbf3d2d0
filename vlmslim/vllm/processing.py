"""Give a prompt in vLLM's API server as many placeholders as its images keep tokens."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vlmslim.compressor import Compressor
from vlmslim.engine.families import anyres_tiles
from vlmslim.vllm.plan import plan_of

if TYPE_CHECKING:
    Mixin = Any  # what a mixin calls belongs to the class of vLLM's that it is mixed into
else:
    Mixin = object


def check_positions(method: Compressor, model_config: Any) -> None:
    """Refuse a method that keeps the original positions where vLLM would not ask for them.

    Raises:
        ValueError: vLLM was started without the options that make it ask.
    """
    if method.positions == "original" and not (
        model_config.uses_mrope and model_config.multimodal_config.is_multimodal_pruning_enabled()
    ):
        raise ValueError(
            f"{method} keeps the original positions. vLLM asks a model for positions after encoding only if it is "
            "started with --video-pruning-rate (any value above 0, such as 0.01) and with the --hf-overrides that "
            "`vlmslim vllm` prints; or use positions='renumbered'"
        )


class SlimInfo(Mixin):
    """Mixed into a `ProcessingInfo`: an image has as many tokens as are kept of it."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        self.plan = plan_of(ctx.model_config.hf_config)
        check_positions(self.plan.method, ctx.model_config)
        self.compressed = True

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return that prompts may have any number of images, and no videos."""
        return {"image": None}

    def uncompressed(self, *, image_width: int, image_height: int) -> int:
        """Return the visual tokens of a picture without compression."""
        return super().get_num_image_tokens(image_width=image_width, image_height=image_height)

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        """Return how many tokens of a picture are kept.

        Raises:
            ValueError: the budget is larger than the picture, which fails the request and not the engine.
        """
        n = self.uncompressed(image_width=image_width, image_height=image_height)
        if not self.compressed:
            return n
        size, config = (image_height, image_width), self.get_hf_config()
        tiles = anyres_tiles(config, size) if getattr(config, "image_grid_pinpoints", None) else (0, 0)
        return self.plan.count(n, tiles, size) if tiles[1] else self.plan.count(n)

    def get_image_size_with_most_features(self) -> Any:
        """Return the picture that costs the tower most; under a fixed budget the kept tokens of all are as many."""
        self.compressed = False
        try:
            return super().get_image_size_with_most_features()
        finally:
            self.compressed = True


class SlimProcessor(Mixin):
    """Mixed into a multimodal processor: what identifies an item tells the method, its options and its weights.

    One engine has one method. But KV and encoder caches may be shared between engines, and there a picture of 64 tokens
    is not the picture. Done to finished hashes, so that ids that a client gives are covered too.

    The number of visual tokens before compression is in it too, because a worker that finds a picture in a cache is
    shown nothing else of it, and needs this number for `positions="original"`.
    """

    def _get_mm_hashes(self, inputs: Any) -> dict[str, list[str]]:
        info: Any = self.info
        hashes = super()._get_mm_hashes(inputs)
        pictures = inputs.mm_data_items.get("image", [])
        return {
            modality: [f"{item}-{info.plan.digest}-{self._tokens(pictures, i)}" for i, item in enumerate(items)]
            for modality, items in hashes.items()
        }

    def _tokens(self, pictures: Any, i: int) -> int:
        """Return the visual tokens of a picture without compression."""
        if not hasattr(pictures, "get_image_size"):  # embeddings of the client's
            return pictures.get_feature_size(i)
        size, info = pictures.get_image_size(i), self.info
        return info.uncompressed(image_width=size.width, image_height=size.height)
