"""Budgets of each image's own, keep={"auto": 64, "average": 31.5}, and the methods that may have them.

A complex image, whose features have a large effective rank, gets more tokens: "An Empirical Study of Attention and
Diversity for Adaptive Visual Token Pruning" (AgilePruner, ICLR 2026, arXiv 2603.01236), which thins such images harder.
Here the rank sets the budget of any method before the language model, as vlmslim's own reading of that observation.
"""

from dataclasses import replace
from typing import Any


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
