"""Checks of what methods return.

All checks stand here and none waits for the device: types and shapes are known on the host, and the values of indices
and masks are looked at later (`vlmslim.engine.later`).
"""

import numpy as np
import torch
from torch import Tensor

from vlmslim.compressor import Compressed, Compressor, ImageTokens, LayerInput, Retained
from vlmslim.io.messages import described

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8)


NOT_FINITE = "that are not finite: look for a division by zero, or an overflow in half precision"
NAN_SCORES = "scores that are NaN, which have no rank: give each token a number, such as -inf for the last place"
NO_SIZES = "sizes that are not positive: a size is the number of tokens that a token stands for"


def check_compressed(method: Compressor, images: list[ImageTokens], answer: object) -> list[Compressed]:
    """Check the types and shapes of what `compress` or `compress_images` returned.

    Raises:
        ValueError: names the method, what it returned and what to return instead.
    """
    overrides_images = type(method).compress_images is not Compressor.compress_images
    name = f"{type(method).__name__}.{'compress_images' if overrides_images else 'compress'}"
    if not isinstance(answer, list | tuple):
        raise ValueError(
            f"{name} returned {described(answer)}: return a list with one Compressed for each of the images"
        )
    if len(answer) != len(images):
        raise ValueError(
            f"{name} returned {len(answer)} results for {len(images)} images: return one Compressed for each image"
        )
    for i, (image, result) in enumerate(zip(images, answer, strict=True)):
        _check_one(f"{name} returned", f"image {i} of this batch", method, image, result)
    return list(answer)


def check_encoded(method: Compressor, images: list[ImageTokens], answers: list[object]) -> None:
    """Check the types and shapes of what `encode` returned for each image, unless it left it to the model.

    Raises:
        ValueError: names the method, what it returned and what to return instead.
    """
    name = f"{type(method).__name__}.encode returned"
    for i, (image, answer) in enumerate(zip(images, answers, strict=True)):
        if answer is None:
            continue
        if not isinstance(answer, Compressed) or answer.features is None:
            raise ValueError(
                f"{name} {described(answer)} without features: return Compressed(features, into=...), or None to let "
                "the model encode the picture"
            )
        _check_one(name, f"image {i} of this batch", method, image, answer)


def _check_one(name: str, which: str, method: Compressor, image: ImageTokens, result: object) -> None:
    n, width = image.features.shape
    if not isinstance(result, Compressed):
        raise ValueError(f"{name} {described(result)}: return image.pick(index), or Compressed(features)")
    features, index = result.features, result.index
    if features is None and index is None:
        raise ValueError(f"{name} Compressed(None, None): return image.pick(index), or Compressed(features)")
    if index is not None:
        _check_index(name, index)
    if features is not None:
        _check_features(name, width, features, index, result.size)
    k = len(result)
    if k == 0 and not method.may_keep_none:
        raise ValueError(f"{name} no token of {which}, which has {n}: keep at least one")
    if k > n:
        raise ValueError(f"{name} {k} tokens for {which}, which has {n}: return at most as many as there are")
    if index is None and k < n and method.positions == "original":
        raise ValueError(
            f"{name} {k} tokens for {which} without saying which slots they take: return Compressed(features, index), "
            "or set positions='renumbered'"
        )


def _check_index(name: str, index: object) -> None:
    if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
        raise ValueError(f"{name} a mask for an index, {described(index)}: return image.pick(mask.nonzero()[:, 0])")
    if not isinstance(index, Tensor) or index.dtype not in _INTEGERS or index.ndim != 1 or index.is_sparse:
        raise ValueError(
            f"{name} {described(index)} for an index: give the positions of the tokens that stay as a tensor (k,) "
            "of integers"
        )


def _check_features(name: str, width: int, features: object, index: Tensor | None, size: object) -> None:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        raise ValueError(
            f"{name} {described(features)} for features: give a tensor (k, {width}) of floating-point numbers"
        )
    if features.ndim != 2 or features.shape[1] != width:
        raise ValueError(
            f"{name} features of shape {tuple(features.shape)}: give (k, {width}), because the language model "
            f"reads tokens of {width} numbers"
        )
    if size is not None and (index is None or not isinstance(size, Tensor) or size.shape != index.shape):
        raise ValueError(
            f"{name} {described(size)} for sizes: give one number to each token, and say which slots they take: "
            "Compressed(features, index, size)"
        )
    if index is not None and len(index) != len(features):
        raise ValueError(f"{name} {len(features)} tokens with an index of {len(index)}: give one slot to each token")


