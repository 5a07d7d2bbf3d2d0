"""Ranks within groups, and scores in full precision."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds, some

from vlmslim.ops.ranking import full_precision, rank_within_groups


@some
@given(seeds, st.integers(1, 3), st.integers(1, 20))
def test_ranks_are_those_of_a_loop(seed, rows, size):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(0, 3, (rows, size), generator=generator)
    score = torch.randint(0, 4, (rows, size), generator=generator).float()  # with ties
    rank = rank_within_groups(score, group)
    for b in range(rows):
        for i in range(size):
            better = [j for j in range(size) if (-score[b, j], j) < (-score[b, i], i) and group[b, j] == group[b, i]]
            assert rank[b, i] == len(better)


def test_scores_are_computed_in_fp32_without_gradients():
    seen = []

    @full_precision
    def score(x, scale, *, shift=0.0):
        seen.append((x.dtype, torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))
        return x @ x.T * scale + shift

    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        result = score(x, 2, shift=1.0)
    assert seen == [(torch.float32, False, False)]
    assert result.dtype == torch.float32 and not result.requires_grad and (result == 7).all()
