"""Options that many methods share: how many tokens to keep, before which decoder layer, at which positions."""

from typing import Annotated, Any, TypeAlias

from vlmslim.io.messages import shown
from vlmslim.options.check import fits

#: A count, a share of an image's visual tokens, or {"auto": count or share, "average": rank}: more to complex images.
Keep: TypeAlias = Annotated[int | float | dict[str, int | float], "a count (64) or a share (0.11) of the visual tokens"]

#: A part of a whole, such as of the budget.
Part: TypeAlias = Annotated[float, "a part from 0 to 1", lambda part: 0 <= part <= 1]

#: A number of things of which there is one at least.
Positive: TypeAlias = Annotated[int, "an integer from 1 on", lambda number: number >= 1]


def check_keep(keep: Keep, name: str = "keep") -> None:
    """Refuse a budget that means nothing.

    Raises:
        ValueError: `keep` is no count (int >= 1), no share (float in (0, 1]), and neither of these for each image.
    """
    if isinstance(keep, dict):
        _check_auto(keep, name)
        keep = keep["auto"]
    if not fits(keep, Keep):
        raise ValueError(f"{name}={shown(keep)}: give a count (64) or a share (0.11) of the visual tokens to keep")
    if isinstance(keep, int) and keep < 1:
        raise ValueError(f"{name}={keep}: at least one visual token per image must be kept")
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"{name}={keep}: a share lies in (0, 1]; for a count of tokens write an integer")


def _check_auto(keep: dict, name: str) -> None:
    """Refuse a budget for each image that does not say its mean and the effective rank of an average image."""
    if not set(keep) <= {"auto", "average"} or isinstance(keep.get("auto"), dict | None):
        raise ValueError(
            f"{name}={shown(keep)}: give each image its own budget by {name}={{'auto': 64, 'average': 31.5}}, the mean "
            "and the effective rank of an average image"
        )
    average = keep.get("average")
    if average is None:
        raise ValueError(
            f"{name}={shown(keep)} does not say the effective rank of an average image: vlmslim.cost.budget.solve("
            f"model, method, prompts, auto={keep['auto']}) finds it, as vlmslim run does for the budget {{auto: ...}}"
        )
    if not fits(average, float) or not average > 0:
        raise ValueError(f"{name}={shown(keep)}: the effective rank of an average image is a positive number")


def resolve_keep(keep: Keep, n: int) -> int:
    """Turn a budget into a number of tokens of an image that has `n`.

    A share is rounded half to even on the double product, as Python's `round` does, and never below one.

    Raises:
        ValueError: the budget is malformed, or larger than the image, or each image has its own.
    """
    check_keep(keep)
    if isinstance(keep, dict):
        raise ValueError(f"keep={keep} depends on the image, and here only its size is known; give a count or a share")
    if isinstance(keep, float):
        return max(1, round(keep * n))
    if keep > n:
        raise ValueError(
            f"keep={keep} is larger than the image, which has {n} visual tokens; use at most {n} or a share"
        )
    return keep


def check_layer(layer: int | float, name: str = "layer") -> None:
    """Refuse a decoder layer before which nothing can be dropped.

    Raises:
        ValueError: `layer` is neither a number (int >= 1) nor a share of the depth (float in (0, 1)).
    """
    if layer <= 0 or (isinstance(layer, float) and layer >= 1):
        raise ValueError(f"{name}={layer!r}: give a decoder layer from 1 on, or a share of the depth in (0, 1)")


def resolve_layer(layer: int | float, depth: int) -> int:
    """Turn a share of the depth into a decoder layer; a number stays as it is.

    A share is rounded down and stays between 1 and `depth` - 1, because before layer 0 nothing has attended yet and
    after the last layer there is nothing to save. 7/8 is layer 28 of 32, 24 of 28 and 3 of 4.
    """
    if not isinstance(layer, float):
        return layer
    return max(1, min(int(layer * depth + 1e-9), depth - 1))


def check_choices(options: object, **known: tuple[str, ...]) -> None:
    """Refuse options whose value is unknown: `check_choices(self, order=("raster", "released"))`.

    Raises:
        ValueError: names the option and its known values.
    """
    for name, values in known.items():
        value = getattr(options, name)
        if value not in values:
            raise ValueError(f"{name}={value!r}: use one of {', '.join(map(repr, values))}")


#: Rotary positions of what a method keeps before the language model, unless its options move tokens from their places.
POSITIONS = "original"


def settle_positions(options: Any) -> None:
    """Replace positions="auto" by the default, or by the release's where the options ask for the order of a release.

    Raises:
        ValueError: positions="original" with tokens that are moved away from their places.
    """
    named = {"mode": ("released",), "order": ("selection", "released")}
    moved = [f"{name}={getattr(options, name)!r}" for name, of in named.items() if getattr(options, name, None) in of]
    if options.positions == "auto":
        options.positions = "renumbered" if moved else POSITIONS
    if moved and options.positions == "original":
        raise ValueError(f"{moved[0]} moves tokens away from their places; use positions='renumbered' with it")
