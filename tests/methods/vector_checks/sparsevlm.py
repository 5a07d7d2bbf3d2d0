"""Reference vectors `sparsevlm_*`: one pruning layer of each version, by the release."""

import numpy as np
import torch
from layer_inputs import one_image
from torch import Tensor

from vlmslim.compressor import ImageTokens, LayerInput, Retained
from vlmslim.methods.sparsevlm import SparseVLM, clusters, guided_score, rotary_gravity, visual_words
from vlmslim.ops.density_peaks import density_peaks


class Given(LayerInput):
    """Attention of the text after the image to its tokens, (heads, t, n), from the file; rotary positions by hand."""

    given: Tensor

    def attention(self, rows: Tensor, temperature: float = 1.0, end: int | None = None) -> Tensor:
        whole = torch.zeros(1, len(self.given), *self.mask.shape[1:] * 2)
        start, (_, t, n) = int(self.image[0].argmax()), self.given.shape
        whole[0, :, start + n : start + n + t, start : start + n] = self.given
        return whole[:, :, rows[0]]

    keys = rotary = None


def check(arrays: dict[str, np.ndarray]) -> None:
    t = {name: torch.from_numpy(np.atleast_1d(x)) for name, x in arrays.items() if x.dtype.kind in "fiu"}
    version, start, n = str(arrays["version"]), int(arrays["image_start"]), int(arrays["n"])
    x = t["embeddings"][start : start + n]
    raters = visual_words(x, t["embeddings"][start + n :]).nonzero()[:, 0]
    assert raters.tolist() == arrays["raters"].tolist()
    paid = t["attention"][:, raters]
    method = SparseVLM(version=version, mode="released", layer=(1,), **budget(arrays, version))
    tokens = layer_input(t, start, n)
    heads = None
    if version == "2.0":
        place = torch.arange(start, start + n)
        paid, heads = paid / rotary_gravity(tokens, 0, raters + start + n, place), len(arrays["heads"])
        by_head = paid.sum((1, 2)).argsort(descending=True, stable=True)[:heads]
        assert by_head.tolist() == arrays["heads"].tolist()
    score = guided_score(paid, torch.ones(len(raters), dtype=torch.bool), heads)
    tolerance = 1e-3 if version == "2.0" and int(arrays["head_dim"]) <= 16 else 1e-5
    np.testing.assert_allclose(score.numpy(), arrays["score"], atol=tolerance * np.abs(arrays["score"]).max())
    if version == "1.0":
        assert int(torch.linalg.matrix_rank(paid.mean(0))) == int(arrays["rank"])
    method.layers, method.embedding = (1,), lambda ids: t["embeddings"][start + n :][ids - start]
    answer = method.retain(tokens)
    keep, hidden = (answer.keep, answer.hidden) if isinstance(answer, Retained) else (answer, tokens.hidden)
    kept = score.argsort(descending=True, stable=True)[: len(arrays["kept"])].sort().values
    assert kept.tolist() == arrays["kept"].tolist()
    left = hidden[0][keep[0] | (tokens.image[0] == 0)]
    assert len(left) == len(arrays["sequence_out"])
    if "recycled" not in arrays:
        np.testing.assert_allclose(left.numpy(), arrays["sequence_out"], atol=1e-5)
        return
    check_recycling(arrays, score, len(kept), t["layer_output"][start : start + n])
    made = slice(start + len(kept), start + len(kept) + len(arrays["merged"]))
    for part in (slice(0, made.start), slice(made.stop, None)):  # noise may decide what is between
        np.testing.assert_allclose(left[part].numpy(), arrays["sequence_out"][part], atol=1e-5)


def check_recycling(arrays: dict[str, np.ndarray], score: Tensor, k: int, states: Tensor) -> None:
    of, amount = clusters(len(score) - k)
    order = score.argsort(descending=True, stable=True)[k : k + of]
    assert (order.tolist(), amount) == (arrays["recycled"].tolist(), int(arrays["clusters"]))
    means, centres, group = density_peaks(states[order], amount, torch.from_numpy(arrays["noise"]))
    assert order[centres].tolist() == arrays["centres"].tolist()
    assert group.tolist() == arrays["assign"].tolist()
    np.testing.assert_allclose(means.numpy(), arrays["merged"], atol=1e-5)


def budget(arrays: dict[str, np.ndarray], version: str) -> dict:
    if version == "1.0":
        return dict(scale=float(arrays["scale"]), bias=float(arrays["bias"]))
    heads = {"heads": len(arrays["heads"]) / len(arrays["attention"])} if "heads" in arrays else {}
    return {"counts": (int(arrays["keep"]),)} | heads


def layer_input(t: dict[str, Tensor], start: int, n: int) -> LayerInput:
    size, features = len(t["layer_output"]), t["embeddings"][start : start + n]
    prompt = torch.arange(size - n)  # of the text, by its place
    image = ImageTokens(features, features[None], torch.zeros(1, 3, 2, 2), prompt=prompt)
    tokens = Given(layer=1, **one_image(t["layer_output"], start, n), images=[[image]])
    tokens.given = t["attention"]
    if "head_dim" in t:
        width = int(t["head_dim"])
        frequencies = float(t["rope_theta"]) ** -(torch.arange(0, width, 2).double() / width)
        angle = t["position_ids"].flatten()[:, None] * torch.cat([frequencies, frequencies])
        tokens.rotary = angle.cos().float()[None], angle.sin().float()[None]
        tokens.keys = torch.zeros(1, 1, size, width)
    return tokens
