"""Budgets of each image's own: keep={"auto": 64, "average": 31.5} gives more tokens to complex images.

A complex image has features of large effective rank: "An Empirical Study of Attention and Diversity for Adaptive Visual
Token Pruning" (AgilePruner, ICLR 2026, arXiv 2603.01236), which thins such images harder. Here the rank sets the budget
of any method before the language model, as vlmslim's own reading of that observation.
"""

import copy
from dataclasses import replace
from typing import Any

from vlmslim.compressor import Compressed, Compressor, ImageTokens, resolve_keep
from vlmslim.engine.answers import check_compressed
from vlmslim.ops.effective_rank import adapted, effective_rank


def check_own_budget(name: str, method: Any) -> None:
    """Refuse a budget of each image's own for a method that cannot have one.

    Raises:
        ValueError: the method chooses between decoder layers, or takes only some counts.
    """
    if not isinstance(keep := getattr(method, "keep", None), dict):
        return
    if not method.acts_before_llm or method.drops_between_layers:
        raise ValueError(
            f"{name}: keep={keep} gives each image its own budget before the language model, and {name} chooses "
            "between decoder layers; give it a count or a share"
        )
    for count in range(1, 9):
        try:
            replace(method, keep=count)
        except ValueError as error:
            raise ValueError(
                f"{name}: keep={keep} gives each image its own count, and {name} does not take every count ({error}); "
                "give it a count or a share"
            ) from error


def rank_of(image: ImageTokens) -> float:
    """Return the effective rank of an image's features, the mean over its crops or frames; newlines do not count."""
    crop = image.grid[:, 0]
    ranks = [effective_rank(image.features[crop == i][None]) for i in crop[crop >= 0].unique()]
    return float(sum(ranks) / len(ranks))


def compress(method: Any, images: list[ImageTokens]) -> list[Compressed]:
    """Ask a method for the tokens that images send, each at its own budget if the method's budget says so."""
    if not isinstance(keep := getattr(method, "keep", None), dict):
        return check_compressed(method, images, method.compress_images(images))
    groups: dict[int, list[int]] = {}
    for i, image in enumerate(images):
        n = len(image.features)
        budget = adapted(resolve_keep(keep["auto"], n), n, rank_of(image), keep["average"])
        groups.setdefault(budget, []).append(i)
    results: dict[int, Compressed] = {}
    for budget, members in groups.items():
        own: Compressor = copy.copy(method)  # with all that `setup` found
        own.keep = budget  # type: ignore[attr-defined]
        group = [images[i] for i in members]
        results |= zip(members, check_compressed(own, group, own.compress_images(group)), strict=True)
    return [results[i] for i in range(len(images))]
