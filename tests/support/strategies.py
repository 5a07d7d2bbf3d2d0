"""Random inputs for the tests of pure functions, and what plain loops are made of."""

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

some = settings(max_examples=25, deadline=None, derandomize=True)
thorough = settings(some, max_examples=100)
seeds = st.integers(0, 2**32)


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tied_tokens(seed: int, n: int, d: int, low: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of signed unit vectors (2, n, d) and scores in quarters (2, n): every product is exact, and many tie."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.eye(d)[torch.randint(d, (2, n), generator=generator)]
    x = x * (torch.randint(2, (2, n, 1), generator=generator) * 2 - 1)
    return x, torch.randint(low, low + 4, (2, n), generator=generator) / 4


def cosine(a, b) -> float:
    """The cosine of two vectors, in float64; 0 if one of them is zero."""
    a, b = (np.asarray(x, dtype=np.float64) for x in (a, b))
    length = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / length) if length else 0.0


def mosaic(side: int, tiles: tuple[int, int], top: int, left: int) -> torch.Tensor:
    """Token grid of an image whose mosaic lost `top` rows above and below, and `left` columns on both sides."""
    rows, columns = tiles
    grid = [[0, r, c] for r in range(side) for c in range(side)]
    for y in range(top, rows * side - top):
        for x in range(left, columns * side - left):
            grid.append([1 + y // side * columns + x // side, y % side, x % side])
        grid.append([-1, -1, -1])
    return torch.tensor(grid)


@st.composite
def shapes(draw):
    """side, tiles, rows lost above and below, columns lost left and right (padding is on one axis only), seed."""
    side, wide = draw(st.integers(2, 6)), draw(st.booleans())
    tiles = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    lost = min(draw(st.integers(0, 5)), (side * tiles[0 if wide else 1] - 1) // 2)
    return side, tiles, lost * wide, lost * (not wide), draw(seeds)
