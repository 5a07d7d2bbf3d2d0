"""Principal components."""

import torch
from torch import Tensor

from vlmslim.ops.ranking import full_precision


@full_precision
def loadings(x: Tensor, q: int, start: Tensor | None = None) -> Tensor:
    """Compute how strongly each variable loads on each of the first q principal components.

    Exact components come from eigenvectors in fp64, so that they are the same on every run and in every batch.

    Args:
        x: (n, d) n variables, each with d samples.
        q: number of components; at most n count.
        start: (min(n, d), q) where two subspace iterations start, as in `torch.pca_lowrank`; None for exact components.

    Returns:
        (n, q) absolute values.
    """
    x = x - x.mean(1, keepdim=True)
    if start is None:
        vectors = torch.linalg.eigh(x.double() @ x.double().T)[1].flip(1)  # the largest first
        return vectors[:, :q].abs().to(x)
    wide = x.T if x.shape[1] >= len(x) else x  # (d, n), or (n, d) if that is taller
    basis = torch.linalg.qr(wide @ start.to(wide))[0]
    for _ in range(2):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    left, _, right = torch.linalg.svd(basis.T @ wide, full_matrices=False)
    return (right.T if wide.shape[1] == len(x) else basis @ left).abs()
