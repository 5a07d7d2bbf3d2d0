"""Cut the grids of an image into cells of near-equal size."""

import numpy as np

from vlmslim.ops.budgets import share_out


def grid_cells(height: int, width: int, k: int) -> np.ndarray:
    """Cover a height x width grid with exactly k rectangles, as square and as even as k allows.

    The grid is cut into bands of rows, and each band into cells. If k divides well the cells form a regular grid.

    Args:
        height: rows of the grid.
        width: columns of the grid.
        k: number of cells, 1 <= k <= height * width.

    Returns:
        (height, width) long: the cell of each grid point, 0 .. k-1 in reading order.

    Raises:
        ValueError: k does not fit.
    """
    if not 1 <= k <= height * width:
        raise ValueError(f"cannot cut a {height} x {width} grid into {k} cells; use 1 to {height * width}")
    bands = min(height, k, max(1, round((k * height / width) ** 0.5), -(-k // width)))
    # Cutting `length` evenly into `parts`, part i begins at i * length // parts. Point x then lies in part
    # ((x + 1) * parts - 1) // length, because that is the last part that begins at or before x.
    band = ((np.arange(height) + 1) * bands - 1) // height
    first = band * k // bands  # the first cell of each row's band
    count = (band + 1) * k // bands - first
    return first[:, None] + ((np.arange(width) + 1) * count[:, None] - 1) // width


def dense(grid: np.ndarray) -> np.ndarray:
    """Count the rows and columns of each component among those that it has, from 0 on.

    They have gaps where the model cut padding off a tile, or shrank a mosaic.

    Args:
        grid: (n, 3) component, row and column of each token, as `ImageTokens.grid_on_host` or `mosaic_on_host`.

    Returns:
        (n, 3), with the same components. Tokens without a place, such as newlines, keep their -1.
    """
    counted = grid.copy()
    for component in np.unique(grid[grid[:, 1] >= 0, 0]):
        own = (grid[:, 0] == component) & (grid[:, 1] >= 0)
        for axis in (1, 2):
            counted[own, axis] = np.unique(grid[own, axis], return_inverse=True)[1]
    return counted


def even_cells(mosaic: np.ndarray, k: int) -> np.ndarray:
    """Cut all components of an image into k cells of near-equal size.

    Args:
        mosaic: (n, 3) component, row and column of each token (`ImageTokens.mosaic_on_host`).
        k: number of cells, at most n.

    Returns:
        (n,) long: the cell of each token, 0 .. k-1, and -1 at tokens without a place on a grid, such as newlines. If
        k exceeds the number of tokens on grids, the first tokens without a place become cells of their own.
    """
    component, row, column = dense(mosaic).T
    cell = np.full_like(component, -1)
    placeless = np.flatnonzero(row < 0)
    extra = max(0, k - (len(cell) - len(placeless)))
    parts = [np.flatnonzero((component == c) & (row >= 0)) for c in np.unique(component[row >= 0])]
    first = 0
    for index, share in zip(parts, share_out(k - extra, [len(part) for part in parts]), strict=True):
        if share:
            r, c = row[index], column[index]
            cell[index] = first + grid_cells(int(r.max()) + 1, int(c.max()) + 1, share)[r, c]
            first += share
    cell[placeless[:extra]] = first + np.arange(extra)
    return cell


def cell_members(cell: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """List tokens cell by cell.

    Args:
        cell: (n,) the cell of each token, -1 for none.

    Returns:
        (m,) the tokens of cell 0, then those of cell 1, and so on, each in order; and (k,) the sizes of the cells.
    """
    order = cell.argsort(kind="stable")[(cell < 0).sum() :]
    return order, np.bincount(cell[order])
