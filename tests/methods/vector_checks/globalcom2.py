"""GlobalCom²: vectors made by running the release's own functions."""

import numpy as np
import torch
from torch import nn

from vlmslim.methods.globalcom2 import (
    combined_score,
    crop_weights,
    merge_rankings_by_quota,
    release_order,
    release_sums,
    stretch,
)
from vlmslim.ops.attention import cls_logits, tower_qk
from vlmslim.ops.newlines import fill_budget


def check(arrays: dict[str, np.ndarray]) -> None:
    if "hidden" in arrays:
        _check_logits(arrays)
    else:
        _check_selection(arrays)


def _check_logits(arrays: dict[str, np.ndarray]) -> None:
    """Scores of the last layer's CLS query, from that layer's input."""
    t = {k: torch.from_numpy(v) for k, v in arrays.items() if v.ndim}
    width = t["hidden"].shape[-1]
    layer = nn.Module()
    layer.layer_norm1 = nn.LayerNorm(width, eps=float(arrays["ln_eps"]))
    layer.self_attn = nn.Module()
    layer.self_attn.num_heads = int(arrays["num_heads"])
    layer.self_attn.q_proj, layer.self_attn.k_proj = nn.Linear(width, width), nn.Linear(width, width)
    modules = {"ln": layer.layer_norm1, "q": layer.self_attn.q_proj, "k": layer.self_attn.k_proj}
    with torch.no_grad():
        for name, module in modules.items():
            module.weight.copy_(t[f"{name}_weight"])
            module.bias.copy_(t[f"{name}_bias"])
        scores = cls_logits(*tower_qk(layer, t["hidden"]))
    torch.testing.assert_close(scores, t["cls_scores"], rtol=0, atol=1e-5)


def token_grid(arrays: dict[str, np.ndarray]) -> torch.Tensor:
    """(n, 3): the sequence of a LLaVA-NeXT image whose crops have the file's valid rectangles."""
    side, (columns, rows) = int(arrays["side"]), arrays["grid_wh"].tolist()
    boxes = arrays["valid_bbox"].reshape(rows, columns, 4).tolist()
    grid = [[0, r, c] for r in range(side) for c in range(side)]
    for y, row in enumerate(boxes):
        for r in range(row[0][0], row[0][1]):
            for x, (_, _, left, right) in enumerate(row):
                grid += [[1 + y * columns + x, r, c] for c in range(left, right)]
            grid.append([-1, -1, -1])
    return torch.tensor(grid)


def _check_selection(arrays: dict[str, np.ndarray]) -> None:
    side, (columns, rows) = int(arrays["side"]), arrays["grid_wh"].tolist()
    tiles, crops = (rows, columns), rows * columns
    grid = token_grid(arrays)
    crop, row, column = grid.clamp(min=0).unbind(1)
    scores = torch.from_numpy(np.concatenate([arrays["base_scores"][None], arrays["crop_scores"]])).double()
    score = scores[crop, row * side + column]
    at = (grid[:, 0] > 0).nonzero()[:, 0]
    tile = grid[at, 0] - 1
    assert tile.bincount(minlength=crops).tolist() == arrays["valid_n"].tolist()

    thumbnail = scores[0].view(side, side)
    height = int((grid[:, 0] < 0).sum())
    command = stretch(thumbnail, height, len(at) // height).flatten()
    by_crop = tile.argsort(stable=True)
    np.testing.assert_allclose(command[by_crop].numpy(), arrays["global_on_crops"], rtol=1e-5, atol=1e-5)
    weight, final = crop_weights(release_sums(thumbnail, tiles), 10.0), combined_score(score[at], command, tile, crops)
    for share in arrays["ratios"].tolist():
        want = {k.split("_", 1)[1]: v for k, v in arrays.items() if k.startswith(f"R{round(share * 100):03d}_")}
        ratio = (share * weight).clamp(max=1)
        np.testing.assert_allclose(ratio.numpy(), want["crop_ratio"], rtol=1e-9)
        order = release_order(score, grid, tiles, side, share)
        best = want["thumb_order"].tolist()
        assert order[: len(best)].tolist() == best
        got = torch.where((order < 0)[:, None], -1, grid[order] - torch.tensor([1, 0, 0]))[len(best) :]
        assert got.tolist() == want["emitted"].tolist()
        for j in range(crops):
            picks = final[tile == j].argsort(descending=True, stable=True)[: int(want["crop_keep"][j])]
            theirs = torch.from_numpy(want[f"crop{j}_order"]).long()
            assert picks.sort().values.tolist() == theirs.sort().values.tolist()
            assert (final[tile == j][theirs].diff() < 1e-6).all()  # fp32 ties may swap within the kept set

        # The corrected mode keeps the best of each crop too, in the order of their true places.
        count = sum(counts := want["crop_keep"].tolist())
        everything = (
            fill_budget(merge_rankings_by_quota(final, tile, weight), grid[at], (0, 0), count, "drop").sort().values
        )
        picked = grid[at][everything]
        place = ((picked[:, 0] - 1) // columns * side + picked[:, 1]) * columns * side
        place += (picked[:, 0] - 1) % columns * side + picked[:, 2]
        assert (place.diff() > 0).all()
        for j, kept in enumerate(counts):
            ours = (at[everything][picked[:, 0] == j + 1])[:, None] == at[tile == j]
            chosen = ours.any(0).nonzero()[:, 0].tolist()
            top = final[tile == j].argsort(descending=True, stable=True)[: len(chosen)].sort().values
            assert chosen == top.tolist()
            if ratio.max() < 1:  # no cap: the release's counts, give or take the rounding
                assert abs(len(chosen) - kept) <= 1
