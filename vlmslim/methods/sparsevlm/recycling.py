"""SparseVLM's recycling: clusters of dropped tokens, of which one mean each stays."""

import torch
from torch import Tensor

from vlmslim.ops.ranking import full_precision, membership


def clusters(dropped: int) -> tuple[int, int]:
    """Return how many of the dropped tokens are recycled, and into how many."""
    of = int(0.3 * dropped) + 1 if dropped else 0
    return of, of // 10 + 1 if dropped else 0


@full_precision
def recycled(x: Tensor, amount: int, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Cluster tokens by density peaks, and average each cluster.

    Args:
        x: (m, d) tokens.
        amount: number of clusters, at most m; also of the neighbours that make density, the token itself among them.
        noise: (m,) in [0, 1), a millionth of which is added to densities; None for none.

    Returns:
        (amount, d) means, (amount,) indices of the centres, and (m,) the cluster of each token.
    """
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = (-distance.sort(dim=1).values[:, :amount].square().mean(1)).exp()
    density = density if noise is None else density + 1e-6 * noise
    denser = density > density[:, None]
    apart = distance.masked_fill(~denser, float("inf")).amin(1)
    apart = torch.where(denser.any(1), apart, distance.max())
    centres = (density * apart).argsort(descending=True, stable=True)[:amount]
    group = distance[:, centres].argmin(1).index_copy(0, centres, torch.arange(amount, device=x.device))
    joins = membership(group, amount).to(x)
    return joins @ x / joins.sum(1, keepdim=True), centres, group


def destinations(shape: torch.Size, moves: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    """Return `LayerInput.into` of the tokens that moved: row, places (m,), and the places (m,) that they went to."""
    rows, places = shape
    into = torch.arange(places).repeat(rows, 1)
    for row, place, target in moves:
        into[row, place.cpu()] = target.cpu()
    return into
