"""The contract of a method: `Compressor`, and its bases `Selector` and `ScoreAndKeep`.

The other parts of the contract can be imported from here too: `ImageTokens` and `LayerInput`, which a method is shown;
`Compressed` and `Retained`, which it returns; and the options that many methods share.
"""

from copy import copy
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from vlmslim.image_tokens import Compressed, ImageTokens
from vlmslim.io.messages import described
from vlmslim.layer_input import Attends, LayerInput, Retained
from vlmslim.ops.effective_rank import adapted
from vlmslim.ops.rectification import merge_rest
from vlmslim.options.check import check_options
from vlmslim.options.common import (
    POSITIONS,
    Keep,
    Part,
    Positive,
    check_choices,
    check_keep,
    check_layer,
    resolve_keep,
    resolve_layer,
    settle_positions,
)

__all__ = [
    "POSITIONS",
    "Attends",
    "Compressed",
    "Compressor",
    "ImageTokens",
    "Keep",
    "LayerInput",
    "Part",
    "Positive",
    "Retained",
    "ScoreAndKeep",
    "Selector",
    "check_choices",
    "check_keep",
    "check_layer",
    "resolve_keep",
    "resolve_layer",
    "settle_positions",
]


@dataclass
class Compressor:
    """A visual-token compression method: settings and weights, and nothing about the current image.

    Override `compress` to choose, merge or re-project the tokens of an image before the language model, `retain` to
    drop tokens between decoder layers, or both. Shared attributes:

    layers       : decoder layers before which `retain` is asked: numbers, or shares of the depth (`resolve_layer`)
    tower_layers : vision-tower layers whose queries and keys `ImageTokens.qk` can compute; negative from the end
    needs_cls    : the method reads the tower's CLS token
    needs_patches : the method needs visual tokens that are single patches of the tower, projected one by one
    may_keep_none : the method may send no token of an image
    substitutes  : what the method reads on this model in place of what its paper reads, by the names in
                   `vlmslim.methods._substitutes`; `setup` sets them
    reads_prompt : the method reads the question, so that it cannot compress an image for all prompts at once
    reads_back   : why the method brings values from the device to the host, which waits until the device has computed
                   them; empty if it does not. The engine waits for nothing between the vision tower and the end of the
                   prefill, except for methods that say so here
    positions    : "renumbered" closes the gaps in the rotary positions, "original" leaves them
    layer_positions : the same, for the gaps that `retain` leaves, from that layer on
    budget_options : options that `vlmslim.cost.budget` may solve, the preferred one first; the larger, the costlier
    """

    layers: tuple[int | float, ...] = field(default=(), init=False, repr=False, compare=False)
    reads_prompt: bool = field(default=False, init=False, repr=False, compare=False)
    tower_layers: tuple[int, ...] = field(default=(), init=False, repr=False, compare=False)
    substitutes: tuple[str, ...] = field(default=(), init=False, repr=False, compare=False)
    needs_cls: ClassVar[bool] = False
    needs_patches: ClassVar[bool] = False
    may_keep_none: ClassVar[bool] = False
    reads_back: str = field(default="", init=False, repr=False, compare=False)
    budget_options: ClassVar[tuple[str, ...]] = ("keep",)
    positions = "renumbered"
    layer_positions = "original"

    def __new__(cls, *given: Any, **named: Any) -> Self:
        """Check the options by their annotations, before the class reads them in `__post_init__`.

        Raises:
            ValueError: names the option, its value and what to give instead.
        """
        check_options(cls, given, named)
        return super().__new__(cls)

    @property
    def acts_before_llm(self) -> bool:
        """True if this class overrides `compress` or `compress_images`."""
        cls = type(self)
        return cls.compress is not Compressor.compress or cls.compress_images is not Compressor.compress_images

    @property
    def encodes(self) -> bool:
        """True if this class overrides `encode`."""
        return type(self).encode is not Compressor.encode

    @property
    def drops_between_layers(self) -> bool:
        """True if this class overrides `retain` or `soft_retain`."""
        cls = type(self)
        return cls.retain is not Compressor.retain or cls.soft_retain is not Compressor.soft_retain

    def setup(self, model: nn.Module) -> None:
        """Look at the model once, when it is patched: check it, load trained weights."""

    def trained(self) -> nn.Module | None:
        """Return what training optimises and saving writes, once `setup` has run; None for a training-free method."""
        return None

    def stages(self) -> list["Compressor"]:
        """Return the stages that this method consists of, in order; by default itself."""
        return [self]

    @classmethod
    def stage_of(cls, method: "Compressor") -> Self:
        """Make a stage of this class from the options of a method that have the same names."""
        return cls(**{f.name: getattr(method, f.name) for f in fields(cls) if f.init})

    def requested(self, n: int) -> int | None:
        """Return how many of an image's `n` tokens this method was asked to keep; None if it decides itself."""
        keep = getattr(self, "keep", None)
        return resolve_keep(keep, n) if isinstance(keep, int | float) else None

    def count(self, n: int, tiles: tuple[int, int] = (0, 0), size: tuple[int, int] = (0, 0)) -> int | None:
        """Return how many tokens an image will send to the language model, as known before it is encoded.

        Servers reserve places for an image by this number. By default `requested`; override where they differ.

        Args:
            n: the image's visual tokens.
            tiles: rows and columns of its tiles, as `ImageTokens.tiles`.
            size: height and width of the picture that was cut into tiles, as `ImageTokens.size`.

        Returns:
            None if what is seen in the image decides.
        """
        return self.requested(n) if self.acts_before_llm else n

    def visual_tokens(self, n: int, depth: int) -> list[int]:
        """Return how many of an image's `n` tokens each of `depth` decoder layers sees, as far as the settings say.

        The receipt says what happened. By default `requested`, from the first of `layers` on.
        """
        k = self.requested(n)
        first = min((resolve_layer(layer, depth) for layer in self.layers), default=0)
        return [n] * first + [n if k is None else k] * (depth - first)

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Compress the images of one forward. Override to batch across images; by default they go one by one."""
        return [self.compress(image) for image in images]

    def ask(self, images: list[ImageTokens]) -> object:
        """Return what `compress_images` returns, each image at its own budget if `keep` says so; for the engine."""
        if not isinstance(keep := getattr(self, "keep", None), dict):
            return self.compress_images(images)
        groups: dict[int, list[int]] = {}
        for i, image in enumerate(images):
            n = len(image.features)
            budget = adapted(resolve_keep(keep["auto"], n), n, image.effective_rank, keep["average"])
            groups.setdefault(budget, []).append(i)
        results: dict[int, Compressed] = {}
        for budget, members in groups.items():
            own = copy(self)  # with all that `setup` found
            own.keep = budget  # type: ignore[attr-defined]
            answer = own.compress_images([images[i] for i in members])
            if not isinstance(answer, list | tuple) or len(answer) != len(members):
                return answer  # the engine says what is wrong with it
            results |= zip(members, answer, strict=True)
        return [results[i] for i in range(len(images))]

    def compress(self, image: ImageTokens) -> Compressed:
        """Return the k <= n tokens that an image sends to the language model."""
        raise NotImplementedError(f"{type(self).__name__} does not compress before the language model")

    def encode(self, image: ImageTokens) -> Compressed | None:
        """Return the tokens of a picture that the method encodes itself, or None to let the model encode it.

        For methods that change the picture. The engine asks before the model encodes, so that no picture is encoded
        twice, except where patches share the model's encoding. Of `image`, only pixels, grid, tiles and sizes are known
        then. `compress` finds the answer as `image.encoded`, which is None for videos: for them nothing was asked.
        """
        return None

    def retain(self, tokens: LayerInput) -> Tensor | Retained:
        """Return (B, S) bool, True at the tokens that stay from `tokens.layer` on, or `Retained` with new states.

        Text always stays.
        """
        raise NotImplementedError(f"{type(self).__name__} sets `layers` but does not override `retain`")

    def known_counts(self, tokens: LayerInput) -> list[list[int]] | None:
        """Return how many visual tokens `retain` keeps of `tokens`, from settings and numbers of tokens.

        The engine then need not wait for the device to count them. None: it counts.

        Returns:
            For each row, the counts of its images, or their sum alone, if they share a budget.
        """
        return None

    def soft_retain(self, tokens: LayerInput) -> Tensor | None:
        """Return how strongly each token may be attended to from `tokens.layer` on: (B, S) in [0, 1]; None: `retain`.

        For methods in training: nothing is dropped, gradients pass, and the weights of successive layers multiply. A
        weight of zero is what `retain` would drop. Text always counts in full.
        """
        return None


@dataclass
class Selector(Compressor):
    """Base of the methods that keep some of an image's own tokens before the language model. Override `compress`.

    A method that batches over images overrides `select_images` in place of `compress_images`.

    keep      : visual tokens to keep per image, a count or a share
    positions : rotary positions: "original", or "renumbered", which closes the gaps. "auto" is "original", unless the
                order of a release moves tokens away from their places
    rectify   : select half of the budget; the other half are means, at the lower medians of their places. Of the
                patches that are not selected, as many are anchors as there are means, and each patch joins the anchor
                of largest cosine. A mean counts in attention for all its patches: the logarithm of their number is
                added to its logits ("Improving Visual Token Reduction via Rectifying Distortions", arXiv 2606.01711;
                at 64 tokens of LLaVA-1.5 the paper gains 2 to 4 points on four selectors). Needs positions="original",
                and eager or sdpa attention. The paper's second term, by the distance of query and key, is left out:
                the release adds it to the prefill alone, so that decoding differs from recomputing
    """

    keep: Keep
    positions: str = field(default="auto", kw_only=True)
    rectify: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        check_keep(self.keep)
        settle_positions(self)
        if self.rectify and self.positions != "original":
            raise ValueError(
                "rectify=True puts merged tokens at the places of what they stand for; use positions='original' with it"
            )

    def budget(self, image: ImageTokens) -> int:
        """Return how many tokens of an image to keep."""
        return resolve_keep(self.keep, len(image.features))

    def at_budget(self, k: int) -> Self:
        """Return the same method, set up as it is, that selects k tokens of every image and merges none."""
        other = copy(self)
        other.keep, other.rectify = k, False
        return other

    def select_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Select tokens of the images of one forward; by default they go one by one to `compress`."""
        return [self.compress(image) for image in images]

    def compress_images(self, images: list[ImageTokens]) -> list[Compressed]:
        """Select tokens; with `rectify` half of the budget, and merge the others."""
        if not self.rectify:
            return self.select_images(images)
        counts = [self.budget(image) for image in images]
        halves = [k if k == len(x.features) else max(1, k // 2) for k, x in zip(counts, images, strict=True)]
        found: dict[int, Compressed] = {}
        for half in set(halves):
            own = [i for i, k in enumerate(halves) if k == half]
            found |= zip(own, self.at_budget(half).select_images([images[i] for i in own]), strict=True)
        return [_rectified(image, found[i], k) for i, (image, k) in enumerate(zip(images, counts, strict=True))]


def _rectified(image: ImageTokens, chosen: Compressed, k: int) -> Compressed:
    """Fill the budget k of an image with means of what was not chosen; with newlines once all patches take part."""
    x, index = image.features, chosen.index
    if chosen.features is not None or index is None:
        raise ValueError("rectify=True merges what was not selected, and this method makes tokens itself")
    if len(index) >= k:
        return chosen
    features, slot, size, into = merge_rest(x, index, k, patch=image.grid[:, 0] >= 0)
    return Compressed(features.to(x), slot, lambda: into, size)


@dataclass
class ScoreAndKeep(Selector):
    """Base of the methods that score the tokens of an image and keep the best before the language model.

        @dataclass
        class Norm(ScoreAndKeep):
            def score(self, image):
                return image.features.norm(dim=-1)

    Newline tokens of anyres images and videos are scored like any other token. Options are those of `Selector`.
    """

    keep: Keep = 0.25

    def score(self, image: ImageTokens) -> Tensor:
        """Return one number for each token of an image, (n,). Higher is better."""
        raise NotImplementedError(f"{type(self).__name__} does not override `score`")

    def compress(self, image: ImageTokens) -> Compressed:
        """Keep the tokens of highest score, the lower index first on ties, in reading order."""
        n, score = len(image.features), self.score(image)
        if not isinstance(score, Tensor) or score.shape != (n,) or score.is_complex() or score.is_sparse:
            raise ValueError(
                f"{type(self).__name__}.score returned {described(score)}: return a tensor of shape ({n},), a number "
                "for each token"
            )
        image.score = score
        order = score.argsort(descending=True, stable=True)
        return image.pick(order[: self.budget(image)].sort().values)