def check_indices(method: Compressor, sizes: list[int], lengths: list[int], values: np.ndarray) -> None:
    """Check the values of the indices of results that passed `check_compressed`.

    Args:
        method: that returned them.
        sizes: tokens of each image.
        lengths: of each index.
        values: all indices, one after the other.

    Raises:
        ValueError: names the method, what it returned and what to return instead.
    """
    name = type(method).__name__
    for i, (n, index) in enumerate(zip(sizes, np.split(values, np.cumsum(lengths)[:-1]), strict=True)):
        outside = index[(index < 0) | (index >= n)]
        if len(outside):
            raise ValueError(
                f"{name} keeps token {outside[0]} of image {i} of this batch, which has {n}: positions count from 0 "
                f"within each image, so use 0 .. {n - 1}"
            )
        if len(index) == n > 2 and set(index.tolist()) <= {0, 1}:
            raise ValueError(
                f"{name} returned {n} positions, all 0 or 1, for image {i} of this batch, which looks like a mask: "
                "return image.pick(mask.nonzero()[:, 0])"
            )
        if (distinct := len(np.unique(index))) < len(index):
            raise ValueError(
                f"{name} returned {len(index)} tokens for {distinct} distinct positions of image {i} of this batch: "
                "keep each position once, such as index.unique()"
            )


def check_values(method: Compressor, unit: str, wrong: str, lengths: list[int], fine: np.ndarray) -> None:
    """Check the values that a method gave to images or rows.

    Args:
        method: that gave them.
        unit: "image" or "row".
        wrong: what the other values are and what to give instead, for the message.
        lengths: number of values of each unit.
        fine: True at the values that are as they should be, unit after unit.

    Raises:
        ValueError: some values are not fine.
    """
    for i, part in enumerate(np.split(fine, np.cumsum(lengths)[:-1])):
        if not part.all():
            raise ValueError(f"{type(method).__name__} gave {unit} {i} of this batch {wrong}")


def check_retained(method: Compressor, tokens: LayerInput, answer: object) -> tuple[Tensor, Tensor | None]:
    """Check what `retain` returned, and return what stays, (B, S) bool, and new states (B, S, d), if there are any.

    Raises:
        ValueError: names the method, what it returned and what to return instead.
    """
    name, shape, hidden = f"{type(method).__name__}.retain", tuple(tokens.mask.shape), None
    if isinstance(answer, Retained):
        hidden, answer = answer.hidden, answer.keep
        if not isinstance(hidden, Tensor) or hidden.shape != tokens.hidden.shape or not hidden.is_floating_point():
            raise ValueError(
                f"{name} returned {described(hidden)} for states: give a tensor like `tokens.hidden`, here "
                f"{tuple(tokens.hidden.shape)}, or return the mask alone"
            )
    instead = f"return a bool mask (B, S), here {shape}, True at the tokens that stay"
    if isinstance(answer, Tensor) and answer.dtype.is_floating_point:
        raise ValueError(
            f"{name} returned {described(answer)}, which look like scores: {instead}, such as tokens.top(score, keep)"
        )
    if not isinstance(answer, Tensor) or answer.dtype != torch.bool or tuple(answer.shape) != shape:
        raise ValueError(f"{name} returned {described(answer)}: {instead}")
    return answer, hidden


def writes(tokens: LayerInput) -> dict[str, int]:
    """Count how often tensors of the input were written to. Inference mode does not count, so there is nothing then."""
    known = {name: getattr(tokens, name) for name in ("hidden", "mask", "image", "slot", "origin")}
    return {name: tensor._version for name, tensor in known.items() if not tensor.is_inference()}


def check_unchanged(method: Compressor, tokens: LayerInput, before: dict[str, int]) -> None:
    """Check that `retain` changed nothing of its input in place, because the model goes on with the same tensors.

    Args:
        method: that was asked.
        tokens: its input.
        before: what `writes` counted before.

    Raises:
        ValueError: names what was changed.
    """
    changed = [f"tokens.{name}" for name, count in writes(tokens).items() if count != before.get(name)]
    if changed:
        raise ValueError(
            f"{type(method).__name__}.retain changed {' and '.join(changed)} in place: work on a copy; to give tokens "
            "new states, return Retained(keep, hidden)"
        )


def check_counts(method: Compressor, promised: list[int], kept: np.ndarray) -> None:
    """Check that `retain` kept as many visual tokens of each row as `known_counts` said.

    Raises:
        ValueError: names the method and both numbers.
    """
    for row, (ours, theirs) in enumerate(zip(kept.tolist(), promised, strict=True)):
        if ours != theirs:
            name = type(method).__name__
            raise ValueError(
                f"{name}.retain kept {ours} visual tokens of row {row}, and {name}.known_counts said {theirs}: return "
                "the counts that `retain` keeps, or None where they depend on the values of tokens"
            )


def check_weight(method: Compressor, tokens: LayerInput, answer: object) -> Tensor | None:
    """Check what `soft_retain` returned.

    Raises:
        ValueError: names the method, what it returned and what to return instead.
    """
    if answer is None:
        return None
    shape = tuple(tokens.mask.shape)
    if not isinstance(answer, Tensor) or not answer.is_floating_point() or tuple(answer.shape) != shape:
        raise ValueError(
            f"{type(method).__name__}.soft_retain returned {described(answer)}: return weights (B, S) in [0, 1], here "
            f"{shape}, or None outside of training"
        )
    return answer
