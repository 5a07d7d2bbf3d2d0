"""Reference vectors `vscan_*`: picks, merged tokens, windows of odd grids, a decoder with one drop, by the release."""

import numpy as np
import torch
from released_decoders import run
from vector_checks.pyramiddrop import Noted

from vlmslim.compressor import ImageTokens
from vlmslim.methods.vscan import VScanEntrance, local_and_global, merged, released_mask, windows

CLEAR = 1e-6


def check(arrays: dict[str, np.ndarray]) -> None:
    if "inputs" in arrays:
        check_decoder(arrays)
    elif "shapes" in arrays:
        check_grids(arrays)
    elif "packed" in arrays:
        check_anyres(arrays)
    else:
        check_tower(arrays)


def places(rows: int, columns: int) -> np.ndarray:
    return np.argwhere(np.ones((rows, columns)))


def check_tower(arrays: dict[str, np.ndarray]) -> None:
    x, shallow, deep = (torch.from_numpy(arrays[name]) for name in ("x", "shallow", "deep"))
    side = round(len(x) ** 0.5)
    window = windows(places(side, side), int(arrays["window"]))
    for total in arrays["totals"].tolist():
        want = arrays[f"keep_{total}"]
        corrected, released = "released_kept" in arrays, released_mask(shallow[None], deep[None], total)[0]
        if corrected:
            assert max(int(released.sum()), int(arrays["released_kept"])) < total
        else:
            np.testing.assert_array_equal(released.nonzero()[:, 0].numpy(), want)
        if corrected or total // 2 % len(np.unique(window)) == 0:
            local, others = local_and_global(shallow, deep, window, total, total // 2)
            assert set(local.tolist()) == set(arrays[f"local_{total}"].tolist())
            assert set(others.tolist()) == set(arrays[f"global_{total}"].tolist())
        check_merged(x, want, arrays[f"merged_{total}"], arrays[f"near_margin_{total}"], arrays[f"near_{total}"])


def check_merged(x: torch.Tensor, kept: np.ndarray, want: np.ndarray, margin: float, near=None) -> None:
    features, _, joined = merged(x, torch.from_numpy(kept).long())
    if margin >= CLEAR:
        np.testing.assert_allclose(features.numpy(), want, atol=1e-5)
        if near is not None:
            np.testing.assert_array_equal(joined.numpy(), kept[near])


def check_grids(arrays: dict[str, np.ndarray]) -> None:
    for rows, columns in arrays["shapes"].tolist():
        name = f"{rows}x{columns}"
        shallow, deep = (torch.from_numpy(arrays[f"{kind}_score_{name}"]) for kind in ("local", "global"))
        x, window = torch.from_numpy(arrays[f"x_{name}"]), windows(places(rows, columns), int(arrays["window"]))
        for share in arrays["shares"].tolist():
            key, k = f"{name}_{round(1000 * share)}", int(share * len(x))
            local, others = local_and_global(shallow, deep, window, k, k // 2)
            assert sorted(local.tolist()) == sorted(arrays[f"window_{key}"].tolist())
            assert sorted(others.tolist()) == sorted(arrays[f"top_{key}"].tolist())
            kept = torch.cat([local, others]).sort().values.numpy()
            np.testing.assert_array_equal(kept, arrays[f"keep_{key}"])
            check_merged(x, kept, arrays[f"merged_{key}"], arrays[f"near_margin_{key}"])


def check_anyres(arrays: dict[str, np.ndarray]) -> None:
    """One image through the released mode: tower features are the projected ones, and attention is given."""
    x, newline = torch.from_numpy(arrays["x"]), torch.from_numpy(arrays["newline"])
    (rows, columns), (width, height) = arrays["tiles"].tolist(), arrays["size_wh"].tolist()
    side = round(x.shape[1] ** 0.5)
    grid = [[0, r, c] for r in range(side) for c in range(side)]
    top, left = lost(height, width, rows * side, columns * side), lost(width, height, columns * side, rows * side)
    for y in range(top, rows * side - top):
        for z in range(left, columns * side - left):
            grid.append([1 + y // side * columns + z // side, y % side, z % side])
        grid.append([-1, -1, -1])
    grid = torch.tensor(grid)
    crop, row, column = grid.clamp(min=0).unbind(1)
    features = torch.where(grid[:, :1] < 0, newline, x[crop, row * side + column])
    image = ImageTokens(
        features, x, x, (side, side), tiles=(rows, columns), projector=torch.clone, make_grid=lambda: grid
    )

    class Given(VScanEntrance):
        local_layer = 5

        def patch_scores(self, image, layer=None):
            return torch.from_numpy(arrays["shallow" if layer == 5 else "deep"])

    total = int(arrays["total"])
    result = Given(keep=total * len(x), mode="released").compress_images([image])[0]
    np.testing.assert_allclose(result.features.numpy(), arrays["packed"], atol=1e-5)
    np.testing.assert_array_equal(grid[result.index, 0].numpy() < 0, arrays["is_newline"])
    assert arrays["keep"].size - int((grid[result.index, 0] >= 0).sum()) == int(arrays["lost_in_padding"])


def lost(size: int, other: int, own: int, across: int) -> int:
    """Count rows of padding on each side of a picture `size` by `other` on a canvas of `own` by `across` patches."""
    scale = min(own / size, across / other)
    return (own - int(round(size * scale, 7))) // 2


def check_decoder(arrays: dict[str, np.ndarray]) -> None:
    layer, keep = int(arrays["layer"]), int(arrays["keep"])
    for positions, name in (("renumbered", "final"), ("original", "final_original_positions")):
        method = Noted(keep=keep, layer=(layer,), layer_positions=positions, first=int(arrays["first"]))
        final = run(arrays, method, arrays["kept"])
        score, kept = method.seen[layer]
        np.testing.assert_array_equal(kept, arrays["kept"])
        np.testing.assert_allclose(score, arrays["score"], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(final.numpy(), arrays[name], atol=1e-4)
