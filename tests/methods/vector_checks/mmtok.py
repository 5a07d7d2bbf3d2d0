"""Reference vectors `mmtok_*`: coverage orders of the release, the words of a question, and patches of padding."""

import numpy as np
import torch
from PIL import Image
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from vlmslim.methods.mmtok import cover, keywords
from vlmslim.ops.greedy import cosines
from vlmslim.ops.padding import in_padding


def padded(width: int, height: int) -> torch.Tensor:
    """A white picture on a square of the mean colour, at 336 pixels, as the release makes it: (1, 3, 336, 336)."""
    long = max(width, height)
    square = Image.new("RGB", (long, long), (122, 116, 104))
    square.paste(Image.new("RGB", (width, height), "white"), ((long - width) // 2, (long - height) // 2))
    pixels = torch.from_numpy(np.array(square.resize((336, 336), Image.BICUBIC))).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (pixels - mean) / std


def check(arrays: dict[str, np.ndarray]) -> None:
    if "question" in arrays:
        for question, want in zip(arrays["question"], arrays["keywords"], strict=True):
            assert keywords(str(question)) == str(want)
        for size, want in zip(arrays["image_size"].tolist(), arrays["padding"], strict=True):
            assert set(in_padding(padded(*size), 24)[0].nonzero()[:, 0].tolist()) == set(want[want >= 0].tolist())
        return
    options = [float(arrays[name]) for name in ("tv_temperature", "vv_temperature", "alpha")]
    x, features, text = (torch.from_numpy(arrays[name]) for name in ("tower", "features", "text"))
    excluded = torch.zeros(1, len(x), dtype=torch.bool)
    excluded[0, torch.from_numpy(arrays["exclude"]).long()] = True
    want, safe = arrays["order"], int(arrays["safe"])
    got = cover(x[None], cosines(features, text)[None], len(want), *options, excluded)[0].numpy()
    assert len(set(got)) == len(got) and not excluded[0, got].any()
    np.testing.assert_array_equal(got[:safe], want[:safe])
    matrix = table(arrays, *options)
    check_gains(matrix, got, arrays["exclude"])
    for k in arrays["keeps"].tolist():
        np.testing.assert_allclose(matrix[:, got[:k]].max(1).sum(), arrays[f"objective_k{k}"], rtol=1e-5)
        if k <= safe:
            np.testing.assert_array_equal(np.sort(got[:k]), arrays[f"raster_k{k}"])


def table(arrays, word_temperature: float, temperature: float, alpha: float) -> np.ndarray:
    """(m + n, n) in float64: how well each token covers each word and each token."""

    def unit(x):
        x = x.astype(np.float64)
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-8)

    def softmax(x):
        x = np.exp(x - x.max(1, keepdims=True))
        return x / x.sum(1, keepdims=True)

    text, features, tower = (unit(arrays[name]) for name in ("text", "features", "tower"))
    words = softmax(text @ features.T / word_temperature) / len(text)
    return np.concatenate([words, alpha * softmax(tower @ tower.T / temperature) / len(tower)])


def check_gains(matrix: np.ndarray, picks: np.ndarray, excluded: np.ndarray) -> None:
    """Every pick gains as much as the best, given those before, up to rounding."""
    best = np.zeros(len(matrix))
    for step, pick in enumerate(picks):
        gain = np.maximum(matrix - best[:, None], 0).sum(0)
        gain[[*picks[:step], *excluded]] = -np.inf
        assert gain[pick] >= gain.max() * (1 - 1e-4) - 1e-9
        best = np.maximum(best, matrix[:, pick])
