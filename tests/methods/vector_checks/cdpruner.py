"""Reference vectors `cdpruner_*`: relevance, determinantal orders, text segments of the release; and centring."""

import numpy as np
import torch
from torch.nn import functional as F

from vlmslim.methods._clip import ClipText
from vlmslim.methods.cdpruner import conditional_diversity, scaled
from vlmslim.ops.centring import centred, standardised
from vlmslim.ops.greedy import Farthest, Rows, cosine_matrix, cosines, greedy


def check(arrays: dict[str, np.ndarray]) -> None:
    kind = str(arrays["kind"])
    if kind == "tower":
        check_tower(arrays)
    elif kind == "centred":
        check_centring(arrays)
    else:
        check_orders(arrays, kind)


def relevance_of(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    """(views, n), scaled over all views."""
    patches, texts = torch.from_numpy(arrays["image_embeds"]), torch.from_numpy(arrays["text_embeds"])
    score = -cosines(patches.flatten(0, 1), texts).mean(1)
    relevance = scaled(score, torch.ones(len(score), dtype=torch.bool)).view(patches.shape[:2])
    np.testing.assert_allclose(relevance.numpy().reshape(arrays["relevance"].shape), arrays["relevance"], atol=2e-6)
    return relevance


def check_orders(arrays: dict[str, np.ndarray], kind: str) -> None:
    x, relevance, k = torch.from_numpy(arrays["features"]), relevance_of(arrays), int(arrays["keep"])
    got = conditional_diversity(x, relevance, k).numpy()
    for view in range(len(x)):
        assert len(set(got[view])) == k
        if kind == "rank":  # of copies it is chance which one comes first
            distinct, group = int(arrays["distinct"]), arrays["group"]
            assert group[got[view][:distinct]].tolist() == group[arrays["order"][view][:distinct]].tolist()
            continue
        safe = int(arrays["safe_k"][view])
        np.testing.assert_array_equal(got[view][:safe], arrays["order"][view][:safe])
        if safe == k:
            np.testing.assert_array_equal(np.sort(got[view]), arrays["sorted"][view])
        check_best(x[view].double(), relevance[view].double(), got[view].tolist(), safe)


def check_best(x: torch.Tensor, r: torch.Tensor, picks: list[int], start: int) -> None:
    """Picks that hang on less than fp32 can tell raise the determinant as much as the best."""
    unit = F.normalize(x, dim=-1)
    kernel = r[:, None] * (unit @ unit.T) * r
    for step in range(start, len(picks)):
        before = picks[:step]
        known = kernel[:, before]
        factor = kernel.diagonal() - (known * torch.linalg.solve(kernel[before][:, before], known.T).T).sum(1)
        factor[before] = -torch.inf
        assert factor[picks[step]] >= factor.max() - 1e-5


def check_tower(arrays: dict[str, np.ndarray]) -> None:
    hidden, width = torch.from_numpy(arrays["hidden"]), arrays["hidden"].shape[-1]
    norm = torch.nn.LayerNorm(width, eps=float(arrays["ln_eps"]))
    norm.load_state_dict({name: torch.from_numpy(arrays[f"ln_{name}"]) for name in ("weight", "bias")})
    projection, context = torch.from_numpy(arrays["projection"]).T, int(arrays["max_positions"])
    seen: list[list[int]] = []

    def states(ids: torch.Tensor) -> torch.Tensor:
        seen.append(ids[0].tolist())
        return ids[..., None].float()  # a state says which id it belongs to

    ids: list[int] = []
    clip = ClipText([], states, lambda text, length: ids, 99, context, projection, norm, torch.zeros(1))
    patches = clip.project(hidden[:, 1:], norm=True)
    np.testing.assert_allclose(patches.numpy(), arrays["image_embeds"], rtol=1e-4, atol=1e-5)
    score = -cosines(patches.flatten(0, 1), torch.from_numpy(arrays["text_embeds"])).mean(1)
    relevance = scaled(score, torch.ones(len(score), dtype=torch.bool))
    np.testing.assert_allclose(relevance.numpy().reshape(arrays["relevance"].shape), arrays["relevance"], atol=2e-5)
    for i in range(sum(name.startswith("ids_") for name in arrays)):
        ids[:], seen[:] = arrays[f"ids_{i}"].tolist(), []
        pooled = clip.embed_segments("", released=True)[:, 0].tolist()
        want = [row[: mask.sum()].tolist() for row, mask in zip(
            arrays[f"segments_{i}"], arrays[f"segment_mask_{i}"], strict=True)]  # fmt: skip
        assert seen == want and pooled == [max(row) for row in want]


def check_centring(arrays: dict[str, np.ndarray]) -> None:
    x, relevance, eps = torch.from_numpy(arrays["features"])[None], relevance_of(arrays), float(arrays["eps"])
    for name, function in (("plain", centred), ("std", standardised)):
        moved, weight = function(x, eps)
        np.testing.assert_allclose(weight[0].numpy(), arrays[f"weight_{name}"], atol=2e-4)
        np.testing.assert_allclose(cosine_matrix(moved)[0, 0].numpy(), arrays[f"cosine_row0_{name}"], atol=1e-5)
        weight = torch.from_numpy(arrays[f"weight_{name}"]).float()[None]
        check_pair(arrays, name, moved, relevance * weight, weight)
    check_pair(arrays, "noweight", centred(x, eps)[0], relevance, torch.ones_like(relevance))


def check_pair(arrays, name: str, x: torch.Tensor, relevance: torch.Tensor, weight: torch.Tensor) -> None:
    orders = {"dpp": conditional_diversity(x, relevance, int(arrays["keep"]))[0], "maxmin": maxmin(x, weight, arrays)}
    for rule, order in orders.items():
        want, margin = arrays[f"{rule}_order_{name}"], arrays[f"{rule}_margin_{name}"]
        close = margin < 1e-5
        safe = int(arrays.get(f"{rule}_safe_k_{name}", close.argmax() if close.any() else len(want)))
        np.testing.assert_array_equal(order.numpy()[:safe], want[:safe])


def maxmin(x: torch.Tensor, weight: torch.Tensor, arrays) -> torch.Tensor:
    """DivPrune with centring: weights times the distance to the nearest pick."""
    closeness = cosine_matrix(x) - 1
    closeness.diagonal(dim1=1, dim2=2).fill_(-float("inf"))
    first = closeness.amax(2).argmin(1)
    return greedy(Farthest(Rows(closeness), torch.maximum, weight), int(arrays["keep"]), first)[0]
