"""The local outlier factor, against plain loops in float64."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from recovery_by_hand import factor_by_hand
from strategies import some

from vlmslim.methods.recoverable.lof import local_outlier_factor


@some
@given(x=st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=30), k=st.integers(1, 25))
def test_outlier_factor_with_ties(x, k):
    got = local_outlier_factor(torch.tensor(x), k)
    np.testing.assert_allclose(got.numpy(), factor_by_hand(x, k), rtol=1e-9)


@some
@given(seed=st.integers(0, 10**6), n=st.integers(1, 60), k=st.integers(1, 25), heavy=st.booleans())
def test_outlier_factor(seed, n, k, heavy):
    x = torch.randn(n, generator=torch.Generator().manual_seed(seed))
    x = x.mul(3).exp() if heavy else x
    np.testing.assert_allclose(local_outlier_factor(x, k).numpy(), factor_by_hand(x.tolist(), k), rtol=1e-7)


def test_an_outlier_is_one():
    x = torch.cat([torch.linspace(0, 1, 50), torch.tensor([9.0, -9.0])])
    assert (local_outlier_factor(x, 20) > 1.5).nonzero()[:, 0].tolist() == [50, 51]
    assert not (local_outlier_factor(torch.ones(40), 20) > 1.5).any()
