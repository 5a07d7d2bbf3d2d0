"""Clustering by density peaks (Rodriguez and Laio, 2014), with densities from nearest neighbours."""

import torch
from torch import Tensor

from vlmslim.ops.ranking import full_precision, membership


@full_precision
def density_peaks(x: Tensor, amount: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster tokens around those that are dense and far from denser ones, and average each cluster.

    Args:
        x: (m, d) tokens.
        amount: number of clusters, at most m; also of the neighbours that make density, the token itself among them.
        noise: (m,) in [0, 1), a millionth of which is added to densities; None for none.

    Returns:
        (amount, d) means, (amount,) indices of the centres, and (m,) the cluster of each token.
    """
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = (-distance.sort(dim=1).values[:, :amount].square().mean(1)).exp()
    density = density if noise is None else density + 1e-6 * noise.to(x.device)
    denser = density > density[:, None]
    apart = distance.masked_fill(~denser, float("inf")).amin(1)
    apart = torch.where(denser.any(1), apart, distance.max())
    centres = (density * apart).argsort(descending=True, stable=True)[:amount]
    group = distance[:, centres].argmin(1).index_copy(0, centres, torch.arange(amount, device=x.device))
    joins = membership(group, amount).to(x)
    return joins @ x / joins.sum(1, keepdim=True), centres, group
